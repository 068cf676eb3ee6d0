"""A new run's form: the Recipe's own fields, its rules, check and plan."""

import time

import pytest

pytest.importorskip("starlette", reason="the page needs reeltune[page]")

from starlette.testclient import TestClient

from reeltune.config.parse import build, flat, read, sentences, settings
from reeltune.config.recipe import Recipe
from reeltune.page import actions, form
from reeltune.page.app import make_app
from reeltune.page.found import Shelf
from tests.unit.test_page_data import HOST, RECIPE, folder  # noqa: F401

NEEDED = {"pretrained_model_name_or_path": "m", "train_data_dir": "d", "train_data_meta": "d/l.json"}


def filled(tree):
    """What a browser sends of the form of a recipe, when nothing is touched."""
    sent = {"switches": "there"}
    for fields in form.fields_of(tree).values():
        for one in fields:
            if not one.setting.is_switch:
                sent[one.setting.name] = one.value
            elif one.on:
                sent[one.setting.name] = "true"
    return sent


def test_the_form_has_every_setting_once_with_its_sentence():
    fields = [one for section in form.fields_of({}).values() for one in section]
    assert [one.setting.name for one in fields] == list(settings())
    assert all(one.sentence == sentences()[one.setting.name] and not one.value for one in fields)


def test_an_empty_form_is_the_default_recipe():
    assert form.tree_of(filled({})) == {}
    assert build(form.tree_of(filled({}))) == Recipe()


@pytest.mark.parametrize(
    "tree",
    [
        {**NEEDED, "save_in_background": "false", "gradient_checkpointing": "true", "max_grad_norm": "null"},
        {**NEEDED, "gradient_checkpointing": "attention_kept", "attention": "flash"},
        {**NEEDED, "validation_prompts": ["a red kite, by the sea", "two  spaces"], "fix_sample_size": ["64", "96"]},
        {**NEEDED, "report_to": ["none"], "train_mode": "control", "learning_rate": "3e-5", "max_train_steps": 5},
        {**NEEDED, "target_name": ["q", "ffn.0"], "rank": "4", "negative_prompt": "blurred\nand dark"},
    ],
)
def test_a_recipe_goes_through_the_form_unchanged(tree, tmp_path):
    sent = form.tree_of(filled(tree))
    assert build(sent) == build(tree)
    (tmp_path / "r.yaml").write_text(form.as_yaml(sent))
    written = read(tmp_path / "r.yaml")
    assert build(written) == build(tree)
    usual = flat(Recipe())
    assert all(flat(build(tree))[name] != usual[name] for name in written), "what is so anyway is not written"


def test_a_switch_that_is_on_by_default_can_be_put_off():
    assert settings()["save_in_background"].default is True
    sent = filled({})
    del sent["save_in_background"]
    assert form.tree_of(sent) == {"save_in_background": "false"}


def client_of(served, **allowed):
    client = TestClient(make_app(served, "token", **allowed), base_url=HOST, headers={"origin": HOST})
    client.get("/?token=token")
    return client


def test_rules_are_told_at_once(folder):  # noqa: F811
    client = client_of(folder)
    told = client.post(
        "/recipe/verdict", data={**filled(NEEDED), "learning_rate": "<b>much", "train_batch_size": "0"}
    ).text
    assert "learning_rate is &#39;&lt;b&gt;much&#39;; expected a number" in told
    assert "train_batch_size is 0" in told and "<b>much" not in told
    assert "train_data_dir is missing" in client.post("/recipe/verdict", data=filled({})).text


@pytest.mark.slow
def test_check_and_plan_say_what_the_commands_say(folder):  # noqa: F811
    client = client_of(folder)
    sent = {**filled(read(folder / "toy.yaml")), "plan.device": "1GB"}
    deadline = time.monotonic() + 300
    while "checking and planning" in (told := client.post("/recipe/verdict", data=sent).text):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "It fits." in told and "of 1.0 GB on one device" in told
    assert "entry 6, gone.mp4" in told and "train_mode normal" in told
    assert not (folder / "run").exists()


def test_a_recipe_is_saved_and_never_over_another(folder):  # noqa: F811
    client, tree = client_of(folder, edit=True), read(folder / "toy.yaml")
    answer = client.post("/recipe/save", data={**filled(tree), "save_as": "mine.yaml"})
    assert answer.status_code == 200 and f"reeltune train {folder / 'mine.yaml'}" in answer.text
    assert build(read(folder / "mine.yaml")) == build(tree)
    assert client.post("/recipe/save", data={**filled(tree), "save_as": "mine.yaml"}).status_code == 200
    other = {**filled(tree), "seed": "7"}
    assert client.post("/recipe/save", data={**other, "save_as": "mine.yaml"}).status_code == 422
    assert build(read(folder / "mine.yaml")) == build(tree)
    for name in ("../out.yaml", "/elsewhere/out.yaml", "a/b.yaml", "..", ".hidden.yaml", "page.html", "x\0.yaml"):
        assert client.post("/recipe/save", data={**filled(tree), "save_as": name}).status_code == 422, name
    assert client.post("/recipe/save", data={**filled({}), "save_as": "bad.yaml"}).status_code == 422
    (folder / "folder.yaml").mkdir()
    (folder / "other.yaml").write_bytes(b"\xff\xfe")
    for name in ("folder.yaml", "other.yaml"):
        assert client.post("/recipe/save", data={**filled(tree), "save_as": name}).status_code == 422, name
    assert (folder / "other.yaml").read_bytes() == b"\xff\xfe"
    names = ["folder.yaml", "mine.yaml", "other.yaml", "toy.yaml"]
    assert sorted(path.name for path in folder.glob("*.yaml")) == names
    assert not list(folder.parent.glob("*.yaml"))


def test_without_their_flags_nothing_is_saved_or_started(folder, monkeypatch):  # noqa: F811
    started = []
    monkeypatch.setattr(actions, "start", lambda *a: started.append(a))
    id = Shelf(folder).id_of(folder / "toy.yaml")
    client = client_of(folder)
    assert (
        client.post("/recipe/save", data={**filled(read(folder / "toy.yaml")), "save_as": "a.yaml"}).status_code == 403
    )
    assert client.post(f"/recipe/{id}/start").status_code == 403
    assert client.get("/logs/x.log").status_code == 403
    assert client_of(folder, edit=True).post(f"/recipe/{id}/start").status_code == 403
    assert not started and not (folder / "a.yaml").exists()


def test_what_is_started_is_the_command_that_was_shown(folder, monkeypatch):  # noqa: F811
    started = []
    log = folder.parent / "x.log"
    monkeypatch.setattr(actions, "start", lambda *a: started.append(a) or log)
    client, id = client_of(folder, run=True), Shelf(folder).id_of(folder / "toy.yaml")
    assert client.post(f"/recipe/{id}/start").status_code == 200
    assert started[0][0] == ["reeltune", "train", str(folder / "toy.yaml")]
    for name in ("..%2fx.log", "x.log", "%2fetc%2fpasswd"):
        assert client.get(f"/logs/{name}").status_code == 404
