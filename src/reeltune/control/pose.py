"""The kind `pose`: people's key points, of every frame, in the form that is drawn when it is read.  (no torch)"""

from __future__ import annotations

from pathlib import Path

from reeltune.control.kind import Detector, Put, Quality, Settings, Source
from reeltune.control.kinds import KINDS
from reeltune.control.pose_finder import PoseFinder
from reeltune.control.pose_onnx import PEOPLE_FILE, POSE_FILE, open_onnx
from reeltune.control.pose_quality import quality_of
from reeltune.core.errors import UserError
from reeltune.data.keypoints import Keypoints

NEEDS = KINDS["pose"].needs


def open_pose(folder: Path | None, settings: Settings) -> Detector:
    """The detector of poses: DWPose's networks where their files are there, else RT-DETR and ViTPose. Raises
    UserError."""
    finder = _finder(folder, settings.device)

    def detect(source: Source, put: Put) -> Quality:
        """People are held for all frames, about 4 kB each; frames are not."""
        keypoints = Keypoints.of(
            map(finder.find, source.frames()),
            source.times_s,
            layout=finder.layout,
            height=source.height,
            width=source.width,
            detector=finder.digest,
        )
        quality = quality_of(keypoints)
        if not quality.reason:
            put(keypoints)
        return quality

    return Detector(finder.digest, detect)


def _finder(folder: Path | None, device: str) -> PoseFinder:
    if folder is None:
        raise UserError("detector", f"poses need {NEEDS}; give that folder")
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "is not there"
        raise UserError("detector", f"{folder} {state}; poses need {NEEDS}")
    if any((folder / name).exists() for name in (PEOPLE_FILE, POSE_FILE)):
        return open_onnx(folder, device)
    if any(folder.glob("*/config.json")):
        from reeltune.control.pose_vit import open_vit

        return open_vit(folder, device)
    raise UserError("detector", f"{folder} has none of the files that poses need: {NEEDS}")
