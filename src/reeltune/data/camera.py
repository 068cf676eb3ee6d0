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

from reeltune.data.findings import MediaError, require_file

COLUMNS = 19
MATRIX = 12  # numbers of a row at least, with which it is no header
MOST_BYTES = 2**26  # of a file: 250,000 poses, of clips of two hours
POSE_ASPECT = 1280 / 720  # of the footage the poses were made on; assumed whatever the clip (as released)
SINGULAR = 1e-6  # least determinant of the 3x3 part; a rotation has 1
ORTHONORMAL = 0.01  # that R times its transpose may differ from 1 in any element: numbers of three digits do by less
FOCAL = (0.05, 20.0)  # least and greatest, of the width or height: fields of view of 169 and of 2.9 degrees


class CameraError(Exception):
    """A pose file that cannot be used, with the line where it shows."""


def read_poses(path: str | Path) -> np.ndarray:
    """The file's poses, float64 N,19. Any white space separates numbers; blank lines at the end are ignored.

    Raises CameraError (with the line number) for a missing header line, a row that is not 19 finite numbers, lengths
    and centres that are no fractions of a picture, a matrix that is no rotation and shift, and times that run back.
    """
    lines = _text(path).rstrip().split("\n")
    if _is_row(lines[0]):
        raise CameraError("line 1 is a pose, but the first line is skipped as a header; put an empty line before it")
    problems = [(number, problem) for number, line in enumerate(lines[1:], 2) if (problem := _row_problem(line))]
    if problems:
        number, problem = problems[0]
        others = f" ({len(problems) - 1} more lines are bad)" if len(problems) > 1 else ""
        raise CameraError(f"line {number}: {problem}{others}")
    if len(lines) < 2:
        raise CameraError("no pose after the header line")
    poses_N19 = np.array([line.split() for line in lines[1:]], dtype=np.float64)
    backwards = np.flatnonzero(np.diff(poses_N19[:, 0]) < 0)
    if len(backwards):
        row = int(backwards[0])
        times = f"{poses_N19[row + 1, 0]:g} comes after {poses_N19[row, 0]:g}"
        raise CameraError(f"line {row + 3}: times run backwards ({times}); put the poses in the order of the clip")
    return poses_N19


def _text(path: str | Path) -> str:
    try:
        require_file(str(path))
        with open(path, encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except MediaError as error:
        raise CameraError(f"cannot be read: it {error}") from None
    except UnicodeDecodeError:
        raise CameraError("cannot be read as text; write it in UTF-8") from None
    except OSError as error:
        raise CameraError(f"cannot be read: {error.strerror}") from error
    if len(text) > MOST_BYTES:
        raise CameraError(f"has more than {MOST_BYTES:,} letters; a camera path has a line for each frame")
    return text


def _is_row(line: str) -> bool:
    """Whether it is meant for a pose, be it a good one or not."""
    words = line.split()
    try:
        return len(words) >= MATRIX and bool(list(map(float, words)))
    except ValueError:
        return False


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
    return _lens_problem(*row[1:5]) or _rotation_problem(np.reshape(row[7:], (3, 4))[:, :3])


def _lens_problem(fx: float, fy: float, cx: float, cy: float) -> str | None:
    if min(fx, fy) <= 0:
        return f"focal lengths {fx:g}, {fy:g}; they must be positive"
    outside = not all(FOCAL[0] <= focal <= FOCAL[1] for focal in (fx, fy)) or not all(0 <= c <= 1 for c in (cx, cy))
    if not outside:
        return None
    problem = f"focal lengths {fx:g}, {fy:g} and centre {cx:g}, {cy:g} are no fractions of a picture's width and height"
    if max(fx, fy, cx, cy) > FOCAL[1]:
        return f"{problem}: are these pixels? Divide the first of each pair by the width, the second by the height"
    return problem


def _rotation_problem(rotation: np.ndarray) -> str | None:
    if abs(np.linalg.det(rotation)) < SINGULAR:
        return "the world-to-camera matrix has no inverse"
    square = rotation @ rotation.T
    if np.abs(square - np.eye(3)).max() > ORTHONORMAL:
        scale = math.sqrt(np.trace(square) / 3)
        scaled = np.abs(square / scale**2 - np.eye(3)).max() <= ORTHONORMAL
        how = f"a rotation scaled by {scale:g}" if scaled else "sheared, or its numbers stand in another order"
        return f"the first three columns of the world-to-camera matrix must be a rotation, and are {how}"
    if np.linalg.det(rotation) < 0:
        return "the world-to-camera matrix mirrors: its rotation has determinant -1; turn an odd axis round"
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
