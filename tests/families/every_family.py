"""Every family and mode as a tiny checkpoint, for the tests from which none is excused.

The checkpoints are those of the goldens, told apart by `families.find`, and untrained networks of other channels put
in their place; those of families that have no goldens are our own. The toy needs no files.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from reeltune import families
from reeltune.demo.main import FAMILIES as SHOWN
from reeltune.families import configs
from reeltune.families.cogvideox_fun import family as cogvideox
from reeltune.families.easyanimate import family as easyanimate
from reeltune.families.hunyuan_video import family as hunyuan
from reeltune.families.spec import Family
from reeltune.families.toy.family import FAMILY as TOY
from reeltune.families.wan_fun import family as wan
from tests.families.tiny_wan import tiny_checkpoint

OWN = {"easyanimate": easyanimate.CONTROL_REF, "hunyuan_video": hunyuan.T2V, "cogvideox_fun": cogvideox.INP}
OWN_WAN = (
    *(wan.BASE, wan.CONTROL_V1_1, wan.CAMERA, wan.INP, wan.CONTROL_T2V, wan.T2V),
    *(wan.A14B_T2V, wan.A14B_INP, wan.A14B_CONTROL, wan.A14B_CAMERA, wan.TI2V_5B, wan.INP_5B, wan.CONTROL_5B),
)


OF_WHOLE_RUNS = (wan.T2V, wan.A14B_T2V, wan.A14B_INP, wan.INP_5B)  # in one mode: beside others, nothing else is new
HIGH = (wan.A14B_INP.name, wan.A14B_CAMERA.name)  # of which the tests train the high expert; of others the low one


@dataclass(frozen=True)
class Pair:
    """A checkpoint and one of its modes."""

    family: str
    checkpoint: str
    mode: str
    lay_out: Callable[[Path], Path]
    """An empty folder -> the checkpoint's: the same one, filled, or where the files lie already."""
    network: str = ""
    """Of a family, one for all networks that differ in the channels that they take in alone."""
    settings: tuple[tuple[str, str], ...] = ()
    """What a recipe must say beside the mode."""

    @property
    def asked(self) -> dict[str, str]:
        """Of a recipe."""
        return {"train_mode": self.mode, **dict(self.settings)}


@cache  # the same objects for all tests, so that pytest keeps those of a Pair together
def pairs(goldens: Path, *, modes: bool = True) -> list[Any]:
    """Parameters for pytest: every Pair, or without `modes` one a checkpoint."""
    found: list[Any] = [_pairs(TOY, "toy", TOY.modes, SHOWN["toy"].write)]
    folders = [path.parent for path in goldens.glob("multi/*/model_index.json")]
    folders += goldens.glob("wan_fun/checkpoints/*/")
    variants = set()
    for folder in sorted(folders):
        family = families.find(folder)
        variants.add(family.name)
        config = configs.read_config(folder / "transformer")
        found.append(_pairs(family, folder.name, family.modes, partial(_there, folder), _network(config)))
        for mode, changes in others(family, config):
            other = partial(derive, folder, changes=changes)
            found.append(_pairs(family, f"{folder.name}-other", (mode,), other, _network(config | changes)))
    covered = {one[0].values[0].family for one in found if one}
    for family in [family for family in OWN_WAN if family.name not in variants]:
        variant, shown = family.name.removeprefix("wan_fun/"), family.modes
        if family in OF_WHOLE_RUNS:
            shown = family.modes[:1] if modes else ()
        found.append(_pairs(family, variant, shown, partial(tiny_checkpoint, variant=variant), variant))
    for name, family in OWN.items():
        if name not in covered:
            found.append(_pairs(family, name, family.modes, SHOWN[name].write, _network({})))
            for mode, changes in others(family, {}):
                other = partial(_derive_own, name, changes)
                found.append(_pairs(family, f"{name}-other", (mode,), other, _network(changes)))
    return [pair for one in found for pair in (one if modes else one[:1])]


def one_each(goldens: Path) -> list[Any]:
    """The first Pair of each family, for what takes long; all but the toy marked slow."""
    first = {pair.values[0].family: pair for pair in reversed(pairs(goldens, modes=False))}
    return [
        pytest.param(*pair.values, id=name, marks=() if name == "toy" else pytest.mark.slow)
        for name, pair in sorted(first.items())
    ]


def _network(config: dict[str, Any]) -> str:
    return repr(sorted((key, value) for key, value in config.items() if key not in ("in_channels", "in_dim")))


def _pairs(
    family: Family, checkpoint: str, modes: tuple[str, ...], lay_out: Callable[[Path], Path], network: str = ""
) -> list[Any]:
    name = family.name.partition("/")[0]
    expert = "high" if family.name in HIGH else "low"
    settings = () if family.boundary is None else (("expert", expert),)
    return [
        pytest.param(Pair(name, checkpoint, mode, lay_out, network, settings), id=f"{checkpoint}-{mode}")
        for mode in modes
    ]


def _there(source: Path, folder: Path) -> Path:
    return source


def _derive_own(name: str, changes: dict[str, Any], folder: Path) -> Path:
    (folder / "own").mkdir()
    (folder / "other").mkdir()
    return derive(SHOWN[name].write(folder / "own"), folder / "other", changes=changes)


def derive(source: Path, folder: Path, *, changes: dict[str, Any]) -> Path:
    """The checkpoint `source` with an untrained transformer whose config.json differs by `changes`."""
    for part in source.iterdir():
        if part.name != "transformer":
            (folder / part.name).symlink_to(part)
    config = json.loads((source / "transformer/config.json").read_text()) | changes
    kind = getattr(diffusers, config["_class_name"])
    torch.manual_seed(0)
    net = kind(**configs.arguments_of(kind, config))
    families.find(source).save(folder / "transformer", net.state_dict(), config)
    return folder


def others(family: Family, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(mode, changes) of the networks that were released beside this one."""
    C = config.get("out_channels", 16)
    if family.name.startswith("easyanimate"):
        extra = {"control_ref": 2 * C, "control": C, "control_ref_camera": 6 + C, "inpaint": 1 + C, "normal": 0}
        of_v5 = "control", "inpaint", "normal"
        released = of_v5 if "text_t5" in family.caption else extra
        yield from ((mode, {"in_channels": C + extra[mode]}) for mode in released if mode not in family.modes)
    elif family.name == "hunyuan_video/i2v":
        yield "i2v", {"image_condition_type": "latent_concat", "in_channels": 2 * C + 1, "guidance_embeds": False}
    elif family.name.startswith("cogvideox_fun") and "normal" not in family.modes:
        yield "normal", {"in_channels": C}
