"""Lists as they are looked at in the page."""

import csv
import json
import threading
import time

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the page needs reeltune[page]")

from PIL import Image
from starlette.testclient import TestClient

from reeltune.control.outcome import LEDGER
from reeltune.control.records import Made
from reeltune.control.records import Records as ControlRecords
from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Shape
from reeltune.data.keypoints import Keypoints, People, write_keypoints
from reeltune.data.media import read_frames, write_clip
from reeltune.page import jobs, seen
from reeltune.page.app import make_app
from reeltune.page.found import Shelf
from reeltune.page.jobs import Jobs
from reeltune.page.judged import by_recipe, by_scan
from reeltune.page.listing import Listings, read_listing
from reeltune.page.pictures import SIDE, poster
from reeltune.reporting import charts
from reeltune.run.data import gather

HOST = "http://127.0.0.1:8765"
FRAMES = 9
RECIPE = """
pretrained_model_name_or_path: {model}
train_data_dir: {folder}
train_data_meta: {folder}/metadata.json
output_dir: {folder}/run
video_sample_n_frames: 5
video_sample_stride: 1
video_sample_size: 64
image_sample_size: 64
train_batch_size: 2
train_mode: normal
held_out_share: 0.2
max_bad_share: 0.5
"""


def ball(path, shade, size=(64, 96), frames=FRAMES):
    frames_FHWC = np.full((frames, *size, 3), shade, np.uint8)
    for i in range(frames):
        frames_FHWC[i, 10:20, 3 * i : 3 * i + 10] = 255
    write_clip(path, frames_FHWC, 8.0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A list of five clips, one of them short, a picture, and an entry whose file is not there. What a page began to
    measure in them ends with the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = tmp_path / "served"
    served.mkdir()
    rows = []
    for i in range(5):
        ball(served / f"{i}.mp4", 40 * i, frames=FRAMES if i else 3)
        rows.append({"file_path": f"{i}.mp4", "text": f"ball {i}", "type": "video", "source": i})
    ball(served / "control.mp4", 0)
    rows[1]["control_file_path"] = "control.mp4"
    Image.new("RGB", (200, 100), "red").save(served / "red.png")
    rows.append({"file_path": "red.png", "text": "", "type": "image"})
    rows.append({"file_path": "gone.mp4", "text": "<b>gone</b>", "type": "video"})
    (served / "metadata.json").write_text(json.dumps(rows))
    (served / "model").mkdir()
    (served / "model/toy.json").write_text("{}")
    (served / "toy.yaml").write_text(RECIPE.format(folder=served, model=served / "model"))
    yield served
    for thread in threading.enumerate():
        if thread.name == jobs.THREAD:
            thread.join()


FORM = {"pretrained_model_name_or_path": "m", "train_data_dir": "d", "train_data_meta": "d/l.json"}


def within(folder):
    return Shelf(folder).holds


def client_of(folder, **allowed):
    client = TestClient(make_app(folder, "token", **allowed), base_url=HOST, headers={"origin": HOST})
    client.get("/?token=token")
    return client


def id_of(folder, name="metadata.json"):
    return Shelf(folder).id_of(folder / name)


def once_measured(client, address):
    deadline = time.monotonic() + 300
    while "measuring …" in (answer := client.get(address)).text and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer


# ---- controls


def waving(path, frames=FRAMES, size=(64, 96)):
    """Key points of one person whose wrist moves, beside a clip of that size."""
    points_NP2, scores_NP = np.full((1, 17, 2), [48.0, 32.0]), np.ones((1, 17))
    people = []
    for i in range(frames):
        points_NP2 = points_NP2.copy()
        points_NP2[0, 9] = (8 + 6 * i, 8)
        people.append(People(points_NP2, scores_NP, np.array([[0.0, 0, 96, 64]]), np.ones(1)))
    height, width = size
    made = Keypoints.of(people, np.arange(frames) / 8, layout="coco", height=height, width=width, detector="d")
    write_keypoints(path, made)


def test_key_points_are_drawn_as_the_reader_draws_them(folder):
    rows = json.loads((folder / "metadata.json").read_text())
    rows[2]["control_file_path"], rows[3]["control_file_path"] = "pose.npz", "broken.npz"
    (folder / "metadata.json").write_text(json.dumps(rows))
    waving(folder / "pose.npz")
    (folder / "broken.npz").write_bytes(b"PK")
    with client_of(folder) as client:
        address = f"/lists/{id_of(folder)}"
        clip = client.get(f"{address}/2/control?by=alone")
        assert clip.headers["content-type"] == "video/mp4"
        (folder.parent / "shown.mp4").write_bytes(clip.content)
        shape, crop = Shape(FRAMES, 64, 96), Crop(64, 96, 0, 0)
        shown, drawn = (
            read_frames(path, range(FRAMES), crop, shape) for path in (folder.parent / "shown.mp4", folder / "pose.npz")
        )
        assert drawn.any() and np.abs(shown.astype(int) - drawn).mean() < 4
        picture = client.get(f"{address}/2/control/poster?by=alone")
        assert picture.headers["content-type"] == "image/jpeg"
        assert client.get(f"{address}/3/control?by=alone").status_code == 404
        assert client.get(f"{address}/3/control/poster?by=alone").status_code == 404


def test_what_reeltune_control_says_of_controls_and_of_entries_without_one(folder):
    control = folder / "control/canny/1.mp4.mp4"
    ball(control, 0)
    made = Made(key="k", kind="canny", clip="1.mp4", control="control/canny/1.mp4.mp4", detector="d",
                bytes=control.stat().st_size, score=0.625)  # fmt: skip
    ControlRecords(folder).put(made)
    row = {"file_path": "1.mp4", "text": "ball", "type": "video", "control_file_path": made.control}
    (folder / "canny.json").write_text(json.dumps([row]))
    ledger = "entry,file_path,kind,status,score,control_file_path,reason\n"
    ledger += "1,1.mp4,canny,made,0.625,control/canny/1.mp4.mp4,\n0,0.mp4,canny,left out,0.01,,its score is <low>\n"
    (folder / "canny_ledger.csv").write_text(ledger)
    with client_of(folder) as client:
        page = client.get(f"/lists/{id_of(folder, 'canny.json')}?by=alone").text
        assert "canny of score 0.62" in page
        assert "1 entry has no control" in page and "its score is &lt;low&gt;" in page
        (folder / "canny_ledger.csv").write_text("file_path,reason\n")
        ControlRecords(folder).path("canny", made.control).write_text("{")
        page = client.get(f"/lists/{id_of(folder, 'canny.json')}?by=alone")
        assert page.status_code == 200 and "Left out by" not in page.text and "control: " in page.text


@pytest.fixture
def short_fields():
    """As before any list was read."""
    before = csv.field_size_limit(2**17)
    yield
    csv.field_size_limit(before)


def test_a_ledger_that_is_none_is_told(folder, short_fields):
    ledger = folder / "metadata_ledger.csv"
    ledger.write_text(",".join(LEDGER) + "\n1," + "y" * 200_000 + ",canny,left out,\n")
    answer = client_of(folder).get(f"/lists/{id_of(folder)}")
    assert answer.status_code == 422 and "delete it, and run reeltune control again" in answer.text


def test_paths_that_the_system_refuses_are_told_and_spoil_no_page(folder):
    rows = [{"file_path": "x" * 5000 + ".mp4", "text": "too long"}, {"file_path": "0.mp4", "text": "ball"}]
    (folder / "long.json").write_text(json.dumps(rows))
    client = client_of(folder)
    answer = client.get(f"/lists/{id_of(folder, 'long.json')}")
    assert answer.status_code == 200 and "too long" in answer.text
    answer = client.post("/recipe/verdict", data={**FORM, "output_dir": "9" * 5000})
    assert answer.status_code == 422 and "File name too long" in answer.text


def test_once_files_are_measured_the_page_is_loaded_anew_once(folder, monkeypatch):
    """Each answer brings what asks next; one that went on by itself would begin a slow load anew each time."""
    drawings, ended = [], threading.Event()
    counts = charts.counts
    monkeypatch.setattr(charts, "counts", lambda *given: drawings.append(1) or counts(*given))
    monkeypatch.setattr("reeltune.page.judged.gather", lambda *a, real=gather, **k: ended.wait(60) and real(*a, **k))
    with client_of(folder) as client:
        page = f"/lists/{id_of(folder)}"
        assert "every 1s" not in (first := client.get(page).text) and 'hx-trigger="load delay:1s"' in first
        going_on = client.get(f"{page}/state")
        assert 'hx-trigger="load delay:1s"' in going_on.text and "hx-refresh" not in going_on.headers
        ended.set()
        assert "<svg" in once_measured(client, page).text and "<svg" in client.get(page).text
        last = client.get(f"{page}/state")
        assert last.headers["hx-refresh"] == "true" and "hx-" not in last.text
        assert drawings == [1]


# ---- a list


def test_what_the_rows_alone_tell(folder):
    listing = read_listing(folder / "metadata.json", folder)
    kept = {name: entries.tolist() for name, entries in listing.kept.items()}
    assert kept == {
        "all": list(range(7)),
        "unsound": [],
        "uncaptioned": [5],
        "uncontrolled": [0, 2, 3, 4, 5, 6],
        "twice": [],
    }
    assert listing.searched(range(7), "BALL 3").tolist() == [3]


def test_a_list_is_read_anew_once_it_has_changed(folder):
    reads = []
    listings = Listings(lambda path, data_dir: reads.append(path) or read_listing(path, data_dir))
    path = folder / "metadata.json"
    assert listings.get(path, folder) is listings.get(path, folder) and len(reads) == 1
    path.write_text(json.dumps(json.loads(path.read_text())[:2]))
    assert len(listings.get(path, folder).entries) == 2 and len(reads) == 2


def test_a_recipe_tells_what_training_would_do_with_each_entry(folder):
    judged = by_recipe(folder / "toy.yaml", folder.parent / "store", within(folder))
    assert list(judged.reasons) == [6] and "No such file" in judged.reasons[6]
    assert judged.kept["left_out"].tolist() == [6]
    assert len(judged.kept["held_out"]) == 1
    assert judged.kept["short"].tolist() == [entry for entry in [0] if entry not in judged.kept["held_out"]]
    trained = set(judged.records) - set(judged.kept["held_out"].tolist())
    assert len(trained) == 5 and sum(bucket.samples for bucket in judged.buckets) == 2 * judged.micro_steps
    assert not (folder / "run").exists(), "to look writes nothing below the folder"


def test_without_a_recipe_files_are_measured(folder):
    judged = by_scan(folder / "metadata.json", folder, folder.parent / "store")
    assert sorted(judged.records) == [0, 1, 2, 3, 4, 5] and (judged.records[5].height, judged.records[5].width) == (
        100,
        200,
    )
    assert judged.kept["left_out"].tolist() == [6]


def test_as_the_model_sees_it_is_what_the_reader_gives(folder):
    judged = by_recipe(folder / "toy.yaml", folder.parent / "store", within(folder))
    found = seen.micro_step(judged, 3, 0, folder.parent / "store", within(folder))
    batch = judged.inputs.reader[3, 0, 0, 1]
    assert [sample["text"] for sample in found["samples"]] == batch.text and len(batch.text) == 2
    assert found["shape"] == tuple(batch.pixels_BFCHW.shape[i] for i in (1, 3, 4))
    assert [sample["entry"] for sample in found["samples"]] == [
        judged.inputs.train[d.record].entry for d in batch.draws
    ]
    for i, sample in enumerate(found["samples"]):
        assert f"{i}_pixels.mp4" in [file["name"] for file in sample["files"]]
    assert seen.micro_step(judged, 3, 0, folder.parent / "store", within(folder))["key"] == found["key"]
    assert seen.micro_step(judged, 4, 0, folder.parent / "store", within(folder))["key"] != found["key"]
    with pytest.raises(LookupError):
        seen.micro_step(judged, 0, judged.micro_steps, folder.parent / "store", within(folder))


def test_posters_are_made_once_and_small(folder):
    store = folder.parent / "store"
    made = poster(folder / "red.png", store)
    with Image.open(made) as picture:
        assert picture.size == (200, 100) and max(np.abs(np.array(picture.getpixel((50, 50))) - [254, 0, 0])) < 4
    ball(folder / "wide.mp4", 100, size=(320, 640))
    clip = poster(folder / "wide.mp4", store)
    with Image.open(clip) as picture:
        assert picture.size == (SIDE, SIDE // 2) and abs(picture.getpixel((300, 150))[0] - 100) < 4
    stamp = clip.stat().st_mtime_ns
    assert poster(folder / "wide.mp4", store) == clip and clip.stat().st_mtime_ns == stamp
    ball(folder / "wide.mp4", 200, size=(320, 640))
    assert poster(folder / "wide.mp4", store) != clip


# ---- the screen


def test_the_contact_sheet_shows_what_is_known(folder):
    client = client_of(folder)
    text = once_measured(client, f"/lists/{id_of(folder)}").text
    assert "As the model sees it" in text
    assert "96 x 64" in text and "9 frames, 8 per second" in text
    assert "<b>gone" not in text and "&lt;b&gt;gone" in text and "not there, or outside" in text
    assert "held out (1)" in text and "left out (1)" in text
    only = client.get(f"/lists/{id_of(folder)}?show=left_out").text
    assert only.count('class="card"') == 1 and "gone.mp4" in only
    assert client.get(f"/lists/{id_of(folder)}?show=nonsense").status_code == 404
    seen_ = client.get(f"/lists/{id_of(folder)}/seen?epoch=2&step=1").text
    assert "micro-step 1 of epoch 2" in seen_
    assert client.get(f"/lists/{id_of(folder)}/seen?step=99").status_code == 404


def test_a_long_list_is_measured_when_asked(folder, monkeypatch):
    begun = []
    monkeypatch.setattr(Jobs, "begin", lambda self, key, act: begun.append(key))
    (folder / "toy.yaml").unlink()
    rows = json.loads((folder / "metadata.json").read_text())
    (folder / "metadata.json").write_text(json.dumps(rows * 60))
    client, address = client_of(folder), f"/lists/{id_of(folder)}"
    text = client.get(f"{address}?page=17").text
    assert (
        "409 to 420 of 420" in text and text.count('class="card"') == 12 and "Measure all files" in text and not begun
    )
    assert "421" not in client.get(f"{address}?show=twice&page=99").text
    client.post(f"{address}/measure")
    assert len(begun) == 1


def test_files_come_by_their_entry_and_only_from_below_the_folder(folder):
    outside = folder.parent / "outside.mp4"
    ball(outside, 7)
    rows = json.loads((folder / "metadata.json").read_text())
    (folder / "link.mp4").symlink_to(outside)
    rows += [
        {"file_path": name, "text": ""} for name in ("../outside.mp4", str(outside), "link.mp4", "/etc/passwd.mp4")
    ]
    (folder / "metadata.json").write_text(json.dumps(rows))
    client, address = client_of(folder), f"/lists/{id_of(folder)}"
    assert client.get(f"{address}/1/clip").content == (folder / "1.mp4").read_bytes()
    assert client.get(f"{address}/1/control").content == (folder / "control.mp4").read_bytes()
    assert client.get(f"{address}/1/clip/poster").headers["content-type"] == "image/jpeg"
    assert client.get(f"{address}/0/control").status_code == 404
    for entry in range(6, 13):
        assert client.get(f"{address}/{entry}/clip").status_code == 404, entry
        assert client.get(f"{address}/{entry}/clip/poster").status_code == 404, entry
    for path in (
        "/seen/../../x",
        "/seen/%2e%2e/undo",
        f"{address}/1/text",
        f"{address}/-1/clip",
        f"{address}/1/clip%2f..",
    ):
        assert client.get(path).status_code == 404, path


def test_a_recipe_shows_nothing_from_outside(folder):
    """Not by its settings, and not by a link; what lies outside may be another's."""
    outside = folder.parent / "outside"
    outside.mkdir()
    for i in range(5):
        ball(outside / f"{i}.mp4", 7)
    recipe = folder / "toy.yaml"
    sound = recipe.read_text()
    store = folder.parent / "store"
    recipe.write_text(sound + "allow_outside_paths: true\n")
    with pytest.raises(UserError, match="outside of what is served"):
        by_recipe(recipe, store, within(folder))
    recipe.write_text(sound.replace(f"train_data_dir: {folder}", f"train_data_dir: {outside}"))
    with pytest.raises(UserError, match="outside of what is served"):
        by_recipe(recipe, store, within(folder))
    recipe.write_text(sound)
    for i in range(5):
        (folder / f"{i}.mp4").unlink()
        (folder / f"{i}.mp4").symlink_to(outside / f"{i}.mp4")
    judged = by_recipe(recipe, store, within(folder))
    with pytest.raises(UserError, match="leads out of the served folder"):
        for step in range(judged.micro_steps):
            seen.micro_step(judged, 0, step, store, within(folder))
    assert not [path for path in store.rglob("*.mp4")]
