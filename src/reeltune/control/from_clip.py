"""Controls of single clips, as `reeltune control` makes them, beside what is made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reeltune.control.kind import Detector, Kind, digest_of
from reeltune.control.kinds import kind_named
from reeltune.control.records import FORMAT
from reeltune.control.source import source_of
from reeltune.control.writing import ending_of, make_control
from reeltune.core.errors import refuse
from reeltune.core.types import Kind as MediaKind
from reeltune.data.findings import MediaError, content_of, require_file
from reeltune.data.pictures import is_picture
from reeltune.families.tensor_files import notice


@dataclass(frozen=True)
class Drawn:
    """A control, and what it was made from."""

    path: Path
    clip: str
    kind: str
    detector: str  # digest

    @property
    def told(self) -> dict[str, str]:
        """What the .json of a preview says of its control."""
        return {"control_from": self.clip, "control_kind": self.kind, "control_detector": self.detector}


def draw_controls(name: str, opened: Detector, clips: Sequence[str], folder: Path) -> list[Drawn]:
    """folder/STEM-KEY.mp4, or as the kind's files end, of each clip or picture; what is there is not made again.

    Raises UserError that names every clip that cannot be read or is no good for this kind.
    """
    kind = kind_named(name)
    made, problems = [], []
    for clip in clips:
        try:
            made.append(Drawn(_draw(kind, opened, clip, folder), clip, name, opened.digest))
        except MediaError as error:
            problems.append(f"{clip} {error}; give another clip to draw a control of kind {name} from")
    refuse("validation_control_from", problems)
    return made


def _draw(kind: Kind, detector: Detector, clip: str, folder: Path) -> Path:
    require_file(clip)
    media: MediaKind = "image" if is_picture(clip) else "video"
    key = digest_of(kind.name, [FORMAT, detector.digest, content_of(clip)])[:12]
    control = folder / f"{Path(clip).stem}-{key}{ending_of(kind.form, media)}"
    if control.is_file():
        return control
    quality = make_control(detector, kind.form, Path(clip), media, source_of(Path(clip), media), control)
    if quality.reason:
        raise MediaError(quality.reason)
    if quality.score < kind.least_score:
        least = f"below {kind.least_score:g} reeltune control leaves a clip out"
        notice(f"{clip}: its control of kind {kind.name} scores {quality.score:.2f}; {least}")
    return control
