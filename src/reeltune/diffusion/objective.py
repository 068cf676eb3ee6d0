"""What the network is asked for, and how its answer is walked back to a picture.

One object trains and samples, so the two cannot drift apart. The identity every objective keeps
(and the one test they all share):   to_x0(corrupt(x0, n, l), target(x0, n, l), l) == x0
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

FINE = 2**16  # places at which a density without a closed form is summed


def _normal(x: float) -> float:
    """The standard normal distribution's share below x."""
    return (1 + math.erf(x / math.sqrt(2))) / 2


def column(level_B: Tensor, like: Tensor) -> Tensor:
    """level_B shaped to broadcast over `like`'s other axes."""
    return level_B.to(like).reshape(-1, *[1] * (like.ndim - 1))


class Objective(Protocol):
    """Levels are places in a schedule, from 1 (nothing but noise, or nearly) down to 0 (the picture)."""

    steps: int

    @property
    def share(self) -> float:
        """The share of levels that this one draws, of those that one network for the whole schedule would learn at."""
        return 1.0

    @cached_property
    def levels(self) -> Tensor: ...  # float32[steps], all of them, noisiest first

    def draw(self, generator: torch.Generator, stratum: tuple[int, int]) -> float: ...  # one level
    def corrupt(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor: ...
    def to_x0(self, x: Tensor, answer: Tensor, level_B: Tensor) -> Tensor: ...
    def timestep(self, level_B: Tensor) -> Tensor: ...  # in the network's own unit

    def quantile(self, u: float) -> float:
        """The level at share u in [0, 1) of the schedule."""
        index = math.floor(u * len(self.levels))
        return self.levels[min(max(index, 0), len(self.levels) - 1)].item()  # u rounds to 1 once in 2^24 draws

    def error(self, answer: Tensor, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """float32, of x0's shape; its weighted mean square is the loss."""
        return answer.float() - self.target(x0, noise, level_B).float()

    def weight(self, level_B: Tensor) -> Tensor:
        return torch.ones_like(level_B)

    def surcharge(self, answer: Tensor, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor | None:
        """float32[B] added to each sample's loss."""
        return None


@dataclass(frozen=True)
class Flow(Objective):
    """Rectified flow: x = (1 - l) x0 + l n, and the network answers n - x0 (https://arxiv.org/abs/2209.03003).

    Levels are those of a discrete schedule of `steps` indices, noisiest first, shifted towards noise by
    shift t / (1 + (shift - 1) t) (https://arxiv.org/abs/2403.03206, eq. 23). Densities and weights of
    `weighting_scheme` are those of Stable Diffusion 3 (same paper, section 3.1) in diffusers' form
    (https://github.com/huggingface/diffusers/pull/8528).
    """

    shift: float = 5.0
    steps: int = 1000
    first: int = 0  # of the indices that are drawn
    end: int | None = None  # one past the last of them; None: to the schedule's end
    uniform_sampling: bool = False  # uniform over the stratum, instead of by density over the whole schedule
    weighting_scheme: Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"] = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    @cached_property
    def levels(self) -> Tensor:
        """float32[steps], in float32 arithmetic throughout, so that it equals the schedule released models saw."""
        t = torch.arange(self.steps, 0, -1, dtype=torch.float32) / self.steps
        return self.shift * t / (1 + (self.shift - 1) * t)

    @cached_property
    def indices(self) -> range:
        """The indices that are drawn."""
        return range(self.steps)[self.first : self.end]

    def parted(self, boundary: float) -> tuple[Flow, Flow]:
        """Objectives of the levels from `boundary` on, and of those below it: together all, and none in both.

        Compared as timesteps, as samplers do that pass from one network to the other there.
        """
        place = int((self.timestep(self.levels) >= boundary * self.steps).sum())
        return replace(self, end=place), replace(self, first=place)

    def quantile(self, u: float) -> float:
        return self.levels[self.indices[min(max(math.floor(u * len(self.indices)), 0), len(self.indices) - 1)]].item()

    def draw(self, generator: torch.Generator, stratum: tuple[int, int]) -> float:
        """A level from indices [i/n, (i+1)/n) of the range with uniform_sampling, else from all of it by the density.

        A density is of the whole schedule; what it draws outside the range is drawn again.
        """
        if self.uniform_sampling:
            i, n = stratum
            return self.quantile((i + torch.rand((), generator=generator).item()) / n)
        while True:
            index = min(max(math.floor(self._density(generator) * self.steps), 0), self.steps - 1)
            if index in self.indices:
                return self.levels[index].item()

    def _density(self, generator: torch.Generator) -> float:
        if self.weighting_scheme == "logit_normal":
            return torch.normal(self.logit_mean, self.logit_std, (1,), generator=generator).sigmoid().item()
        return self._by_mode(torch.rand(1, generator=generator)).item()

    def _by_mode(self, u: Tensor) -> Tensor:
        """Uniform numbers as `weighting_scheme` mode has them, or as they are."""
        if self.weighting_scheme != "mode":
            return u
        return 1 - u - self.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)

    @property
    def share(self) -> float:
        """The range's share of all levels, where they are sampled evenly, or else of their density."""
        ends = (self.indices.start / self.steps, self.indices.stop / self.steps)
        if not self.uniform_sampling and self.weighting_scheme == "logit_normal":
            below = (_normal((math.log(p / (1 - p)) - self.logit_mean) / self.logit_std) for p in ends if 0 < p < 1)
            least = 0.0 if ends[0] == 0 else next(below)
            return (1.0 if ends[1] == 1 else next(below)) - least
        if not self.uniform_sampling and self.weighting_scheme == "mode":
            u = self._by_mode((torch.arange(FINE, dtype=torch.float64) + 0.5) / FINE)
            index = (u * self.steps).floor().clamp(0, self.steps - 1)
            return ((index >= self.indices.start) & (index < self.indices.stop)).double().mean().item()
        return len(self.indices) / self.steps

    def corrupt(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        level = column(level_B, x0)
        return (1 - level) * x0 + level * noise

    def target(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        return noise - x0

    def to_x0(self, x: Tensor, answer: Tensor, level_B: Tensor) -> Tensor:
        return x - column(level_B, x) * answer

    def weight(self, level_B: Tensor) -> Tensor:
        if self.weighting_scheme == "sigma_sqrt":
            return level_B**-2.0
        if self.weighting_scheme == "cosmap":
            return 2 / (math.pi * (1 - 2 * level_B + 2 * level_B**2))
        return torch.ones_like(level_B)

    def timestep(self, level_B: Tensor) -> Tensor:
        """The level in [0, steps], fractional as it is (measured on the reference, 2026-11)."""
        return level_B * self.steps


class Discrete(Objective, Protocol):
    """Diffusion in steps of variance beta, x = sqrt(s) x0 + sqrt(1 - s) n with s the share of signal left, the product
    of 1 - beta (https://arxiv.org/abs/2006.11239, eq. 4). The level of index t is t / steps.
    """

    uniform_sampling: bool
    prediction_type: Literal["epsilon", "v_prediction"]

    @cached_property
    def betas(self) -> Tensor: ...  # [steps], the least noise first
    @cached_property
    def signal(self) -> Tensor: ...  # [steps], s

    @cached_property
    def levels(self) -> Tensor:
        return torch.arange(self.steps - 1, -1, -1, dtype=torch.float32) / self.steps

    def draw(self, generator: torch.Generator, stratum: tuple[int, int]) -> float:
        """One level, from share [i/n, (i+1)/n) of the schedule with uniform_sampling, else from all of it."""
        i, n = stratum if self.uniform_sampling else (0, 1)
        return self.quantile((i + torch.rand((), generator=generator).item()) / n)

    def index(self, level_B: Tensor) -> Tensor:
        return (level_B * self.steps).round().long()

    def at(self, table: Tensor, level_B: Tensor, like: Tensor) -> Tensor:
        """The table's float32 values at these levels, shaped to broadcast over `like`."""
        values = table.float().to(level_B.device, non_blocking=True)[self.index(level_B)]
        return column(values, like)

    def corrupt(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        return self.at(self.signal**0.5, level_B, x0) * x0 + self.at((1 - self.signal) ** 0.5, level_B, x0) * noise


@dataclass(frozen=True)
class Ddpm(Discrete):
    """The network answers the noise, or v = sqrt(s) n - sqrt(1 - s) x0 (https://arxiv.org/abs/2202.00512, section 4).

    Betas grow linearly, or their roots do (https://arxiv.org/abs/2112.10752, in its code). Zero-SNR shifts and scales
    sqrt(s) so that its last value is 0 (https://arxiv.org/abs/2305.08891, algorithm 1). In float32 arithmetic
    throughout, so that it equals the schedule released models saw.
    """

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear"] = "scaled_linear"
    rescale_betas_zero_snr: bool = False
    steps: int = 1000
    uniform_sampling: bool = False  # uniform over the stratum, instead of over the whole schedule

    @cached_property
    def betas(self) -> Tensor:
        power = 0.5 if self.beta_schedule == "scaled_linear" else 1
        betas = torch.linspace(self.beta_start**power, self.beta_end**power, self.steps) ** (1 / power)
        if not self.rescale_betas_zero_snr:
            return betas
        root = (1 - betas).cumprod(0).sqrt()
        first, last = root[0].clone(), root[-1].clone()
        signal = ((root - last) * (first / (first - last))) ** 2
        return 1 - torch.cat([signal[:1], signal[1:] / signal[:-1]])

    @cached_property
    def signal(self) -> Tensor:
        return (1 - self.betas).cumprod(0)

    def target(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        return self.at(self.signal**0.5, level_B, x0) * noise - self.at((1 - self.signal) ** 0.5, level_B, x0) * x0

    def to_x0(self, x: Tensor, answer: Tensor, level_B: Tensor) -> Tensor:
        """x0 from the network's answer; with epsilon it is not determined where no signal is left: infinite or nan."""
        kept, noise = self.at(self.signal**0.5, level_B, x), self.at((1 - self.signal) ** 0.5, level_B, x)
        return (x - noise * answer) / kept if self.prediction_type == "epsilon" else kept * x - noise * answer

    def timestep(self, level_B: Tensor) -> Tensor:
        """The index itself, 0 to steps - 1."""
        return self.index(level_B)


@dataclass(frozen=True)
class Sigma(Discrete):
    """Improved DDPM: the network answers the noise, and v in [-1, 1] that sets the variance of a step back, in as many
    channels again (https://arxiv.org/abs/2102.09672, eq. 15). The loss is the noise's mean square error plus the
    variational bound in bits (eq. 16, where the mean is not learned from). Betas are linear over 1000 steps, of which
    every n-th is used (section 4 there), in float64.
    """

    prediction_type = "epsilon"

    steps: int = 1000
    snr_loss: bool = (
        False  # below index 250 regress the picture instead of the noise (measured on the reference, 2026-11)
    )
    uniform_sampling: bool = False

    @cached_property
    def kept(self) -> Tensor:
        """The indices in use of the 1000, spaced as in improved DDPM's code: rounded multiples of 999 / (steps - 1)."""
        return torch.linspace(0, 999, self.steps, dtype=torch.float64).round().long()

    @cached_property
    def signal(self) -> Tensor:
        return (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[self.kept]

    @cached_property
    def before(self) -> Tensor:
        """The share of signal one step back."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.signal[:-1]])

    @cached_property
    def betas(self) -> Tensor:
        return 1 - self.signal / self.before

    def target(self, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        return noise

    def to_x0(self, x: Tensor, answer: Tensor, level_B: Tensor) -> Tensor:
        """`answer` with or without the channels of the variance."""
        noise = answer[:, : x.shape[1]]
        return self.at(self.signal**-0.5, level_B, x) * x - self.at((1 / self.signal - 1) ** 0.5, level_B, x) * noise

    def timestep(self, level_B: Tensor) -> Tensor:
        """The index among all 1000."""
        return self.kept.to(level_B.device, non_blocking=True)[self.index(level_B)]

    def error(self, answer: Tensor, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        error = answer[:, : x0.shape[1]].float() - noise
        if not self.snr_loss:
            return error
        shown = self.to_x0(self.corrupt(x0, noise, level_B), answer.float(), level_B) - x0
        return torch.where(column(self.index(level_B), x0) < 250, shown, error)

    def surcharge(self, answer: Tensor, x0: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """The bound of one step in bits per element: its divergence from the true step (eq. 10 to 12 of
        https://arxiv.org/abs/2006.11239), or at index 0 the picture's negative log-likelihood (eq. 13).
        """
        answer = answer.float()
        least = self.betas * (1 - self.before) / (1 - self.signal)
        least = self.at(torch.cat([least[1:2], least[1:]]).log(), level_B, x0)  # that of index 0 would be -inf
        share = (answer[:, x0.shape[1] :] + 1) / 2
        logvar = share * self.at(self.betas.log(), level_B, x0) + (1 - share) * least
        x = self.corrupt(x0, noise, level_B)
        of_x0 = self.at(self.betas * self.before**0.5 / (1 - self.signal), level_B, x0)
        of_x = self.at((1 - self.before) * (1 - self.betas) ** 0.5 / (1 - self.signal), level_B, x0)
        mean = of_x0 * self.to_x0(x, answer.detach(), level_B) + of_x * x
        gap = of_x0 * x0 + of_x * x - mean
        divergence = (logvar - least - 1 + (least - logvar).exp() + gap**2 * (-logvar).exp()) / 2
        nats = torch.where(column(self.index(level_B), x0) == 0, -log_likelihood(x0, mean, logvar), divergence)
        return nats.flatten(1).mean(1) / math.log(2)


def log_likelihood(x0: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """The log likelihood of x0 under a Gaussian cut into 255 bins of [-1, 1], the outer ones open; its integral by tanh
    (https://arxiv.org/abs/2006.11239, eq. 13; https://doi.org/10.2307/2346872).
    """

    def below(edge: Tensor) -> Tensor:
        z = (edge - mean) * (-logvar / 2).exp()
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

    left = torch.where(x0 < -0.999, 0, below(x0 - 1 / 255))
    right = torch.where(x0 > 0.999, 1, below(x0 + 1 / 255))
    return (right - left).clamp(min=1e-12).log()
