"""A camera's path through a clip, by structure from motion (COLMAP; Schönberger and Frahm, CVPR 2016), as the poses of
`data.camera`.  (no torch)

Frames between those that were looked at get the path between them: centres on a straight line, rotations turned evenly.
The path has the scale of the camera paths that released models saw: the nearest scenery is NEAR_M away (RealEstate10K,
arXiv:1805.09817, section 4.3).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from reeltune.control.kind import Detector, Put, Quality, Settings, Source, digest_of
from reeltune.core.errors import UserError
from reeltune.data.camera import POSE_ASPECT, rays
from reeltune.data.findings import MediaError

VERSION = 2  # raise it when the same clip gets another path
LOOKED_AT = 60  # frames, evenly over the clip
LONG_SIDE_PX = 640  # of a frame that is looked at, at most; errors are in its pixels
OVERLAP = 5  # frames before it that each is matched with, and further ones (COLMAP's quadratic overlap)
MOST_FEATURES = 2048  # of a frame: matching takes their square
MOST_ERROR_PX = 1.5  # mean reprojection error; sound reconstructions have 0.3 to 1 (COLMAP's FAQ; ours 0.4)
LEAST_SHARE = 0.8  # of the frames looked at that the path must hold
LEAST_POINTS = 50  # of the scene; with fewer a path is chance
NEAR_M = 1.25  # distance of the nearest scenery
NEAR_SHARES = 0.05, 0.1  # of a frame's points that are nearer than its near plane; of frames whose plane is nearer
# Of frames and points, after which all of the path is adjusted anew, and how often at a time. COLMAP's 1.1 and 5 take
# 92 seconds of a core for a clip of 49 frames, these 40; the path is the same to 0.2 degrees (measured, 2026-11-26).
GROWTH, ADJUSTMENTS = 1.4, 2
SEED = 0
LEAST_FRAMES = 3


@dataclass(frozen=True)
class Path3D:
    """What structure from motion found."""

    places: np.ndarray  # int64 N: which of the frames looked at have a pose, ascending
    to_camera_N34: np.ndarray  # world to camera
    focal_px: float
    error_px: float
    points: int
    near: float  # distance of the nearest scenery


def open_camera(settings: Settings) -> Detector:
    """Raises UserError where pycolmap is not installed."""
    try:
        import pycolmap
    except ImportError as missing:
        raise UserError(
            "kind", "camera needs pycolmap, the extra `camera`: pip install 'reeltune[camera]'"
        ) from missing

    def detect(source: Source, put: Put) -> Quality:
        count = len(source.times_s)
        if count < LEAST_FRAMES:
            frames = "a picture" if count == 1 else f"{count} frames"
            return Quality(0.0, {}, f"is {frames}, and a camera's path needs {LEAST_FRAMES} frames or more")
        with tempfile.TemporaryDirectory(prefix="reeltune-camera-") as folder:
            looked_at, size = _write_frames(source, Path(folder) / "frames")
            found = reconstruct(pycolmap, Path(folder), len(looked_at))
        if found is None:
            return Quality(0.0, {}, "shows no camera motion that can be followed: it stands still, turns on the spot, "
                           "or too much in it moves")  # fmt: skip
        quality = _quality(found, len(looked_at))
        if not quality.reason:
            put(poses_of(found, looked_at, source, size))
        return quality

    version = str(pycolmap.__version__)
    return Detector(digest_of("camera", [VERSION, version]), detect)


def _quality(found: Path3D, looked_at: int) -> Quality:
    share = len(found.places) / looked_at
    facts = {"error_px": found.error_px, "frames_share": share, "points": float(found.points)}
    reasons = []
    if found.error_px > MOST_ERROR_PX:
        reasons.append(f"has a reprojection error of {found.error_px:.2f} px, and {MOST_ERROR_PX:g} is the most")
    if share < LEAST_SHARE:
        reasons.append(f"has a camera path for {share:.0%} of its frames, and {LEAST_SHARE:.0%} is the least")
    if found.points < LEAST_POINTS:
        reasons.append(f"shows {found.points} points that a path could hold on to, and {LEAST_POINTS} is the least")
    return Quality(share * (1 - min(found.error_px / (2 * MOST_ERROR_PX), 1)), facts, "; ".join(reasons))


def _write_frames(source: Source, folder: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """(which frames, their height and width) of those that are looked at, as PNG by their place among them."""
    folder.mkdir()
    count = len(source.times_s)
    wanted = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).round().astype(int))
    shrunk = min(LONG_SIDE_PX / max(source.height, source.width), 1.0)
    height, width = round(source.height * shrunk), round(source.width * shrunk)
    for place, rgb_HW3 in enumerate(source.spread(LOOKED_AT)):
        small_HW3 = cv2.resize(rgb_HW3, (width, height), interpolation=cv2.INTER_AREA)
        if not cv2.imwrite(str(folder / _name(place)), cv2.cvtColor(small_HW3, cv2.COLOR_RGB2BGR)):
            raise MediaError(f"needs room in {folder.parent.parent}: a frame cannot be written there", lasting=False)
    return wanted, (height, width)


def _name(place: int) -> str:
    return f"{place:05}.png"


def reconstruct(pycolmap: Any, folder: Path, looked_at: int) -> Path3D | None:
    """The largest reconstruction of the frames there; None where there is none. One thread, so that the same frames
    give the same path."""
    pycolmap.logging.minloglevel = pycolmap.logging.FATAL.value
    pycolmap.set_random_seed(SEED)
    database, frames = folder / "database.db", folder / "frames"
    names = [_name(place) for place in range(looked_at)]
    reader = pycolmap.ImageReaderOptions(camera_model="SIMPLE_RADIAL")
    extraction = pycolmap.FeatureExtractionOptions(num_threads=1)
    extraction.sift.max_num_features = MOST_FEATURES
    single = pycolmap.CameraMode.SINGLE
    pycolmap.extract_features(database, frames, names, single, reader, extraction, pycolmap.Device.cpu)
    matching = pycolmap.FeatureMatchingOptions(num_threads=1)
    pairing = pycolmap.SequentialPairingOptions(overlap=OVERLAP, quadratic_overlap=True, num_threads=1)
    verification = pycolmap.TwoViewGeometryOptions()
    verification.ransac.random_seed = SEED
    pycolmap.match_sequential(database, matching, pairing, verification, pycolmap.Device.cpu)
    options = pycolmap.IncrementalPipelineOptions(
        num_threads=1,
        random_seed=SEED,
        extract_colors=False,
        ba_global_frames_ratio=GROWTH,
        ba_global_points_ratio=GROWTH,
        ba_global_max_refinements=ADJUSTMENTS,
    )
    models = pycolmap.incremental_mapping(database, frames, folder, options)
    found = max(models.values(), key=lambda model: model.num_reg_images(), default=None)
    return None if found is None or found.num_reg_images() < LEAST_FRAMES else _path_of(found)


def _path_of(model: Any) -> Path3D:
    posed = sorted((int(image.name[:5]), image) for image in model.images.values() if image.has_pose)
    poses_N34 = np.array([image.cam_from_world().matrix() for _, image in posed])
    points_P3 = np.array([point.xyz for point in model.points3D.values()]).reshape(-1, 3)
    (camera, *_) = model.cameras.values()
    return Path3D(
        places=np.array([place for place, _ in posed]),
        to_camera_N34=poses_N34,
        focal_px=float(camera.mean_focal_length()),
        error_px=float(model.compute_mean_reprojection_error()),
        points=len(points_P3),
        near=_near(poses_N34, points_P3),
    )


def _near(poses_N34: np.ndarray, points_P3: np.ndarray) -> float:
    """Distance of the nearest scenery, as RealEstate10K's scale takes it; 0 without points."""
    planes = []
    for pose_34 in poses_N34:
        depths_P = points_P3 @ pose_34[2, :3] + pose_34[2, 3]
        if (ahead := depths_P[depths_P > 0]).size:
            planes.append(np.quantile(ahead, NEAR_SHARES[0]))
    return float(np.quantile(planes, NEAR_SHARES[1])) if planes else 0.0


def poses_of(found: Path3D, looked_at: np.ndarray, source: Source, size: tuple[int, int]) -> np.ndarray:
    """float64 F 19 of every frame, as `data.camera` reads it. size: height and width of the frames looked at.

    There focal lengths are fractions of a picture of POSE_ASPECT that covers the clip's, and shares its field of view.
    """
    height, width = size
    fx, fy = found.focal_px / width, found.focal_px / height
    if width / height < POSE_ASPECT:
        fx *= width / (height * POSE_ASPECT)
    else:
        fy *= height * POSE_ASPECT / width
    scale = NEAR_M / found.near if found.near > 0 else 1.0
    rotations_N33, shifts_N3 = found.to_camera_N34[:, :, :3], found.to_camera_N34[:, :, 3]
    centres_N3 = -np.einsum("nji,nj->ni", rotations_N33, shifts_N3) * scale
    known = looked_at[found.places]
    frames = np.arange(len(source.times_s))
    rotations_F33 = np.stack(list(_turned(known, rotations_N33, frames)))
    centres_F3 = np.stack([np.interp(frames, known, column) for column in centres_N3.T], axis=1)
    shifts_F3 = -np.einsum("fij,fj->fi", rotations_F33, centres_F3)
    poses_F19 = np.zeros((len(frames), 19))
    poses_F19[:, 0] = source.times_s
    poses_F19[:, 1:5] = fx, fy, 0.5, 0.5
    poses_F19[:, 7:] = np.concatenate([rotations_F33, shifts_F3[..., None]], axis=2).reshape(-1, 12)
    rays(poses_F19[:1], 2, 2)  # it can be read
    return poses_F19


def _turned(known: np.ndarray, rotations_N33: np.ndarray, frames: np.ndarray) -> Iterator[np.ndarray]:
    """The rotation of each frame: turned evenly about one axis between those that are known, and beyond them as these
    are."""
    for frame in np.clip(frames, known[0], known[-1]):
        after = int(np.searchsorted(known, frame))
        if known[after] == frame:
            yield rotations_N33[after]
            continue
        start_33, end_33 = rotations_N33[after - 1], rotations_N33[after]
        part = (frame - known[after - 1]) / (known[after] - known[after - 1])
        axis_3, _ = cv2.Rodrigues(end_33 @ start_33.T)
        step_33, _ = cv2.Rodrigues(axis_3 * part)
        yield step_33 @ start_33
