"""Reading: the plan's choices and nothing else, the same with any number of workers, and files that break."""

import os
import pickle
import random
import shutil
import signal
import time
from dataclasses import fields, replace
from fractions import Fraction
from itertools import islice

import av
import numpy as np
import pytest
import torch

from reeltune.core.errors import UserError
from reeltune.core.types import Batch, MaskLaw, Progress, Record
from reeltune.data.camera import rays, read_poses, resample
from reeltune.data.findings import content_of
from reeltune.data.loader import ATTEMPTS, Reader, stream
from reeltune.data.masks import draw_mask
from reeltune.data.media import MediaError, measure, read_frames
from tests.unit.readable_clips import POSES, RULES, reader, rows, same, write_clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


def test_a_batch_is_what_its_draws_say(folder):
    records = rows(folder)
    read = reader(records, drop={"ref": 0.4})
    plan = read.plan(0)
    for k in range(len(plan)):
        batch = read[0, k, 0, 1]
        assert batch.draws == plan[k]
        assert batch.pixels_BFCHW.shape == (2, batch.draws[0].shape.frames, 3, *batch.draws[0].shape[1:])
        assert batch.text == [records[draw.record].text for draw in batch.draws]
        assert batch.ref_frame_B.tolist() == [draw.ref_frame for draw in batch.draws]
        assert batch.camera_BFCHW is batch.mask_BFHW is None
        assert batch.keep.keys() == {"ref", "text"}
        for i, draw in enumerate(batch.draws):
            for pixels, path in (
                (batch.pixels_BFCHW, records[draw.record].path),
                (batch.control_BFCHW, records[draw.record].control_path),
            ):
                assert pixels.dtype == torch.uint8
                np.testing.assert_array_equal(pixels[i], read_frames(path, draw.frames, draw.crop, draw.shape))


def test_what_was_replaced_since_it_was_measured_is_not_read(folder, tmp_path):
    """Its plan is of the old one: frames would be others, and its control of another clip."""
    path, control = tmp_path / "a.mp4", tmp_path / "b.mp4"
    shutil.copy(folder / "0.mp4", path)
    shutil.copy(folder / "0_control.mp4", control)
    paths = {"path": str(path), "control_path": str(control)}
    contents = {"content": content_of(str(path)), "control_content": content_of(str(control))}
    record = replace(rows(folder)[0], **paths, **contents)
    read = reader([record], group=1)
    assert read[0, 0, 0, 1].failures == ()
    [draw] = read.plan(0)[0]
    other_end = control.read_bytes()[:-1] + b"?"  # as long as it was
    for file, put, words in (
        (path, lambda: shutil.copy(folder / "1.mp4", path), "is another file than when it was measured"),
        (path, lambda: os.mkfifo(path), "is not a regular file"),
        (path, lambda: None, "cannot be opened: No such file"),
        (control, lambda: shutil.copy(folder / "1_control.mp4", control), "has a control that is another file"),
        (control, lambda: control.write_bytes(other_end), "has a control that is another file than when it was meas"),
        (control, lambda: os.mkfifo(control), "has a control that is not a regular file"),
    ):
        shutil.copy(folder / "0.mp4", path)
        file.unlink(missing_ok=True)
        put()
        with pytest.raises(MediaError, match=words):
            read.open(draw)
        path.unlink(missing_ok=True)


def test_a_camera_path_that_was_mended_since_it_was_measured_is_not_read(folder, tmp_path):
    path = tmp_path / "path.txt"
    path.write_text(POSES)
    record = replace(rows(folder)[0], camera_path=str(path), control_content=content_of(str(path)))
    read = reader([record], group=1, needs=frozenset({"camera"}))
    [draw] = read.plan(0)[0]
    assert read.open(draw).camera_FCHW is not None
    path.write_text(POSES.replace("0.5", "0.6", 1))
    with pytest.raises(MediaError, match="has a camera path that is another file than when it was measured"):
        read.open(draw)


def test_camera_and_mask(folder):
    records = [replace(record, height=60) for record in rows(folder)[:5]]  # resized past the crop
    read = reader(records, group=1, needs=frozenset({"camera", "mask"}))
    for k in range(5):
        batch = read[0, k, 0, 1]
        [draw] = batch.draws
        crop, shape, record = draw.crop, draw.shape, records[draw.record]
        assert crop.height > shape.height
        lines = rays(resample(read_poses(folder / "path.txt"), record.frames, draw.frames), crop.height, crop.width)
        window = lines[:, crop.top : crop.top + shape.height, crop.left : crop.left + shape.width]
        assert batch.camera_BFCHW.dtype == torch.float32
        np.testing.assert_array_equal(batch.camera_BFCHW[0], window.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(batch.mask_BFHW[0], draw_mask(draw.seed, shape, MaskLaw()))
        assert batch.control_BFCHW is None
    first_given = MaskLaw({"after_first": 1.0}, {"all": 1.0})
    batch = reader(records, group=1, needs=frozenset({"mask"}), mask_law=first_given)[0, 0, 0, 1]
    assert not batch.mask_BFHW[0, 0].any()
    assert batch.mask_BFHW[0, 1:].all()


def test_ranks_share_a_micro_step(folder):
    whole, parts = reader(rows(folder), group=4), reader(rows(folder), group=4)
    one = whole[1, 0, 0, 1]
    shares = [parts[1, 0, rank, 4] for rank in range(4)]
    assert [draw for share in shares for draw in share.draws] == one.draws
    assert torch.equal(torch.cat([share.pixels_BFCHW for share in shares]), one.pixels_BFCHW)
    assert torch.equal(torch.cat([share.keep["text"] for share in shares]), one.keep["text"])


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(folder, workers):
    def take(number, start, count):
        return list(islice(stream(reader(rows(folder)), start, workers=number), count))

    alone, many = take(0, Progress(), 9), take(workers, Progress(), 9)
    steps = len(reader(rows(folder)).plan(0))
    assert steps == 4 + 1
    lengths = [len(reader(rows(folder)).plan(epoch)) for epoch in range(3)]
    assert len(set(lengths)) > 1
    assert [place for _, *place in alone] == [[e, k + 1] for e in range(3) for k in range(lengths[e])][:9]
    for (one, *where), (other, *there) in zip(alone, many, strict=True):
        assert where == there
        same(one, other)
    resumed = take(workers, Progress(step=3, epoch=0, cursor=3), 6)
    for (one, *where), (other, *there) in zip(alone[3:], resumed, strict=True):
        assert where == there
        same(one, other)
    ended = take(0, Progress(epoch=0, cursor=steps), 1)
    same(ended[0][0], alone[steps][0])


def test_an_epoch_in_which_no_group_starts_is_passed_over(folder):
    """Three clips in a batch of eight: the first lasts for two epochs and two thirds."""

    def take(start, count):
        return list(islice(stream(reader(rows(folder)[:3], group=8), start, workers=0), count))

    batches = take(Progress(), 4)
    assert [place for _, *place in batches] == [[0, 1], [2, 1], [5, 1], [8, 1]]
    drawn = [draw.record for batch, *_ in batches[:3] for draw in batch.draws]
    assert sorted(drawn) == sorted([0, 1, 2] * 8)
    for epoch, cursor in ((0, 1), (1, 0)):  # as a checkpoint says it, or one whose epoch has shrunk
        [(batch, *place)] = take(Progress(epoch=epoch, cursor=cursor), 1)
        assert place == [2, 1]
        same(batch, batches[1][0])


def test_global_generators_stay_as_they_are(folder):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(islice(stream(reader(rows(folder), needs=frozenset({"mask"})), Progress(), workers=1), 2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_drops_depend_on_the_sample_and_the_name_alone(folder, monkeypatch):
    monkeypatch.setattr("reeltune.data.loader.read_frames", lambda path, frames, crop, shape: np.zeros(1))
    records = rows(folder)[:1]

    def keeps(drop, name):
        read = reader(records, group=1, drop=drop)
        return [bool(read.open(read.plan(epoch)[0][0]).keep[name]) for epoch in range(300)]

    assert not any(keeps({"ref": 1.0}, "ref"))
    assert all(keeps({"ref": 0.0}, "ref"))
    alone, beside = keeps({"ref": 0.4}, "ref"), keeps({"clip": 0.4, "ref": 0.4}, "ref")
    assert alone == beside != keeps({"clip": 0.4}, "clip")
    assert abs(sum(alone) / 300 - 0.6) < 0.12  # four standard deviations
    assert abs(sum(keeps({}, "text")) / 300 - 0.9) < 0.07
    assert all(more <= less for more, less in zip(keeps({"ref": 0.6}, "ref"), alone, strict=True))


def broken(folder, tmp_path, *numbers) -> list[Record]:
    """The same records, some of whose files have become text since they were measured."""
    records = rows(folder)
    for number in numbers:
        path = tmp_path / f"{number}.mp4"
        path.write_text("not a clip")
        records[number] = replace(records[number], path=str(path))
    return records


def test_a_file_that_breaks_is_stood_in_for(folder, tmp_path):
    plan, position = reader(rows(folder)).plan(0), 1
    k = next(k for k in range(len(plan)) if plan[k][0].record < 5 and not plan[k][1].repeat)
    bad = plan[k][position].record
    read = reader(broken(folder, tmp_path, bad))
    batch = read[0, k, 0, 1]
    [(record, reason)] = {failure for failure in batch.failures}
    assert record == bad
    assert "cannot be opened" in reason or "decode" in reason
    assert batch.draws[position] == plan.stand_in(k, position, 1)
    same(batch, read[0, k, 0, 1])
    same(reader(broken(folder, tmp_path, bad))[0, k, position, 2], only(batch, position))
    np.testing.assert_array_equal(batch.pixels_BFCHW[position], read.open(batch.draws[position]).pixels_FCHW)
    other = read[0, (k + 1) % len(plan), 0, 1]
    assert other.failures == () or all(failure[0] == bad for failure in other.failures)


def only(batch: Batch, i: int) -> Batch:
    """The i-th sample of a batch as a batch of its own, the others having no failures."""
    return replace(
        batch,
        draws=[batch.draws[i]],
        text=[batch.text[i]],
        pixels_BFCHW=batch.pixels_BFCHW[i : i + 1],
        control_BFCHW=batch.control_BFCHW[i : i + 1],
        ref_frame_B=batch.ref_frame_B[i : i + 1],
        keep={name: keep_B[i : i + 1] for name, keep_B in batch.keep.items()},
    )


def test_a_control_that_breaks_is_named(folder, tmp_path):
    records = rows(folder)[:2]
    (tmp_path / "control.mp4").write_text("not a clip")
    records[0] = replace(records[0], control_path=str(tmp_path / "control.mp4"))
    (tmp_path / "path.txt").write_text("\n1 2 3")
    records[1] = replace(records[1], camera_path=str(tmp_path / "path.txt"))
    batches = [
        reader(records, group=1, needs=frozenset({need}))[0, k, 0, 1] for need in ("control", "camera") for k in (0, 1)
    ]
    [(record, reason)] = {failure for batch in batches[:2] for failure in batch.failures}
    assert (record, "has a control that" in reason, "control.mp4" in reason) == (0, True, True)
    [(record, reason)] = {failure for batch in batches[2:] for failure in batch.failures}
    assert (record, "line 2: 3 columns" in reason, "path.txt" in reason) == (1, True, True)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_file_left_is_an_error_that_lists_them(folder, tmp_path, workers):
    records = broken(folder, tmp_path, 0, 1, 2)[:3]
    with pytest.raises(UserError, match="files that the scan found sound") as caught:
        next(stream(reader(records), Progress(), workers=workers))
    assert len(caught.value.problems) == 3
    assert all(str(tmp_path / f"{i}.mp4") in str(caught.value) for i in range(3))


def test_attempts_are_bounded(folder, tmp_path):
    (tmp_path / "bad.mp4").write_text("not a clip")
    records = [replace(rows(folder)[0], path=str(tmp_path / "bad.mp4")) for _ in range(50)]
    with pytest.raises(UserError, match=f"{ATTEMPTS} files were tried") as caught:
        reader(records)[0, 0, 0, 1]
    assert len(caught.value.problems) == ATTEMPTS


def test_nothing_to_train_on(folder):
    records = [replace(record, frames=1) for record in rows(folder)[:2]]
    with pytest.raises(UserError, match=r"0\.mp4: its length is 1 frames"):
        next(stream(reader(records), Progress(), workers=0))
    with pytest.raises(UserError, match="no usable entry"):
        next(stream(reader([]), Progress(), workers=0))


class Signalled(Reader):
    """Sends its worker a signal, twice for SIGTERM's second; in the third batch."""

    number, times = signal.SIGINT, 1

    def __getitem__(self, place):
        if place[:2] == (0, 2):
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
                time.sleep(0.05)
        return super().__getitem__(place)


def signalled(folder, number, times) -> Reader:
    read = reader(rows(folder))
    read.__class__ = type("Sent", (Signalled,), {"number": number, "times": times})
    return read


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_the_first_signal(folder, number):
    batches = list(islice(stream(signalled(folder, number, 1), Progress(), workers=1), 4))
    same(batches[2][0], reader(rows(folder))[0, 2, 0, 1])


@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 1), (signal.SIGTERM, 2)])
def test_a_worker_that_dies_is_an_error_with_a_remedy(folder, number, times):
    with pytest.raises(UserError, match="process that reads clips died"):
        list(islice(stream(signalled(folder, number, times), Progress(), workers=1), 4))


def test_a_reader_can_be_sent_to_another_process(folder):
    read = reader(rows(folder))
    same(pickle.loads(pickle.dumps(read))[0, 0, 0, 1], read[0, 0, 0, 1])  # noqa: S301


def test_pinning_reaches_every_tensor(folder, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor[None])
    read = reader(rows(folder)[:5], needs=frozenset({"control", "camera", "mask"}))
    batch = read[0, 0, 0, 1]
    pinned = batch.pin_memory()
    for name in (field.name for field in fields(Batch)):
        before, after = getattr(batch, name), getattr(pinned, name)
        if isinstance(before, torch.Tensor):
            assert after.shape == (1, *before.shape), name
    assert pinned.keep["text"].shape == (1, 2)
    assert pinned.draws == batch.draws


def test_a_clip_of_uneven_rate_is_read_by_time_and_its_control_frame_by_frame(folder, tmp_path):
    path = tmp_path / "uneven.mp4"
    times = [n if n < 8 else 8 + 4 * (n - 8) for n in range(18)]  # in 1/16 s
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=16)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        for n, time_stamp in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 12 * n, np.uint8), "rgb24")
            frame.pts, frame.time_base = time_stamp, Fraction(1, 16)
            container.mux(video.encode(frame))
        container.mux(video.encode())
    found = measure(path, "video")
    record = replace(rows(folder)[4], path=str(path), frames=found.frames, fps=found.fps)  # its control: 18 even frames
    rules = replace(RULES, video_sample_fps=4.0, random_frame_crop=False)
    reading = reader([record], group=1, rules=rules)
    draw = reading.plan(0)[0][0]
    assert draw.rate == 4.0
    sample = reading.open(draw)
    start_s = draw.frames[0] / found.fps
    shown = [max(n for n in range(18) if times[n] / 16 <= start_s + i / 4 + 1e-3) for i in range(5)]
    assert list(draw.frames) != shown
    assert [round(float(grey) / 12) for grey in sample.pixels_FCHW.float().mean((1, 2, 3))] == shown
    control_FCHW = read_frames(record.control_path, shown, draw.crop, draw.shape)
    assert torch.equal(sample.control_FCHW, torch.from_numpy(control_FCHW))
