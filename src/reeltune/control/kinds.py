"""Every kind of control that can be made. What a kind needs is imported when its detector is opened.  (no torch)"""

from __future__ import annotations

import difflib
from pathlib import Path

from reeltune.control.kind import Detector, Kind, Settings
from reeltune.core.errors import UserError


def _canny(detector: Path | None, settings: Settings) -> Detector:
    from reeltune.control.canny import open_canny

    return open_canny(settings)


def _depth(detector: Path | None, settings: Settings) -> Detector:
    from reeltune.control.depth import open_depth

    return open_depth(detector, settings)


def _hed(detector: Path | None, settings: Settings) -> Detector:
    from reeltune.control.hed import open_hed

    return open_hed(detector, settings)


def _mlsd(detector: Path | None, settings: Settings) -> Detector:
    from reeltune.control.mlsd import open_mlsd

    return open_mlsd(detector, settings)


def _pose(detector: Path | None, settings: Settings) -> Detector:
    from reeltune.control.pose import open_pose

    return open_pose(detector, settings)


def _camera(detector: Path | None, settings: Settings) -> Detector:
    from reeltune.control.camera_path import open_camera

    return open_camera(settings)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("canny", "pictures", "edges, white on black; needs no files", "", 0.02, _canny),
        Kind(
            "depth",
            "pictures",
            "near is white, far is black, on one scale for the clip",
            "a folder of Depth Anything or ZoeDepth in transformers' form (config.json, model.safetensors)",
            0.05,
            _depth,
        ),
        Kind(
            "pose",
            "keypoints",
            "people's key points, drawn as DWPose draws them at the size that is trained",
            "a folder with DWPose's two files, yolox_l.onnx and dw-ll_ucoco_384.onnx, or with RT-DETR and ViTPose in "
            "transformers' form, a folder each",
            0.5,
            _pose,
        ),
        Kind("hed", "pictures", "soft edges, white on black, by HED", "the file ControlNetHED.pth", 0.02, _hed),
        Kind(
            "mlsd",
            "pictures",
            "straight lines, white on black, by M-LSD",
            "the file mlsd_large_512_fp32.pth",
            0.1,
            _mlsd,
        ),
        Kind(
            "camera",
            "camera",
            "the camera's path, by structure from motion; needs pycolmap, no files",
            "",
            0.0,
            _camera,
        ),
    )
}


def open_for_previews(name: str, detector: str | None, device: str) -> Detector:
    """The detector that a recipe's control_kind and control_detector name. Raises UserError."""
    kind = kind_named(name)
    if detector is not None and not kind.needs:
        raise UserError(
            "recipe", f"control_detector is {detector!r}, and control_kind {name} needs no files; leave it out"
        )
    if detector is None and kind.needs:
        raise UserError(
            "recipe", f"control_kind is {name} and control_detector is left out; it needs {kind.needs}; give it"
        )
    return kind.open(None if detector is None else Path(detector), Settings(device=device))


def kind_named(name: str) -> Kind:
    """Raises UserError that says which there are."""
    if name in KINDS:
        return KINDS[name]
    near = difflib.get_close_matches(name, KINDS, 1)
    hint = f": is {near[0]} meant?" if near else ""
    raise UserError("kind", f"{name!r} is no kind of control{hint}; there are {', '.join(KINDS)}")
