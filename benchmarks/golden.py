"""Files of the reference's numbers, and how ours are compared with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from reeltune import families
from reeltune.core.types import Batch, Posterior
from reeltune.diffusion.objective import Ddpm, Flow, Objective, Sigma
from reeltune.families.spec import Family, Parts

PREDICTION, LOSS, NORM = 5e-5, 1e-5, 5e-5  # absolute; relative; relative
SCHEDULE = 1e-6  # absolute: a few float32 roundings
MSL = 0.25  # motion_sub_loss_ratio of the golden steps
CPU = torch.device("cpu")
PLACE: ContextVar[torch.device] = ContextVar("place", default=CPU)  # where ours are computed


@contextmanager
def computed_on(device: torch.device) -> Iterator[None]:
    """Within, golden files and checkpoints are read to that device, and what is made of nothing is made there."""
    token = PLACE.set(device)
    try:
        with device:
            yield
    finally:
        PLACE.reset(token)


class Row(NamedTuple):
    file: str
    tensor: str
    absolute: float  # largest difference
    relative: float  # over the largest value of the reference
    bound: float
    kind: str  # which of the two the bound is on

    @property
    def ok(self) -> bool:
        return (self.absolute if self.kind == "absolute" else self.relative) <= self.bound


class Golden:
    """One file's tensors; collects a Row for each that is compared."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as file:
            self.tensors = {name: file.get_tensor(name).to(PLACE.get()) for name in file.keys()}  # noqa: SIM118
            self.metadata = file.metadata() or {}
        self.path, self.rows = path, []

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def cases(self, suffix: str) -> list[str]:
        """What stands before `suffix` in the names that end with it."""
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def numbered(self, prefix: str) -> list[Tensor]:
        return [self[f"{prefix}{i}"] for i in range(len([name for name in self.tensors if name.startswith(prefix)]))]

    def compare(self, name: str, ours: Tensor, bound: float = PREDICTION, kind: str = "absolute") -> None:
        theirs = self[name]
        if ours.shape != theirs.shape:
            raise AssertionError(f"{self.path.name} {name}: ours is {tuple(ours.shape)}, theirs {tuple(theirs.shape)}")
        ours, theirs = (tensor.detach().double().cpu() for tensor in (ours, theirs))
        difference = (ours - theirs).abs().max().item()
        relative = difference / max(theirs.abs().max().item(), 1e-30)
        self.rows.append(Row(f"{self.path.parent.name}/{self.path.name}", name, difference, relative, bound, kind))

    def exact(self, name: str, ours: Tensor) -> None:
        self.compare(name, ours, bound=0.0)


# ---- what a case's README tells


def loaded(case: Path) -> tuple[Family, Parts]:
    """The checkpoint that a case's README names, in float32."""
    return _loaded(case, PLACE.get())


@cache
def _loaded(case: Path, device: torch.device) -> tuple[Family, Parts]:
    named = re.search(r"from (?:the checkpoint folder )?(\S+?)[ ,]", (case / "README.md").read_text())
    assert named is not None
    path = (case / named.group(1)).resolve()
    family = families.find(path)
    return family, on_device(family.load(path, frozen_dtype=torch.float32, device=device))


def on_device(parts: Parts) -> Parts:
    """With the frozen networks there too, which a run moves when it first needs them."""
    for network in parts.frozen.values():
        network.to(parts.device)
    return parts


def settings_of(path: Path) -> dict[str, str]:
    """key -> value of the line under a file's heading in its README; prompts as they stand."""
    text = (path.parent / "README.md").read_text().split(f"## {path.name}\n", 1)[1]
    line = text.strip().splitlines()[0]
    return dict(re.findall(r"(\w+)=(\[.*?\]|[^,]+?)(?=,|\.?$)", line))


def captions_in(case: Path) -> tuple[list[str], int]:
    """The prompts that a case's README tells of, and their length in tokens."""
    readme = (case / "README.md").read_text()
    said = re.search(r"Prompts: \[(.*?)\]", readme)
    length = re.search(r"max_length=(\d+)", readme)
    assert said is not None and length is not None
    return re.findall(r'"([^"]*)"', said.group(1)), int(length.group(1))


def measured(path: Path, kinds: Mapping[str, Callable[[Golden, Family, Parts], None]]) -> list[Row]:
    """All rows of one golden file. kinds: what its name begins with -> what compares such a file."""
    golden = Golden(path)
    kinds[path.stem.split("_")[0]](golden, *loaded(path.parent))
    return golden.rows


# ---- inputs of ours, and comparisons


def batch_of(pixels_u8: Tensor, **more: Any) -> Batch:
    empty = {"draws": [], "text": [], "ref_frame_B": torch.zeros(len(pixels_u8), dtype=torch.int64), "keep": {}}
    return Batch(**{"pixels_BFCHW": pixels_u8, **empty, **more}).to(PLACE.get())


def to_u8(pixels: Tensor) -> Tensor:
    return ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8)


def compare_schedule(golden: Golden, objective: Objective) -> None:
    if isinstance(objective, Flow):
        golden.compare("sigmas", objective.levels, SCHEDULE)
    else:
        assert isinstance(objective, Ddpm | Sigma)
        golden.compare("alphas_cumprod", objective.signal, SCHEDULE)
    if "timesteps" in golden:
        golden.compare("timesteps", objective.timestep(objective.levels), LOSS, "relative")


def assert_drawn(stored: Tensor, found: Posterior) -> None:
    """Stored latents are a draw from our distribution: (stored - mean) / deviation is standard normal."""
    z = (stored - found.mean) / (found.logvar / 2).exp()
    count = z.numel()
    far = abs(z.mean().item()) * count**0.5, abs(z.var().item() - 1) * (count / 2) ** 0.5
    if count and max(far) > 5:
        raise AssertionError(f"stored latents are no draw from ours: {far} standard errors from 0 and 1")


def compare_vae(
    golden: Golden, parts: Parts, encode: Callable[[Any, Tensor], Posterior], decode: Callable[[Parts, Tensor], Tensor]
) -> None:
    """Of clips B C F H W. encode: of the VAE and a clip B F C H W."""
    net: Any = parts.frozen["vae"]
    scale = net.config.scaling_factor
    for case in golden.cases(".x"):
        with torch.no_grad():
            found = encode(net, golden[f"{case}.x"].transpose(1, 2))
        golden.compare(f"{case}.mean", found.mean / scale)
        golden.compare(f"{case}.logvar", found.logvar - 2 * torch.tensor(scale).log())
        golden.compare(f"{case}.dec", decode(parts, golden[f"{case}.z"] * scale).transpose(1, 2))


def compare_output(
    golden: Golden, case: str, parts: Parts, family: Family, out: Tensor, bound: float = NORM
) -> dict[str, Tensor]:
    """A network's output, the mean of it weighted, and the gradients of that. bound: of these. Returns ours, by the
    names in the file."""
    golden.compare(f"{case}.out", out)
    terms = out * golden[f"{case}.loss_weight"]  # of both signs, so that the mean may be near 0
    golden.compare(f"{case}.loss", terms.mean(), LOSS * terms.abs().mean().item())
    parts.net.zero_grad()
    terms.mean().backward()
    released = family.to_released({name: p.grad for name, p in parts.net.named_parameters()}, parts.config)
    names = [name for name in golden.tensors if name.startswith(f"{case}.grad.")]
    found = {name: released[name.removeprefix(f"{case}.grad.")] for name in names}
    for name, ours in found.items():
        golden.compare(name, ours, bound, "relative")
    return found


def gradients(golden: Golden, case: str, parts: Parts, family: Family, value: Tensor) -> None:
    """Backward of `value`; compares it, the norm over all gradients, and the stored ones by their released names."""
    golden.compare(f"{case}loss", value, LOSS, "relative")
    parts.net.zero_grad()
    value.backward()
    by_name = {name: p.grad for name, p in family.to_released(dict(parts.net.named_parameters()), parts.config).items()}
    if f"{case}grad_norm" in golden:
        norm = torch.stack([grad.norm() for grad in by_name.values() if grad is not None]).norm()
        golden.compare(f"{case}grad_norm", norm, NORM, "relative")
    for name in golden.tensors:
        if name.startswith(f"{case}grad."):
            golden.compare(name, by_name[name.removeprefix(f"{case}grad.")], NORM, "relative")
