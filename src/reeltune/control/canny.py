"""Edges: Canny's, white on black, with lines that stay from frame to frame.  (no torch)

A frame's lines are those of OpenCV's Canny (Canny 1986, IEEE PAMI 8:679; 3x3 Sobel, L1 magnitude, the strongest of the
three colours at each pixel), as the controls were that released models saw (controlnet-aux's CannyDetector).
Canny's two thresholds are a hysteresis in space: a weak line counts where it runs on from a strong one. The same is
done in time: a weak line counts where at least CONTINUED of it lies on lines of the frame before, give or take a
pixel. Without this a line whose strength is about the upper threshold comes and goes with every change of noise.

Thresholds by the clip: the upper one is that gradient which the STRONGEST share of pixels exceeds, in frames spread
evenly over the clip, within UPPER; the lower one is half of it (Canny 1986, section IX: two or three to one).
"""

from __future__ import annotations

import cv2
import numpy as np

from reeltune.control.grey import put_grey
from reeltune.control.kind import Detector, Put, Quality, Settings, Source, digest_of
from reeltune.core.errors import UserError

VERSION = 1  # raise it when the same clip gets other lines
# 200: of the released tool's 100 and 200, so that no clip gets fewer lines than by it. 60: with less, what an encoder
# left of plain walls becomes lines (looked at, 2026-11-26).
UPPER = (60.0, 200.0)
STRONGEST = 0.02  # of the pixels: with more, fur and cloth are drawn thread by thread (looked at, 2026-11-26)
RATIO = 2.0
CONTINUED = 0.5  # of a weak line's pixels
LOOKED_AT = 8  # frames, for the thresholds
ENOUGH = 0.005  # of a frame's pixels on lines: with fewer there is little to follow
WAYS = ((1, 0), (0, 1))  # derivatives across and down
NOISE = 0.3  # of them: white noise has 0.36, clips of ours 0.02 to 0.05 (measured, 2026-11-26)


def open_canny(settings: Settings) -> Detector:
    """Raises UserError for thresholds that are none."""
    thresholds = settings.thresholds
    if thresholds is not None and not 0 < thresholds[0] <= thresholds[1] <= 10_000:
        raise UserError(
            "canny_thresholds",
            f"{thresholds[0]:g} and {thresholds[1]:g}: the lower comes first, and both are above 0; give, for example, "
            "100 200",
        )

    def detect(source: Source, put: Put) -> Quality:
        low, high = thresholds or thresholds_of(source)
        shares, steady = [], []
        before_HW = None

        def draw(rgb_HW3: np.ndarray) -> np.ndarray:
            nonlocal before_HW
            lines_HW = lines_of(rgb_HW3, low, high, before_HW)
            shares.append(cv2.countNonZero(lines_HW) / lines_HW.size)
            if before_HW is not None and shares[-1]:
                steady.append(_on(lines_HW, before_HW))
            before_HW = lines_HW
            return lines_HW

        put_grey(source, put, draw)
        return _quality(np.array(shares), steady, (low, high))

    return Detector(digest_of("canny", [VERSION, thresholds]), detect)


def lines_of(rgb_HW3: np.ndarray, low: float, high: float, before_HW: np.ndarray | None = None) -> np.ndarray:
    """uint8 H W, 255 on lines. before_HW: lines of the frame before."""
    across_HW3, down_HW3 = (cv2.Sobel(rgb_HW3, cv2.CV_16S, *way, borderType=cv2.BORDER_REPLICATE) for way in WAYS)
    weak_HW = cv2.Canny(across_HW3, down_HW3, low, low)
    found = cv2.findNonZero(weak_HW)
    if found is None:
        return weak_HW
    columns, rows = found.reshape(-1, 2).T
    places: np.ndarray = rows * weak_HW.shape[1] + columns
    across, down = (way_HW3.reshape(-1, 3)[places] for way_HW3 in (across_HW3, down_HW3))
    strong = np.flatnonzero((np.abs(across) + np.abs(down)).max(1) > int(high))
    count, labels_HW = cv2.connectedComponents(weak_HW, connectivity=8, ltype=cv2.CV_32S)
    labels: np.ndarray = labels_HW.ravel()[places]
    kept = np.zeros(count, bool)
    kept[labels[strong]] = True
    if before_HW is not None:
        near = _widened(before_HW).ravel()[places] > 0
        kept |= np.bincount(labels[near], minlength=count) >= CONTINUED * np.bincount(labels, minlength=count)
    weak_HW.ravel()[places[~kept[labels]]] = 0
    return weak_HW


def thresholds_of(source: Source) -> tuple[float, float]:
    """(lower, upper) of the whole clip; see above."""
    counts = np.zeros(4 * 2 * 255 + 1, np.int64)  # of L1 gradients of a 3x3 Sobel: whole numbers up to 2040
    for rgb_HW3 in source.spread(LOOKED_AT):
        grey_HW = cv2.cvtColor(rgb_HW3, cv2.COLOR_RGB2GRAY)
        across_HW, down_HW = cv2.spatialGradient(grey_HW)
        size_HW = np.abs(across_HW) + np.abs(down_HW)
        counts += np.bincount(size_HW.ravel(), minlength=len(counts))[: len(counts)]
    above = counts[::-1].cumsum()[::-1]  # pixels of at least so much
    upper = int(np.argmax(above <= STRONGEST * above[0]))
    high = float(np.clip(upper, *UPPER))
    return high / RATIO, high


def _widened(lines_HW: np.ndarray) -> np.ndarray:
    return cv2.dilate(lines_HW, np.ones((3, 3), np.uint8))


def _on(lines_HW: np.ndarray, before_HW: np.ndarray) -> float:
    """Which share of the lines lies on those of the frame before, give or take a pixel."""
    return cv2.countNonZero(cv2.bitwise_and(lines_HW, _widened(before_HW))) / max(cv2.countNonZero(lines_HW), 1)


def _quality(shares_F: np.ndarray, steady: list[float], thresholds: tuple[float, float]) -> Quality:
    """The score is how much there is to follow: the mean over frames of lines against ENOUGH, 1 where there are more.
    What is nearly all lines is noise, and has nothing to follow either."""
    useful_F = np.where(shares_F > NOISE, 0.0, np.minimum(shares_F / ENOUGH, 1.0))
    facts = {
        "lines_share": float(shares_F.mean()),
        "steady_share": float(np.mean(steady)) if steady else 1.0,
        "low": thresholds[0],
        "high": thresholds[1],
    }
    return Quality(float(useful_F.mean()), facts)
