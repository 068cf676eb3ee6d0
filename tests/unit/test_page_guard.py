"""Who may ask the page, tried with an attacker's mind."""

import json
import os

import pytest

pytest.importorskip("starlette", reason="the page needs reeltune[page]")

from starlette.testclient import TestClient

from reeltune.page.app import make_app
from reeltune.page.command import listening
from reeltune.page.found import Shelf

TOKEN = "a-token-of-this-test"
HOST = "http://127.0.0.1:8765"
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


@pytest.fixture
def folder(tmp_path):
    inside, outside = tmp_path / "served", tmp_path / "outside"
    run = inside / "run"
    (run / "previews/step-0").mkdir(parents=True)
    (run / "previews/step-5").mkdir()
    outside.mkdir()
    (outside / "secret.mp4").write_bytes(b"secret")
    (run / "run.json").write_text("{}")
    (run / "previews/step-0/0.mp4").write_bytes(bytes(range(256)) * 40)
    (run / "previews/step-0/0.json").write_text(json.dumps({"prompt": EVIL, "seed": 1}))
    (run / "previews/step-5/0.mp4").symlink_to(outside / "secret.mp4")
    (run / "hidden.mp4").write_bytes(b"no list and no run names it")
    return inside


@pytest.fixture
def client(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    with TestClient(make_app(folder, TOKEN), base_url=HOST, follow_redirects=False) as client:
        yield client


@pytest.fixture
def known(client):
    """A browser that has been let in."""
    assert client.get(f"/?token={TOKEN}").status_code == 303
    return client


def run_id(folder):
    return Shelf(folder).id_of(folder / "run")


def test_the_token_is_asked_for_once_and_does_not_stay_in_the_address(client):
    assert client.get("/").status_code == 403
    for wrong in ("", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ä"):
        assert client.get("/", params={"token": wrong}).status_code == 403
    assert client.get(f"/?token={TOKEN}&token=x").status_code == 403
    answer = client.get(f"/compare?token={TOKEN}&a=1")
    assert (answer.status_code, answer.headers["location"]) == (303, "/compare?a=1")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "domain" not in cookie
    assert TOKEN not in answer.headers["set-cookie"], "who sees the cookie must not have the token"
    assert client.get("/").status_code == 200
    client.cookies.clear()
    assert (
        client.get("/", headers={"cookie": f"{answer.headers['set-cookie'].split('=')[0]}={TOKEN}"}).status_code == 403
    )


def test_the_token_leads_to_no_other_site(client):
    for path in ("//evil.example", "/\\evil.example", "//evil.example/%2e%2e"):
        answer = client.get(f"{HOST}{path}?token={TOKEN}")
        assert not answer.headers.get("location", "/").startswith(("//", "/\\", "http")), answer.headers


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example", "",
     "127.0.0.1@evil.example", "127.0.0.1:x", "0.0.0.0:8765", "127.0.0.1/evil"],
)  # fmt: skip
def test_a_name_that_was_rebound_to_this_machine_is_refused(known, host):
    assert known.get("/", headers={"host": host}).status_code == 403
    assert known.get(f"/?token={TOKEN}", headers={"host": host}).status_code == 403


def test_a_port_that_ssh_forwards_is_let_in(known):
    assert known.get("/", headers={"host": "localhost:9000"}).status_code == 200


def test_two_hosts_are_refused(known):
    assert known.request("GET", "/", headers=[("host", "127.0.0.1"), ("host", "evil.example")]).status_code == 403


@pytest.mark.parametrize(
    "origin", [None, "null", "http://evil.example", "http://127.0.0.1:3000", "https://127.0.0.1:8765"]
)
def test_a_form_of_another_page_is_refused(known, folder, origin):
    headers = {} if origin is None else {"origin": origin}
    answer = known.post(f"/runs/{run_id(folder)}/stop", headers=headers)
    assert answer.status_code == 403 and "Origin" in answer.text


@pytest.mark.parametrize("site", ["cross-site", "same-site"])  # same-site: another port of this machine
def test_what_another_site_fetches_is_refused(known, folder, site):
    headers = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    assert known.get("/", headers=headers).status_code == 403
    assert known.get("/", headers={**headers, "sec-fetch-mode": "navigate"}).status_code == 200
    posted = {**headers, "sec-fetch-mode": "navigate", "origin": HOST}
    assert known.post(f"/runs/{run_id(folder)}/stop", headers=posted).status_code == 403


def test_too_much_is_refused(known, folder):
    address = f"/runs/{run_id(folder)}/stop"
    assert known.post(address, headers={"origin": HOST}, content=b"x" * 1_000_001).status_code == 413
    assert known.post(address, headers={"origin": HOST}, content=iter([b"x"])).status_code == 411


def test_every_answer_allows_no_inline_script_and_no_frame(client):
    for answer in (client.get("/"), client.get(f"/?token={TOKEN}"), client.get("/"), client.get("/nothing")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert "access-control-allow-origin" not in answer.headers


def test_nothing_is_done_without_its_flag(known, folder):
    for action in ("stop", "resume"):
        answer = known.post(f"/runs/{run_id(folder)}/{action}", headers={"origin": HOST})
        assert answer.status_code == 403 and "--run" in answer.text
        assert known.get(f"/runs/{run_id(folder)}/{action}").status_code == 405


def test_clips_come_by_id_and_by_ranges(known, folder):
    address = f"/runs/{run_id(folder)}/clip/0/0"
    assert len(known.get(address).content) == 10240
    part = known.get(address, headers={"range": "bytes=250-260"})
    assert (part.status_code, part.content) == (206, bytes([*range(250, 256), *range(5)]))
    assert part.headers["content-range"] == "bytes 250-260/10240"
    assert known.get(address, headers={"range": "bytes=20000-"}).status_code == 416


@pytest.mark.parametrize(
    "path",
    ["clip/5/0", "clip/..%2f..%2f../0", "clip/0/..%2f..%2f..%2fhidden", "clip/control/-1", "clip/0/0.mp4", "clip/²/0",
     "first/..%2frun.json", "first/run.json", "first/%2fetc%2fpasswd", "hidden.mp4", "clip/99999999999999999999/0"],
)  # fmt: skip
def test_no_other_file_can_be_had(known, folder, path):
    answer = known.get(f"/runs/{run_id(folder)}/{path}")
    assert answer.status_code == 404 and b"secret" not in answer.content


def test_a_link_out_of_the_folder_is_no_run(folder, known):
    outside = folder.parent / "outside"
    (outside / "run.json").write_text("{}")
    (folder / "linked").symlink_to(outside)
    (folder / "other").mkdir()
    (folder / "other/metrics.jsonl").symlink_to(outside / "run.json")
    (folder / "evil.json").symlink_to(outside / "list.json")
    (outside / "list.json").write_text('[{"file_path": "secret.mp4", "text": ""}]')
    found = Shelf(folder).look()
    assert [path.name for path in found.runs.values()] == ["run"] and not found.lists
    (folder / "other/metrics.jsonl").unlink()
    (folder / "other/metrics.jsonl").symlink_to(folder / "run/run.json")
    assert {path.name for path in Shelf(folder).look().runs.values()} == {"run", "other"}


def test_an_unknown_id_is_not_found(known, folder):
    for id in ("0" * 16, "run", "..", "%2e%2e", os.path.relpath(folder / "run", folder)):
        assert known.get(f"/runs/{id}").status_code in (404, 200 if id in ("..", "%2e%2e") else 404)


def test_what_files_say_is_escaped(known, folder):
    evil = folder / EVIL.replace("/", "")
    evil.mkdir()
    (evil / "run.json").write_text(json.dumps({"family": EVIL, "mode": EVIL, "versions": {EVIL: EVIL}}))
    (evil / "metrics.jsonl").write_text(json.dumps({"kind": "notice", "step": 0, "text": EVIL}) + "\n")
    (evil / "recipe.yaml").write_text(json.dumps({"validation_prompts": [EVIL], "train_data_meta": EVIL}))
    id, own = Shelf(folder).id_of(evil), run_id(folder)
    for path in (
        "/",
        f"/runs/{id}",
        f"/runs/{id}/head",
        f"/runs/{id}/charts",
        f"/runs/{own}/clips",
        f"/compare?a={id}&b={own}",
    ):
        answer = known.get(path)
        assert answer.status_code == 200, (path, answer.text)
        assert "<script>alert" not in answer.text and "<img src=x" not in answer.text, path
        assert "&lt;script&gt;" in answer.text or path.endswith("/head"), path


def test_a_metrics_file_of_something_else_is_told_and_not_raised(known, folder):
    (folder / "run/metrics.jsonl").write_text('{"kind": "notice", "step": 0, "text": ""}\nnonsense\n')
    answer = known.get(f"/runs/{run_id(folder)}/head")
    assert answer.status_code == 422 and "line 2 is no row of a run" in answer.text
    assert known.get("/").status_code == 200


def test_the_server_listens_on_loopback_alone():
    with listening(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
