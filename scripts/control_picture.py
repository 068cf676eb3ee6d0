"""Draws controls beside the clips they are made of: python scripts/control_picture.py docs/control.png

Above, clips of the demo and of a room that tests walk through; below, their edges, and the camera's path from above.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from reeltune.control.camera_path import Path3D, poses_of
from reeltune.control.camera_picture import path_picture
from reeltune.control.canny import open_canny
from reeltune.control.kind import Settings, Source, pictures
from reeltune.demo.clips import draw_scene, scene
from tests.unit.room import view, walk

HEIGHT, WIDTH, GAP = 180, 264, 6  # pixels
FRAMES = 16
FOCAL_PX = 200.0
PAGE = (251, 250, 247)  # as in style.html
SCENES = (3, 8)  # seeds


def room_path() -> np.ndarray:
    """The path that the tests find again, from above: uint8 H W 3."""
    centres, turns = walk(FRAMES)
    to_camera = np.concatenate([turns, -np.einsum("fij,fj->fi", turns, centres)[..., None]], 2)
    source = Source(HEIGHT, WIDTH, np.arange(FRAMES) / 8, lambda: iter(()))
    found = Path3D(np.arange(FRAMES), to_camera, FOCAL_PX, 0.2, 1000, 1.25)
    poses = poses_of(found, np.arange(FRAMES), source, (HEIGHT, WIDTH))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "path.txt")
        file.write_text("\n" + "\n".join(" ".join(map(str, row)) for row in poses.tolist()))
        square = path_picture(file, HEIGHT)
    wide = np.full((HEIGHT, WIDTH, 3), PAGE, np.uint8)
    left = (WIDTH - HEIGHT) // 2
    wide[:, left : left + HEIGHT] = square
    return wide


def main(file: Path) -> None:
    detector = open_canny(Settings())
    above, below = [], []
    for seed in SCENES:
        clip, _ = draw_scene(scene(seed), FRAMES, HEIGHT, WIDTH)
        above.append(clip[FRAMES // 2])
        below.append(pictures(detector, Source.of(clip, 8))[FRAMES // 2])
    centre, turn = (part[FRAMES // 2] for part in walk(FRAMES))
    above.append(view(centre, turn, FOCAL_PX, HEIGHT, WIDTH))
    below.append(room_path())
    sheet = Image.new("RGB", (GAP + (WIDTH + GAP) * len(above), 3 * GAP + 2 * HEIGHT), PAGE)
    for column, (clip, control) in enumerate(zip(above, below, strict=True)):
        for row, picture in enumerate((clip, control)):
            sheet.paste(Image.fromarray(picture), (GAP + (WIDTH + GAP) * column, GAP + (HEIGHT + GAP) * row))
    sheet.quantize(255).save(file, "PNG", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
