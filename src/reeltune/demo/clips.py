"""Small clips worth looking at: bold figures on curved paths over painted landscapes, each with its outline clip.

A scene is a pure function of its seed. Its control clip is the outline of the moving figures, drawn from the same
geometry, white on black.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from reeltune.core.rng import dice
from reeltune.core.types import Kind
from reeltune.data.media import write_clip

Point = tuple[float, float]

COLOURS = {
    "red": (222, 48, 48),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "white": (245, 245, 240),
    "pink": (245, 120, 175),
    "purple": (140, 70, 190),
    "black": (30, 30, 36),
}
BACKGROUNDS = {  # name -> (top colour, bottom colour, ground colour)
    "green hills under a blue sky": ((90, 160, 235), (190, 220, 250), (70, 150, 70)),
    "a calm sea": ((150, 205, 240), (215, 235, 245), (25, 90, 150)),
    "a desert at sunset": ((110, 60, 130), (250, 160, 90), (205, 150, 85)),
    "a starry night": ((12, 14, 40), (45, 45, 95), (22, 38, 46)),
    "a snowy field": ((165, 185, 205), (225, 232, 240), (235, 240, 245)),
}


def _circle(n: int = 36) -> list[Point]:
    return [(math.cos(2 * math.pi * i / n), math.sin(2 * math.pi * i / n)) for i in range(n)]


def _star() -> list[Point]:
    radii = [1.1, 0.48] * 5
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)]


def _fish() -> list[Point]:
    body = [(0.25 + 0.85 * math.cos(a), 0.6 * math.sin(a)) for a in np.linspace(-2.6, 2.6, 24)]
    return [*body, (-1.15, 0.65), (-0.9, 0.0), (-1.15, -0.65)]


def _heart() -> list[Point]:
    turns = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
        )
        for a in turns
    ]


FIGURES: dict[str, list[Point]] = {  # outline in a box of about -1..1, y downward
    "ball": _circle(),
    "star": _star(),
    "fish": _fish(),
    "heart": _heart(),
    "kite": [(0, -1.15), (0.75, -0.2), (0, 1.15), (-0.75, -0.2)],
    "rocket": [(0, -1.2), (0.45, -0.5), (0.45, 0.5), (0.85, 1.0), (-0.85, 1.0), (-0.45, 0.5), (-0.45, -0.5)],
    "boat": [
        (-1.1, 0.35),
        (-0.05, 0.35),
        (-0.05, -1.1),
        (0.85, 0.2),
        (0.05, 0.2),
        (0.05, 0.35),
        (1.1, 0.35),
        (0.7, 0.85),
        (-0.7, 0.85),
    ],
}
PATHS = ("flies across", "bounces over", "circles over", "swings over", "zooms over")


@dataclass(frozen=True)
class Scene:
    """Everything there is to know of a clip before it is drawn."""

    figure: str
    colour: str
    background: str
    path: str
    seed: int

    @property
    def caption(self) -> str:
        article = "An" if self.colour[0] in "aeiou" else "A"
        return f"{article} {self.colour} {self.figure} {self.path} {self.background}."


def vocabulary() -> list[str]:
    """Every word that captions are made of, the full stop apart."""
    phrases = ["A", "An", *COLOURS, *FIGURES, *PATHS, *BACKGROUNDS]
    return sorted({word for phrase in phrases for word in phrase.split()})


def scene(seed: int) -> Scene:
    choose = dice(seed, "scene")
    background = choose.choice(list(BACKGROUNDS))
    colours = [
        c
        for c in COLOURS
        if not (c == "black" and "night" in background) and not (c == "white" and "snow" in background)
    ]
    return Scene(choose.choice(list(FIGURES)), choose.choice(colours), background, choose.choice(PATHS), seed)


def draw_scene(plan: Scene, frames: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(clip, control), each uint8 F H W C. Drawn three times as large and reduced, so that edges are smooth."""
    scale = 3
    choose = dice(plan.seed, "motion")
    backdrop = _backdrop(plan, height * scale, width * scale)
    place = _path(plan.path, choose)
    size = choose.uniform(0.19, 0.27) * min(height, width) * scale
    clip, control = [], []
    for t in np.linspace(0, 1, frames):
        x, y, grow, turn = place(float(t))
        corners = [
            (
                x * width * scale + size * grow * (px * math.cos(turn) - py * math.sin(turn)),
                y * height * scale + size * grow * (px * math.sin(turn) + py * math.cos(turn)),
            )
            for px, py in FIGURES[plan.figure]
        ]
        picture = backdrop.copy()
        pen = ImageDraw.Draw(picture)
        colour = COLOURS[plan.colour]
        pen.polygon(corners, fill=colour)
        pen.line([*corners, corners[0]], fill=tuple(c // 3 for c in colour), width=scale, joint="curve")
        outline = Image.new("RGB", picture.size)
        ImageDraw.Draw(outline).line([*corners, corners[0]], fill="white", width=2 * scale, joint="curve")
        clip.append(np.asarray(picture.resize((width, height), Image.Resampling.BOX)))
        control.append(np.asarray(outline.resize((width, height), Image.Resampling.BOX)))
    return np.stack(clip), np.stack(control)


def _path(name: str, choose: random.Random) -> Callable[[float], tuple[float, float, float, float]]:
    """t in [0, 1] -> (x, y, growth, turn in radians); x and y are shares of the picture."""
    way, lift, turn = choose.choice((-1, 1)), choose.uniform(0.3, 0.6), choose.uniform(-0.3, 0.3)
    start, swing = choose.uniform(0, 2 * math.pi), choose.uniform(0.1, 0.2)
    if name == "flies across":
        return lambda t: (0.5 + way * 0.55 * (t - 0.5), lift - swing * math.sin(math.pi * t), 1, turn)
    if name == "bounces over":
        return lambda t: (0.5 + way * 0.4 * (t - 0.5), 0.7 - 0.38 * abs(math.sin(math.pi * t + start)), 1, turn)
    if name == "circles over":
        return lambda t: (
            0.5 + 0.24 * math.cos(start + way * 3.2 * t),
            0.5 + 0.24 * math.sin(start + way * 3.2 * t),
            1,
            turn + 0.8 * way * t,
        )
    if name == "swings over":
        return lambda t: (
            0.5 + 0.28 * math.sin(start + 3.5 * t),
            lift + 0.08 * math.cos(start + 3.5 * t),
            1,
            turn - 0.6 * math.sin(start + 3.5 * t),
        )
    first, last = (0.6, 1.5) if way > 0 else (1.5, 0.6)
    return lambda t: (0.5 + swing * (t - 0.5) * way, 0.5, first + (last - first) * t, turn)


def _backdrop(plan: Scene, height: int, width: int) -> Image.Image:
    top, bottom, ground = (np.array(c, dtype=float) for c in BACKGROUNDS[plan.background])
    choose = dice(plan.seed, "backdrop")
    rows = np.linspace(0, 1, height)[:, None, None]
    picture = Image.fromarray(np.broadcast_to(top + (bottom - top) * rows, (height, width, 3)).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    horizon = choose.uniform(0.68, 0.8) * height
    if "night" in plan.background:
        for _ in range(10):
            x, y, r = choose.uniform(0, width), choose.uniform(0, horizon), choose.uniform(2, 4)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=(235, 235, 210))
    wave, phase = (0.0 if "sea" in plan.background else choose.uniform(0.02, 0.06)), choose.uniform(0, 6)
    xs = np.linspace(0, width, 40)
    ridge = [(float(x), horizon + wave * height * math.sin(phase + 2 * math.pi * x / width)) for x in xs]
    pen.polygon([(0, height), *ridge, (width, height)], fill=tuple(int(c) for c in ground))
    return picture


# ---- the data set

FRAMES, SIDE, FPS = 17, 80, 8.0  # of a clip; pixels; frames per second


def write_data_set(folder: Path, *, clips: int, stills: int, held_out: int) -> tuple[Path, Path]:
    """Clips and stills with their control files, in the form of the guides. Returns the metadata of both parts.

    The held-out clips are scenes of their own. Paths in the metadata are relative to `folder`.
    """
    for name in ("train", "control"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    entries = [_write_entry(folder, seed, "image" if seed >= clips else "video") for seed in range(clips + stills)]
    apart = [_write_entry(folder, HELD_OUT_SEED + i, "video") for i in range(held_out)]
    written = []
    for name, rows in (("metadata_control.json", entries), ("metadata_held_out.json", apart)):
        (folder / name).write_text(json.dumps(rows, indent=2) + "\n")
        written.append(folder / name)
    return written[0], written[1]


HELD_OUT_SEED = 100_000


def _write_entry(folder: Path, seed: int, kind: Kind) -> dict[str, str]:
    plan = scene(seed)
    files = []
    for place, frames in zip(("train", "control"), draw_scene(plan, FRAMES, SIDE, SIDE), strict=True):
        if kind == "video":
            files.append(f"{place}/{seed:06d}.mp4")
            write_clip(folder / files[-1], frames, FPS)
        else:
            files.append(f"{place}/{seed:06d}.png")
            Image.fromarray(frames[seed % FRAMES]).save(folder / files[-1])
    return {"file_path": files[0], "control_file_path": files[1], "text": plan.caption, "type": kind}
