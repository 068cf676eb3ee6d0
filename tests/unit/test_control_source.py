"""Clips as controls are drawn from them: in chunks."""

import numpy as np

from reeltune.control import kind
from reeltune.control.source import source_of
from tests.unit.test_media import encode


def test_few_frames_are_held_whatever_the_clips_length(tmp_path, monkeypatch):
    """Bytes of frames that are alive at once: those of a chunk, not of the clip."""
    monkeypatch.setattr(kind, "CHUNK_BYTES", 4 * 64 * 64 * 3)
    most = []
    for frames in (12, 96):
        encode(tmp_path / f"{frames}.mp4", np.zeros((frames, 64, 64, 3), np.uint8))
        source = source_of(tmp_path / f"{frames}.mp4", "video")
        sizes = [chunk.nbytes for chunk in source.chunks()]
        assert sum(sizes) == frames * 64 * 64 * 3
        most.append(max(sizes))
    assert most == [4 * 64 * 64 * 3] * 2
