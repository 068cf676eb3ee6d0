"""The nouns. Read this file first; every other file moves these around.  (no torch at run time)

Shape letters, used as suffixes on tensor names in the whole package:
    B batch    F pixel frames    T latent frames    C channels
    H W pixel height, width      h w latent height, width      L text tokens    D hidden width
Units:
    pixels   RGB; uint8 in 0..255 up to the device, then float in [-1, 1]
    level    noise level in [0, 1]; 0 is clean, 1 is pure noise. Only an Objective knows what a
             network calls it (timestep, sigma, log-snr).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # planning and checking a recipe must not wait for torch
    import torch
    from torch import Tensor

Kind = Literal["image", "video"]


class Shape(NamedTuple):
    """One clip in pixels. An image is a clip of one frame."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Geometry:
    """How a family's VAE and patchifier divide a clip."""

    time_stride: int = 4  # pixel frames per latent frame, after the first
    space_stride: int = 8  # pixels per latent cell, each side
    patch: int = 2  # latent cells per token, each side
    patch_time: int = 1  # latent frames per token
    channels: int = 16  # latent channels
    sides: int = 1  # heights and widths are multiples of so many tokens

    @property
    def multiple(self) -> int:
        """Pixels: legal heights and widths are multiples of this."""
        return self.space_stride * self.patch * self.sides

    def legal_frames(self, frames: int) -> int:
        """The longest legal clip that fits in `frames`: 1 + k * time_stride pixel frames, of which the latent
        frames divide by patch_time (one frame alone is always legal)."""
        latents = (max(frames, 1) - 1) // self.time_stride + 1
        return (max(latents - latents % self.patch_time, 1) - 1) * self.time_stride + 1

    def latent(self, shape: Shape) -> tuple[int, int, int]:
        """(T, h, w) for a legal pixel shape."""
        return (
            (shape.frames - 1) // self.time_stride + 1,
            shape.height // self.space_stride,
            shape.width // self.space_stride,
        )

    def tokens(self, shape: Shape) -> int:
        """Tokens of the clip itself in the transformer (references and text not counted)."""
        T, h, w = self.latent(shape)
        return -(-T // self.patch_time) * (h // self.patch) * (w // self.patch)


@dataclass(frozen=True)
class SizeLaw:
    """How a family's reference draws sizes; same flags, different distributions (measured, 2026-11)."""

    first_weight: float = 0.9  # probability of the largest size of a downsampling list; the rest share equally
    nearest_rung: float | None = 0.5  # probability of the rung nearest token_sample_size; None: all rungs equal


@dataclass(frozen=True)
class MaskLaw:
    """How likely each kind of inpainting mask is; the kinds are the names of `data.masks.KINDS`.

    As they stand, those of VideoX-Fun's training (https://github.com/aigc-apps/VideoX-Fun).
    """

    clip: dict[str, float] = field(
        default_factory=lambda: {
            "block": 0.05,
            "all": 0.2,
            "after_start": 0.2,
            "between_ends": 0.2,
            "block_in_time": 0.05,
            "coin": 0.05,
            "boxes": 0.05,
            "ellipse": 0.1,
            "disc": 0.05,
            "frames": 0.05,
        }
    )
    picture: dict[str, float] = field(default_factory=lambda: {"block": 0.2, "all": 0.7, "ellipse": 0.05, "disc": 0.05})
    spots_on_all_frames: bool = False  # ellipses and discs: on every frame, else on the first alone


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the metadata file, checked and measured.

    Paths are absolute. frames, height, width are the file's own as displayed
    (after rotation, EXIF orientation and pixel aspect). fps is 0.0 for an image.
    """

    entry: int  # 0-based place in the metadata file
    path: str
    text: str
    kind: Kind
    frames: int
    fps: float
    height: int
    width: int
    control_path: str | None = None  # a clip or picture of the same length and aspect
    camera_path: str | None = None  # a pose file (.txt)
    content: int = 0  # of size and both ends of the file: the same for a copy; 0 is unknown
    control_content: int = 0  # the same of control_path or camera_path, of which a row has one at most


class Crop(NamedTuple):
    """Resize the displayed picture to (height, width), then cut `Shape` out at (top, left). All in pixels."""

    height: int
    width: int
    top: int
    left: int


@dataclass(frozen=True, slots=True)
class Draw:
    """Everything random about one sample, decided before any file is opened."""

    record: int  # index into Records
    shape: Shape  # the pixel shape of the whole micro-step
    crop: Crop
    frames: tuple[int, ...]  # which frames of the file, in display order; len == shape.frames
    ref_frame: int  # which of those frames is the reference picture, 0 .. shape.frames - 1
    seed: int  # private to this sample in this epoch: noise and drops come from it
    stratum: tuple[int, int] = (0, 1)  # (i, n): draw the noise level from the i-th of n equal strata
    repeat: bool = False  # drawn only to fill a group
    variant_seed: int | None = None  # of its variant, where a clip has a fixed number of them
    rate: float | None = None  # frames per second, where a clip of uneven rate is read by time from frames[0] on

    @property
    def seen_seed(self) -> int:
        """Seed of all chance that the frozen networks see: masks, and noise on pixels."""
        return self.seed if self.variant_seed is None else self.variant_seed


@dataclass
class Sample:
    """One Draw, read."""

    draw: Draw
    text: str
    pixels_FCHW: Tensor  # uint8; no frames where `encoded` stands for them
    control_FCHW: Tensor | None = None  # uint8
    camera_FCHW: Tensor | None = None  # float32, 6 channels of Pluecker rays
    mask_FHW: Tensor | None = None  # bool, True is to be generated
    keep: dict[str, bool] = field(default_factory=dict)  # condition name -> not dropped
    failures: tuple[tuple[int, str], ...] = ()  # (record, reason) of draws this one stands in for
    encoded: Encoded | None = None  # from the cache, a batch of one


@dataclass
class Batch:
    """Samples of one Shape, stacked. On the CPU pixels are uint8; `to` makes them float in [-1, 1]."""

    draws: list[Draw]
    text: list[str]
    pixels_BFCHW: Tensor
    ref_frame_B: Tensor  # int64
    keep: dict[str, Tensor] = field(default_factory=dict)  # condition name -> bool_B
    control_BFCHW: Tensor | None = None
    camera_BFCHW: Tensor | None = None
    mask_BFHW: Tensor | None = None
    failures: tuple[tuple[int, str], ...] = ()
    encoded: Encoded | None = None  # from the cache; pixels then have no frames, unless they are to be shown

    @property
    def seeds(self) -> list[int]:
        return [draw.seed for draw in self.draws]

    @property
    def seen_seeds(self) -> list[int]:
        """Seeds for `encode`, in modes that need a mask; elsewhere what it makes must not depend on chance."""
        return [draw.seen_seed for draw in self.draws]

    def groups(self, count: int) -> list[Batch]:
        """Batches of so many of its samples, the last of what is left."""

        def cut(tensor: Tensor | None, at: slice) -> Tensor | None:
            return None if tensor is None else tensor[at]

        return [
            replace(
                self,
                draws=self.draws[at],
                text=self.text[at],
                pixels_BFCHW=self.pixels_BFCHW[at],
                ref_frame_B=self.ref_frame_B[at],
                keep={name: keep_B[at] for name, keep_B in self.keep.items()},
                control_BFCHW=cut(self.control_BFCHW, at),
                camera_BFCHW=cut(self.camera_BFCHW, at),
                mask_BFHW=cut(self.mask_BFHW, at),
            )
            for at in (slice(i, i + count) for i in range(0, len(self.text), count))
        ]

    def pin_memory(self) -> Batch:
        """Tensors in page-locked memory, from which a GPU copies while the CPU goes on (DataLoader calls this)."""

        def pinned(x):
            return None if x is None else x.pin_memory()

        return replace(
            self,
            pixels_BFCHW=pinned(self.pixels_BFCHW),
            control_BFCHW=pinned(self.control_BFCHW),
            camera_BFCHW=pinned(self.camera_BFCHW),
            mask_BFHW=pinned(self.mask_BFHW),
            ref_frame_B=pinned(self.ref_frame_B),
            keep={name: pinned(keep_B) for name, keep_B in self.keep.items()},
            encoded=self.encoded and self.encoded.map(lambda tensor: tensor.pin_memory()),
        )

    def to(self, device: torch.device | str) -> Batch:
        """Tensors moved; 8-bit pixels become float32 in [-1, 1] (value / 255, minus 0.5, over 0.5, as released)."""

        def pixels(x):
            if x is None:
                return None
            found = x.to(device, non_blocking=True).float()
            most = found.new_full((), 255.0)  # a plain number a GPU does not divide by: it multiplies with 1 / 255
            return found.div_(most).sub_(0.5).div_(0.5)

        def plain(x):
            return None if x is None else x.to(device, non_blocking=True)

        return replace(
            self,
            pixels_BFCHW=pixels(self.pixels_BFCHW),
            control_BFCHW=pixels(self.control_BFCHW),
            camera_BFCHW=plain(self.camera_BFCHW),
            mask_BFHW=plain(self.mask_BFHW),
            ref_frame_B=plain(self.ref_frame_B),
            keep={name: plain(keep_B) for name, keep_B in self.keep.items()},
            encoded=self.encoded and self.encoded.map(lambda tensor: tensor.to(device, non_blocking=True)),
        )


@dataclass
class Posterior:
    """What a VAE says of a clip: a normal distribution per latent cell, already in the network's units.

    Wan normalises the mean alone, so the sample is mean + exp(logvar / 2) * eps with the raw logvar
    (as released). Families whose latents are scaled as a whole put 2 log(scale) into logvar.
    """

    mean: Tensor  # B C T h w
    logvar: Tensor  # the same shape


@dataclass
class Described:
    """What the text encoders make of captions: the part of an Encoded that is the same however the clip is cut."""

    cond: dict[str, Tensor]
    null: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Encoded:
    """What the frozen networks make of a Batch; also the unit of the on-disk cache.

    It holds distributions, not samples: the draw from them belongs to the training step, so that a
    run from the cache sees the noise that a live run sees.
    """

    x0: Posterior
    cond: dict[str, Tensor | Posterior]  # handed to Family.denoise once drawn and dropped
    keep: dict[str, Tensor] = field(default_factory=dict)  # condition name -> bool_B; False: blanked by the null value
    loss_mask: Tensor | None = None  # broadcasts against x0; 0 leaves a cell out of the loss
    null: dict[str, Tensor] = field(default_factory=dict)  # blank values that depend on the sample, before Parts.null

    def tensors(self) -> dict[str, Tensor]:
        """All of it in one table: x0.mean, cond.text, cond.control.logvar, keep.ref, null.text, loss_mask."""
        flat = {}
        for name, value in [("x0", self.x0), *((f"cond.{name}", value) for name, value in self.cond.items())]:
            parts = {".mean": value.mean, ".logvar": value.logvar} if isinstance(value, Posterior) else {"": value}
            flat |= {name + part: tensor for part, tensor in parts.items()}
        flat |= {f"keep.{name}": keep_B for name, keep_B in self.keep.items()}
        flat |= {f"null.{name}": value for name, value in self.null.items()}
        return flat if self.loss_mask is None else flat | {"loss_mask": self.loss_mask}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Encoded:
        """The Encoded of a table that `tensors` made."""

        def under(part: str) -> dict[str, Tensor]:
            return {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}

        cond: dict[str, Tensor | Posterior] = {}
        for name, value in under("cond.").items():
            stem, _, part = name.partition(".")
            if part != "logvar":
                cond[stem] = Posterior(value, tensors[f"cond.{stem}.logvar"]) if part else value
        x0 = Posterior(tensors["x0.mean"], tensors["x0.logvar"])
        return cls(x0, cond, under("keep."), tensors.get("loss_mask"), under("null."))

    def map(self, change: Callable[[Tensor], Tensor]) -> Encoded:
        return Encoded.of({name: change(tensor) for name, tensor in self.tensors().items()})


@dataclass
class Progress:
    """All the loop must remember beside weights and optimizer."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    cursor: int = 0  # micro-steps taken from this epoch's plan
    group: int = 0  # samples of a micro-step over all ranks; another number would be another plan
    plan_version: int = 1  # 1: groups run on over the epochs; 0: each epoch fills up its own, as before 2026-11-26
    attention: str = ""  # the kernel that was the soonest when it was tried; "": none was tried
