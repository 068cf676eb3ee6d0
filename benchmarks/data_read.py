"""Reading clips against a floor: bare PyAV decode plus one resize of the same frames, nothing kept.

49 frames at stride 2 of 720p H.264 clips, to 256 and 512 pixels. Per core: one process, its CPU time. Altogether: one
process a core, by the clock. Ours also cuts, stacks and hands over an array; it skips what no wanted frame refers to.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from reeltune.core.types import Crop, Shape
from reeltune.data.clip_writer import clip_written, frame_rate
from reeltune.data.media import read_frames

CLIPS, CLIP_FRAMES, HEIGHT, WIDTH = 4, 120, 720, 1280
RATE = frame_rate(24)
ENCODING = {"crf": "23", "preset": "medium"}  # x264's defaults, as most footage has
FRAMES = range(0, 98, 2)  # 49 at stride 2
ROUNDS = 3
FILTER = Interpolation.LANCZOS | Interpolation.ACCURATE_RND


def make(path: Path, seed: int) -> None:
    """A textured picture under a moving window, with a moving grating: motion and detail, as footage has."""
    generator = np.random.RandomState(seed)
    margin = 2 * CLIP_FRAMES
    coarse = generator.randint(0, 256, ((HEIGHT + margin) // 16, (WIDTH + margin) // 16, 3)).astype(np.uint8)
    scene = np.kron(coarse, np.ones((16, 16, 1), np.uint8))
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    with clip_written(path, HEIGHT, WIDTH, RATE, 1 / RATE, ENCODING) as clip:
        for number in range(CLIP_FRAMES):
            grating = (64 + 60 * np.sin((x + (1 + seed) * y) / 30 + number / 4))[..., None].astype(np.uint8)
            clip.add(scene[number : number + HEIGHT, number : number + WIDTH] // 2 + grating, number)


def geometry(size: int) -> tuple[Crop, Shape]:
    """Cover a square of `size` and cut its middle."""
    width = round(WIDTH * size / HEIGHT)
    return Crop(size, width, 0, (width - size) // 2), Shape(len(FRAMES), size, size)


def ours(path: str, size: int) -> None:
    assert read_frames(path, FRAMES, *geometry(size)).shape == (len(FRAMES), 3, size, size)


def floor(path: str, size: int) -> None:
    crop, _ = geometry(size)
    reformatter = VideoReformatter()
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in FRAMES:
                reformatter.reformat(frame, crop.width, crop.height, "gbrp", interpolation=FILTER, threads=1)
            if number == FRAMES[-1]:
                return


def per_core(read: Callable[[str, int], None], paths: list[str], size: int) -> float:
    """Samples per second of CPU time."""
    begin = time.process_time()
    for path in paths:
        read(path, size)
    return len(paths) / (time.process_time() - begin)


def altogether(paths: list[str], size: int, pool: ProcessPoolExecutor) -> float:
    """Samples per second of all cores."""
    jobs = paths * ROUNDS
    begin = time.perf_counter()
    list(pool.map(ours, jobs, [size] * len(jobs)))
    return len(jobs) / (time.perf_counter() - begin)


def main() -> dict[str, float]:
    found: dict[str, float] = {}
    cores = os.cpu_count() or 1
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(cores, mp_context=spawn) as pool:
        paths = [str(Path(name, f"{number}.mp4")) for number in range(CLIPS)]
        for seed, path in enumerate(paths):
            make(Path(path), seed)
        for size in (256, 512):
            altogether(paths[:1], size, pool)  # the processes start, files come to memory
            rates = [(per_core(ours, paths, size), per_core(floor, paths, size)) for _ in range(ROUNDS)]
            mine, bare = (max(column) for column in zip(*rates, strict=True))
            all_cores = altogether(paths, size, pool)
            print(
                f"reading 49 frames at stride 2 to {size} px: {mine:.2f} samples/s a core, floor {bare:.2f}, "
                f"ratio {mine / bare:.2f}; {all_cores:.2f} samples/s on {cores} cores"
            )
            found |= {f"read_{size}_ratio": mine / bare, f"read_{size}_per_core": mine, f"read_{size}": all_cores}
    return found


if __name__ == "__main__":
    main()
