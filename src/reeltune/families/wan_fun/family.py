"""Wan2.1, Wan2.2 and their Fun models: text, pictures, control, camera control and inpainting to video
(https://huggingface.co/Wan-AI, https://huggingface.co/alibaba-pai)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from reeltune.core.errors import UserError
from reeltune.core.reading import brief
from reeltune.core.types import Geometry, MaskLaw, SizeLaw
from reeltune.diffusion.objective import Flow
from reeltune.families import configs, context, schedule, tokenizers
from reeltune.families.spec import Family, Loading, Parts, TokenLimit
from reeltune.families.tensor_files import notice
from reeltune.families.wan_fun import keys, layout, sizes
from reeltune.families.wan_fun.conditions import (
    MASK_CHANNELS,
    decode,
    denoise,
    describe,
    encode_clips,
    finish,
    kept,
)


def read(folder: Path, family: Family, how: Loading) -> Parts:
    files: layout.Files = family.options["files"]
    net, config = layout.load_transformer(files.transformer, how)
    parts = Parts(net, config=config)
    parts.extras["network"] = dict(net.config)
    loaders, channels = parts.loaders, net.config["out_channels"]
    loaders["vae"] = partial(layout.load_vae, files.vae, channels, how.frozen_dtype, how.fake)
    loaders["text"] = partial(layout.load_text, files.text, how.frozen_dtype, how.fake)
    if files.image is not None:
        loaders["image"] = partial(layout.load_image, files.image, how.frozen_dtype, how.fake)
    parts.extras["tokenizer"] = tokenizers.load_tokenizer(files.tokenizer)
    return parts


def split(net: nn.Module, mesh: DeviceMesh) -> None:
    """Where diffusers shards Wan's tokens, but for their times, which go through a place of their own."""
    from diffusers import WanTransformer3DModel

    plan = WanTransformer3DModel._cp_plan
    times = {0: replace(plan["rope"][0], expected_dims=2)}  # where they are B L
    context.split(net, mesh, {name: how for name, how in plan.items() if name} | {"token_times": times})


# ---- the family and its variants

DROP = {"control": 0.1, "ref": 0.1, "image": 0.1}  # measured on the reference, 2026-11
FIRST_FRAME_GIVEN = MaskLaw(clip={"after_first": 1.0}, picture={"all": 1.0})  # as Wan2.1 is trained image to video
PLAIN_SIZES = SizeLaw(first_weight=0.75, nearest_rung=None)  # of the scripts of Wan's own models, not of Fun's
BASE = Family(
    name="wan_fun/control_v1.0",
    source="https://huggingface.co/alibaba-pai/Wan2.1-Fun-14B-Control",
    geometry=Geometry(time_stride=4, space_stride=8, patch=2, channels=16),
    objective=Flow(shift=5.0, steps=1000),
    modes=("control_ref", "control"),
    needs={"control_ref": ("control", "ref"), "control": ("control",)},
    drop=DROP,
    blocks=("WanTransformerBlock",),
    native_fps=16.0,  # sample_fps in https://github.com/Wan-Video/Wan2.1/blob/main/wan/configs
    size_law=SizeLaw(),
    read=read,
    encode_clips=encode_clips,
    describe=describe,
    keep=kept,
    denoise=denoise,
    split=split,
    decode=decode,
    to_released=keys.to_released,
    from_released=keys.from_released,
    save=layout.save_transformer,
)
CONTROL_V1_1 = replace(
    BASE,
    name="wan_fun/control_v1.1",
    source="https://huggingface.co/alibaba-pai/Wan2.1-Fun-V1.1-14B-Control",
    drop=DROP | {"full_ref": 0.1},
)
CAMERA = replace(
    BASE,
    name="wan_fun/control_camera",
    source="https://huggingface.co/alibaba-pai/Wan2.1-Fun-V1.1-14B-Control-Camera",
    modes=("control_ref_camera",),
    needs={"control_ref_camera": ("camera", "ref")},
    drop={"ref": 0.1, "image": 0.1},
)
INP = replace(
    BASE,
    name="wan_fun/inp",
    source="https://huggingface.co/alibaba-pai/Wan2.1-Fun-14B-InP and, of the same tensors, "
    "https://huggingface.co/Wan-AI/Wan2.1-I2V-14B-480P",
    modes=("inpaint", "i2v"),
    needs={"inpaint": ("mask",), "i2v": ("mask", "ref")},
    drop={"image": 0.1, "inpaint": 0.9},  # inpaint: of samples where everything is to be generated
    masks={"i2v": FIRST_FRAME_GIVEN},
    size_law=SizeLaw(nearest_rung=None),
)
CONTROL_T2V = replace(
    BASE,
    name="wan_fun/control_t2v",
    source="the released control models' channels on a text-to-video network",
    modes=("control",),
    needs={"control": ("control",)},
    drop={"control": 0.1},
)
T2V = replace(
    BASE,
    name="wan_fun/t2v",
    source="https://huggingface.co/Wan-AI/Wan2.1-T2V-14B",
    modes=("normal",),
    needs={"normal": ()},
    drop={},
    size_law=PLAIN_SIZES,
)
A14B_T2V = replace(
    T2V,
    name="wan_fun/2.2_a14b_t2v",
    source="https://huggingface.co/Wan-AI/Wan2.2-T2V-A14B",
    objective=Flow(shift=12.0, steps=1000),  # this and the boundary: wan/configs of https://github.com/Wan-Video/Wan2.2
    boundary=0.875,
)
A14B_INP = replace(
    INP,
    name="wan_fun/2.2_a14b_inp",
    source="https://huggingface.co/alibaba-pai/Wan2.2-Fun-A14B-InP and, of the same tensors, "
    "https://huggingface.co/Wan-AI/Wan2.2-I2V-A14B",
    drop={"inpaint": 0.9},
    boundary=0.9,
)
A14B_CONTROL = replace(
    BASE,
    name="wan_fun/2.2_a14b_control",
    source="https://huggingface.co/alibaba-pai/Wan2.2-Fun-A14B-Control",
    modes=("control_ref",),
    needs={"control_ref": ("control", "ref", "mask")},
    drop={"control": 0.1, "full_ref": 0.1, "inpaint": 0.9},
    boundary=0.9,
)
A14B_CAMERA = replace(
    A14B_CONTROL,
    name="wan_fun/2.2_a14b_control_camera",
    source="https://huggingface.co/alibaba-pai/Wan2.2-Fun-A14B-Control-Camera",
    modes=("control_ref_camera",),
    needs={"control_ref_camera": ("camera", "ref", "mask")},
    drop={"inpaint": 0.9},
)
OF_48_CHANNELS = {
    "geometry": Geometry(time_stride=4, space_stride=16, patch=2, channels=sizes.CHANNELS_2_2),
    "native_fps": 24.0,  # sample_fps in https://github.com/Wan-Video/Wan2.2/blob/main/wan/configs/wan_ti2v_5B.py
    "finish": finish,
    "boundary": None,
}
TI2V_5B = replace(
    T2V,
    name="wan_fun/2.2_5b_ti2v",
    source="https://huggingface.co/Wan-AI/Wan2.2-TI2V-5B",
    modes=("ti2v", "normal"),
    needs={"ti2v": ("mask",), "normal": ()},
    drop={"first_frame": 0.5},  # measured on the reference, 2026-11
    masks={"ti2v": FIRST_FRAME_GIVEN},
    **OF_48_CHANNELS,
)
INP_5B = replace(
    A14B_INP,
    name="wan_fun/2.2_5b_inp",
    source="https://huggingface.co/alibaba-pai/Wan2.2-Fun-5B-InP",
    **OF_48_CHANNELS,
)
CONTROL_5B = replace(
    A14B_CONTROL,
    name="wan_fun/2.2_5b_control",
    source="https://huggingface.co/alibaba-pai/Wan2.2-Fun-5B-Control",
    **OF_48_CHANNELS,
)


NOT_YET = {  # a tensor that only this model has
    "condition_embedder.image_embedder.pos_embed": "Wan2.1-FLF2V",
    "img_emb.emb_pos": "Wan2.1-FLF2V",
    "vace_patch_embedding.weight": "Wan2.1-VACE",
    "casual_audio_encoder.weights": "Wan2.2-S2V",
}
SUPPORTED = "supported are the models of Wan2.1, Wan2.2 and their Fun models"


def variant(network: dict[str, Any], where: str, *, experts: bool = False) -> Family:
    """Which variant a network of these arguments is, or each of two. Raises UserError naming what was found and what
    is supported."""
    channels = network["out_channels"]
    extra = network["in_channels"] - channels
    found = (extra, network["image_dim"] is not None, network["ref_channels"] > 0, network["camera_channels"] > 0)
    inpaint = channels + MASK_CHANNELS
    supported = {
        (0, False, False, False): T2V,
        (2 * channels, True, False, False): BASE,
        (2 * channels, True, True, False): CONTROL_V1_1,
        (channels, True, False, True): CAMERA,
        (inpaint, True, False, False): INP,
        (channels, False, False, False): CONTROL_T2V,
    }
    of_2_2 = {(0, False, False, False): TI2V_5B, (inpaint, False, False, False): INP_5B}
    of_2_2[(channels + inpaint, False, True, False)] = CONTROL_5B
    of_experts = {
        (0, False, False, False): A14B_T2V,
        (inpaint, False, False, False): A14B_INP,
        (channels + inpaint, False, True, False): A14B_CONTROL,
        (inpaint, False, False, True): A14B_CAMERA,
    }
    if not experts and channels != sizes.CHANNELS_2_2 and found not in supported and found in of_experts:
        raise UserError(
            where,
            f"is one network of two, of {of_experts[found].name}; which of the two its files do not tell: give the "
            f"folder in which it is {' or '.join(layout.EXPERTS.values())}",
        )
    supported = of_experts if experts else of_2_2 if channels == sizes.CHANNELS_2_2 else supported
    if found not in supported:
        raise UserError(
            where,
            f"a Wan network with {_words(*found)}{' (one of two)' if experts else ''}; supported are "
            + "; ".join(f"{family.name}: {_words(*key)}" for key, family in supported.items()),
        )
    return supported[found]


def _words(extra: int, image: bool, ref: bool, camera: bool) -> str:
    parts = [f"{extra} conditioning channels"]
    parts += [
        word for word, there in (("picture features", image), ("ref_conv", ref), ("control_adapter", camera)) if there
    ]
    return ", ".join(parts)


# ---- found in a folder


def find(folder: Path, settings: dict[str, Any]) -> Family | None:
    """The variant in a checkpoint folder, from headers and JSON alone; None if its transformer is no Wan.

    settings: the guides' model yaml, already read. Raises UserError for a Wan that is not supported, or lacks files.
    """
    if not settings:
        layout.refuse_bare_experts(folder)
    places = layout.networks_in(folder, settings)
    networks = {name: _network(path) for name, path in places.items()}
    if not networks or None in networks.values():
        return None
    name, network = next(reversed(networks.items()))
    path, experts = places[name], bool(name)
    if any(other != network for other in networks.values()):
        remedy = "download again the one that is of another model"
        raise UserError(
            str(folder), f"its two networks ({' and '.join(places)} noise) are of different sizes; {remedy}"
        )
    assert network is not None
    family = variant(network, str(path), experts=experts)
    assert isinstance(family.objective, Flow)
    channels = network["out_channels"]
    files = layout.locate(folder, settings, path, channels=channels, with_image=network["image_dim"] is not None)
    _, patch, _ = network["patch_size"]
    family = replace(
        family,
        geometry=replace(family.geometry, patch=patch, channels=channels),
        objective=_schedule(settings.get("scheduler_kwargs") or {}, family.objective),
        options={"files": files},
        frozen_files=files.for_encoding(),
        token_limits=(TokenLimit("the text encoder", files.tokenizer, sizes.TEXT_LENGTH),),
    )
    return _with_experts(family, places, _boundary(folder, settings, family)) if experts else family


def _network(path: Path) -> dict[str, Any] | None:
    """Arguments of the network, or None if it is no Wan."""
    outlines, config = layout.peek_transformer(path)
    if not sizes.is_wan(outlines):
        return None
    if unlike := next((model for name, model in NOT_YET.items() if name in outlines), None):
        raise UserError(str(path), f"a Wan network of {unlike}, which is not supported yet; {SUPPORTED}")
    network = sizes.transformer(outlines, config, str(path))
    sizes.tell_heads(network, str(path))
    return network


def _with_experts(family: Family, places: dict[str, Path], boundary: float) -> Family:
    """The family with each expert as a family of its own: its network, and the noise levels that sampling gives it."""
    files: layout.Files = family.options["files"]
    assert isinstance(family.objective, Flow)
    ranges = dict(zip(layout.EXPERTS, family.objective.parted(boundary), strict=True))
    family = replace(family, boundary=boundary, weights=files.transformer, experts={})
    family.experts.update(
        {
            name: replace(
                family,
                expert=name,
                objective=ranges[name],
                options={"files": replace(files, transformer=path)},
                weights=path,
            )
            for name, path in places.items()
        }
    )
    return family


def _boundary(folder: Path, settings: dict[str, Any], family: Family) -> float:
    """The noise level between experts by config_path, the checkpoint's model_index.json or the variant; says so where
    one of the first two has another than the variant."""
    said = (settings.get("transformer_additional_kwargs") or {}).get("boundary")
    said = configs.read_config(folder, "model_index.json").get("boundary_ratio") if said is None else said
    if said is None:
        assert family.boundary is not None
        return family.boundary
    if type(said) not in (int, float) or not 0 < said < 1:
        raise UserError("config_path", f"boundary is {brief(said)}; expected a noise level between 0 and 1")
    if said != family.boundary:
        notice(
            f"{folder}: its experts meet at noise level {said:g}, as config_path or model_index.json says; those of "
            f"{family.name} were made to meet at {family.boundary:g}"
        )
    return float(said)


def _schedule(said: dict[str, Any], own: Flow) -> Flow:
    said = schedule.checked(said, "config_path: scheduler_kwargs")
    if said.get("use_dynamic_shifting"):
        raise UserError("config_path", "scheduler_kwargs.use_dynamic_shifting is true; only a fixed shift is supported")
    return Flow(shift=float(said.get("shift", own.shift)), steps=said.get("num_train_timesteps", own.steps))
