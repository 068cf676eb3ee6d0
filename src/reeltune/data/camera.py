"""Camera paths: a text file of poses -> rows for a clip's frames -> Pluecker rays -> the network's channels.

A pose file has one header line, then one row of 19 numbers per pose (RealEstate10K and CameraCtrl,
arXiv:2404.02101): time, fx, fy, cx, cy as fractions of the picture's width and height, two unused
numbers, and the 3x4 world-to-camera matrix row by row.  (no torch)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLUMNS = 19
POSE_ASPECT = 1280 / 720  # of the footage the poses were made on; assumed whatever the clip (as released)
SINGULAR = 1e-6  # least determinant of the 3x3 part; a rotation has 1


class CameraError(Exception):
    """A pose file that cannot be used, with the line where it shows."""


def read_poses(path: str | Path) -> np.ndarray:
    """The file's poses, float64 N,19. Any white space separates numbers; blank lines at the end are ignored.

    Raises CameraError (with the line number) for a missing header line, a row that is not 19 finite numbers,
    a focal length that is not positive, and a matrix without an inverse.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CameraError(f"cannot be read as text: {error}") from error
    if _row_problem(lines[0]) is None:
        raise CameraError("line 1 is a pose, but the first line is skipped as a header; put an empty line before it")
    problems = [(number, problem) for number, line in enumerate(lines[1:], 2) if (problem := _row_problem(line))]
    if problems:
        number, problem = problems[0]
        others = f" ({len(problems) - 1} more lines are bad)" if len(problems) > 1 else ""
        raise CameraError(f"line {number}: {problem}{others}")
    if len(lines) < 2:
        raise CameraError("no pose after the header line")
    return np.array([line.split() for line in lines[1:]], dtype=np.float64)


def _row_problem(line: str) -> str | None:
    words = line.split()
    if len(words) != COLUMNS:
        return f"{len(words)} columns; a pose has {COLUMNS} numbers"
    try:
        row = [float(word) for word in words]
    except ValueError as error:
        return str(error)
    if not all(map(math.isfinite, row)):
        return "a number is not finite"
    if min(row[1], row[2]) <= 0:
        return f"focal lengths {row[1]:g}, {row[2]:g}; they must be positive"
    if abs(np.linalg.det(np.reshape(row[7:], (3, 4))[:, :3])) < SINGULAR:
        return "the world-to-camera matrix has no inverse"
    return None


def resample(poses_N19: np.ndarray, clip_frames: int, frames: Sequence[int]) -> np.ndarray:
    """The rows of `frames` after stretching the path over a clip of `clip_frames`: float64 F,19.

    Linear in every column between first pose and last, the matrix element by element (as released).
    """
    at = np.asarray(frames, dtype=np.float64) * (len(poses_N19) - 1) / max(clip_frames - 1, 1)
    columns = [np.interp(at, np.arange(len(poses_N19)), column) for column in poses_N19.T]
    return np.stack(columns, axis=1)


def rays(poses_F19: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pluecker rays of every pixel of a height x width picture: float32 F,H,W,6 (origin x direction, direction).

    Poses are taken relative to the first. Rays pass through pixel centres (CameraCtrl, section 3.2).
    Raises CameraError if a matrix has no inverse (rows between two opposite views).
    """
    count = len(poses_F19)
    fx, fy, cx, cy = (poses_F19[:, column, None, None] for column in range(1, 5))
    if width / height < POSE_ASPECT:  # a picture of POSE_ASPECT that covers this one shares its field of view
        fx = fx * (height * POSE_ASPECT / width)
    else:
        fy = fy * (width / POSE_ASPECT / height)
    to_camera_F44 = np.tile(np.eye(4), (count, 1, 1))
    to_camera_F44[:, :3] = poses_F19[:, 7:].reshape(count, 3, 4)
    if (np.abs(np.linalg.det(to_camera_F44)) < SINGULAR).any():
        raise CameraError("a world-to-camera matrix between two poses has no inverse")
    to_first_F44 = to_camera_F44[0] @ np.linalg.inv(to_camera_F44)
    to_first_F44[0] = np.eye(4)

    x = ((np.arange(width) + 0.5) / width - cx) / fx
    y = ((np.arange(height) + 0.5)[:, None] / height - cy) / fy
    x, y = np.broadcast_arrays(x, y)
    direction = np.stack([x, y, np.ones_like(x)], axis=-1)
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    direction = np.einsum("fij,fhwj->fhwi", to_first_F44[:, :3, :3], direction)
    origin = to_first_F44[:, None, None, :3, 3]
    return np.concatenate([np.cross(origin, direction, axis=-1), direction], axis=-1).astype(np.float32)
