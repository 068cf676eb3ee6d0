"""Captions edited in the page: in a copy of the list, one change after another, each undone."""

import json
import shutil

import pytest

pytest.importorskip("starlette", reason="the page needs reeltune[page]")

from reeltune.core.errors import UserError
from reeltune.page import captions
from tests.unit import test_page_data
from tests.unit.test_page_data import client_of, id_of

folder = test_page_data.folder


def test_a_copy_that_is_a_link_is_not_written(folder):
    outside = folder.parent / "theirs.json"
    shutil.copy(folder / "metadata.json", outside)
    (folder / "metadata.edited.json").symlink_to(outside)
    before = outside.read_bytes()
    assert save(client_of(folder, edit=True), folder, 2, "ball 2", "mine").status_code == 422
    assert outside.read_bytes() == before and (folder / "metadata.edited.json").is_symlink()


def save(client, folder, entry, was, text, name="metadata.json"):
    return client.post(
        f"/lists/{id_of(folder, name)}/{entry}/caption", data={"was": was, "text": text}, follow_redirects=False
    )


def test_a_caption_is_changed_in_a_copy_and_undone(folder):
    before = (folder / "metadata.json").read_bytes()
    client = client_of(folder, edit=True)
    answer = save(client, folder, 2, "ball 2", "a <i>ball</i>, äöü")
    copy = folder / "metadata.edited.json"
    assert answer.status_code == 303 and id_of(folder, copy.name) in answer.headers["location"]
    assert answer.headers["location"].endswith("#e2")
    wanted = json.loads(before)
    wanted[2]["text"] = "a <i>ball</i>, äöü"
    assert json.loads(copy.read_text()) == wanted and (folder / "metadata.json").read_bytes() == before
    assert save(client, folder, 2, "a <i>ball</i>, äöü", "again", copy.name).status_code == 303
    assert save(client, folder, 3, "ball 3", "third", copy.name).status_code == 303
    undo = f"/lists/{id_of(folder, copy.name)}/undo"
    texts = []
    for _ in range(3):
        assert client.post(undo, follow_redirects=False).status_code == 303
        texts.append([row["text"] for row in json.loads(copy.read_text())[2:4]])
    assert texts == [["again", "ball 3"], ["a <i>ball</i>, äöü", "ball 3"], ["ball 2", "ball 3"]]
    assert client.post(undo).status_code == 422
    assert sorted(path.name for path in folder.glob("*.json")) == ["metadata.edited.json", "metadata.json"]


def test_a_caption_that_another_has_changed_is_not_overwritten(folder):
    client = client_of(folder, edit=True)
    assert save(client, folder, 2, "ball 9", "mine").status_code == 422
    assert save(client, folder, 2, "ball 2", "mine").status_code == 303
    assert save(client, folder, 2, "ball 2", "theirs").status_code == 422, "the copy has mine by now"
    assert json.loads((folder / "metadata.edited.json").read_text())[2]["text"] == "mine"
    assert save(client, folder, 99, "", "x").status_code == 404
    assert save(client, folder, 2, "ball 2", "x" * 20_001).status_code == 422


def test_captions_are_read_only_without_the_flag(folder):
    client = client_of(folder)
    assert save(client, folder, 2, "ball 2", "mine").status_code == 403
    assert client.post(f"/lists/{id_of(folder)}/undo").status_code == 403
    assert [path.name for path in folder.glob("*.json")] == ["metadata.json"]
    assert "<textarea" not in client.get(f"/lists/{id_of(folder)}").text


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv"])
def test_each_form_of_a_list_keeps_all_else(tmp_path, ending):
    from reeltune.data.lists import rows

    path = tmp_path / f"m.{ending}"
    path.write_text(
        {
            "json": '[{"file_path": "a", "text": "one", "n": 1.0}, {"text": "two", "file_path": "b"}]',
            "jsonl": '{"file_path": "a", "text": "one", "n": 1.0}\n\n{"text": "two", "file_path": "b"}\n',
            "csv": 'file_path,text,n\na,"one",1.0\n\nb,two,\n',
        }[ending]
    )
    before = list(rows(path, path.read_bytes()))
    change = captions.Change(1, "two", 'three, "quoted"\nand more', "b")
    copy = captions.edit(path, change, tmp_path / "undo.json")
    after = list(rows(copy, copy.read_bytes()))
    assert after == [before[0], {**before[1], "text": 'three, "quoted"\nand more'}]
    captions.undo_last(copy, tmp_path / "undo.json")
    assert list(rows(copy, copy.read_bytes())) == before
    for other in (
        captions.Change(1, "wrong", "x", "b"),
        captions.Change(1, "two", "x", "a"),
        captions.Change(2, "", ""),
    ):
        with pytest.raises(UserError, match="another by now, or has another caption"):
            captions.edit(path, other, tmp_path / "undo.json")
    assert list(rows(copy, copy.read_bytes())) == before


def test_a_list_that_has_grown_since_its_copy_gets_no_caption_at_another_entry(folder):
    """Both entries without a caption, so that the caption alone does not tell them apart."""
    rows = [{"file_path": f"{i}.mp4", "text": "", "type": "video"} for i in range(3)]
    (folder / "metadata.json").write_text(json.dumps(rows[1:]))
    client = client_of(folder, edit=True)
    assert save(client, folder, 1, "", "of 2").status_code == 303
    (folder / "metadata.json").write_text(json.dumps(rows))
    assert save(client, folder, 0, "", "of 0").status_code == 422
    assert [row["text"] for row in json.loads((folder / "metadata.edited.json").read_text())] == ["", "of 2"]


def test_half_a_surrogate_pair_is_shown_and_kept(folder):
    rows = [{"file_path": "0.mp4", "text": "ball"}, {"file_path": "1.mp4", "text": "\ud800", "note": "\udcff"}]
    (folder / "metadata.json").write_text(json.dumps(rows))
    client = client_of(folder, edit=True)
    assert "\\ud800" in client.get(f"/lists/{id_of(folder)}").text
    assert save(client, folder, 0, "ball", "a ball").status_code == 303
    assert json.loads((folder / "metadata.edited.json").read_text()) == [{**rows[0], "text": "a ball"}, rows[1]]
