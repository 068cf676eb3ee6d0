from dataclasses import replace

import pytest

from reeltune.core.errors import UserError
from reeltune.core.types import Geometry, Record, Shape
from reeltune.data.held_out import fixed_draw, refuse_shared, split
from reeltune.data.shapes import SizeRules

CLIP = Record(0, "/data/a.mp4", "a clip", "video", 100, 24.0, 360, 640)


def records(names, root="/data"):
    return [replace(CLIP, entry=i, path=f"{root}/{name}") for i, name in enumerate(names)]


NAMES = [f"clips/{i:03}.mp4" for i in range(200)]


def test_the_share_is_met_and_nothing_is_lost():
    train, held = split(records(NAMES), 0.1, "/data")
    assert len(held) == 20 and sorted(train + held) == list(range(200))
    assert (train, held) == (sorted(train), sorted(held))


def test_the_choice_goes_by_path_alone():
    _, held = split(records(NAMES), 0.1, "/data")
    chosen = {NAMES[row] for row in held}
    _, elsewhere = split(records(NAMES[::-1], root="/mnt/copy"), 0.1, "/mnt/copy")
    assert {NAMES[::-1][row] for row in elsewhere} == chosen
    _, grown = split(records([*NAMES, "clips/new.mp4"]), 0.1, "/data")
    assert len(chosen & {[*NAMES, "clips/new.mp4"][row] for row in grown}) >= 19
    assert chosen != set(NAMES[:20]) and chosen != set(NAMES[-20:])


def test_entries_of_one_file_stay_on_one_side():
    names = [f"{i // 3}.mp4" for i in range(60)]
    train, held = split(records(names), 0.2, "/data")
    assert not {names[row] for row in train} & {names[row] for row in held}
    assert len(held) == 12


def test_small_sets():
    assert split(records(NAMES[:3]), 0.0, "/data") == ([0, 1, 2], [])
    assert len(split(records(NAMES[:3]), 0.01, "/data")[1]) == 1
    with pytest.raises(UserError, match=r"held_out_share.*\n.*leaves nothing to train on"):
        split(records(["a.mp4", "a.mp4"]), 0.5, "/data")


def test_a_file_in_both_lists_is_refused():
    refuse_shared(records(NAMES[:3]), records(NAMES[3:6]))
    with pytest.raises(UserError, match=r"train_data_meta has 2 of its files too: .*/001\.mp4, .*/002\.mp4; held-out"):
        refuse_shared(records(NAMES[:3]), records(NAMES[1:6]))


def test_copies_stay_on_one_side():
    rows = [replace(row, content=1 + row.entry // 2) for row in records(NAMES)]
    train, held = split(rows, 0.2, "/data")
    assert not {rows[row].content for row in train} & {rows[row].content for row in held}
    assert len(held) == 40
    alone = [replace(row, content=1 + row.entry) for row in records(NAMES)]
    assert split(alone, 0.1, "/data") == split(records(NAMES), 0.1, "/data")  # as without copies


def test_a_copy_in_the_other_list_is_refused(tmp_path):
    for name, data in {"a.mp4": b"1" * 99, "copy.mp4": b"1" * 99, "other.mp4": b"2" * 99}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a.mp4")

    def listed(*names):
        return [replace(row, content=7) for row in records(names, root=str(tmp_path))]

    for name in ("copy.mp4", "link.mp4"):
        with pytest.raises(UserError, match=rf"has 1 of its files too: .*/{name} \(the same as .*/a\.mp4\)"):
            refuse_shared(listed("a.mp4"), listed(name))
    refuse_shared(listed("a.mp4"), listed("other.mp4"))  # ends alike, and not the rest


RULES = SizeRules(video_sample_n_frames=49, video_sample_stride=2, video_sample_size=256, image_sample_size=256)


def test_a_record_is_always_read_alike():
    draw = fixed_draw(CLIP, 3, RULES)
    assert draw == fixed_draw(CLIP, 3, RULES)
    assert draw.shape == Shape(49, 256, 256)
    assert draw.frames == tuple(range(1, 99, 2))  # 97 of 100 frames are spanned: starts 0 to 3, the middle is 1
    assert draw.crop[:2] == (256, 455) and draw.crop.left == 100  # of 99.5, to the even side
    assert (draw.record, draw.ref_frame, draw.repeat) == (3, 0, False)
    assert draw.seed != fixed_draw(CLIP, 4, RULES).seed
    image = replace(CLIP, kind="image", frames=1, fps=0.0, height=100, width=100)
    assert fixed_draw(image, 0, RULES).frames == (0,) and fixed_draw(image, 0, RULES).shape == Shape(1, 256, 256)


def test_the_likeliest_size_is_taken():
    rules = replace(
        RULES,
        image_sample_size=1024,
        token_sample_size=512,
        random_hw_adapt=True,
        training_with_video_token_length=True,
        random_frame_crop=True,
        enable_bucket=True,
    )
    draw = fixed_draw(replace(CLIP, height=1024, width=1024), 0, rules)
    assert draw.shape == Shape(49, 512, 512)  # the rung nearest token_sample_size, at full length
    fixed = replace(RULES, fix_sample_size=(128, 224), geometry=Geometry())
    assert fixed_draw(CLIP, 0, fixed).shape == Shape(49, 128, 224)
