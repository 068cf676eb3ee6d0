"""The page in a browser, on real clips and a run that trains: every screen opened, a caption edited, a run watched and
resumed. Skipped where there is no Chromium (Debian: apt-get install chromium) or no Playwright.

Each wait is for one thing to happen and bounds the silence before it, never the whole: a busy machine is only slower.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the page needs reeltune[page]")
pytest.importorskip("playwright", reason="the browser is driven by Playwright (pip install playwright)")

from playwright.sync_api import Error, expect, sync_playwright

from reeltune.page import live
from tests.unit.test_page_data import RECIPE, ball

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here (apt-get install chromium)"),
]
WAIT_MS = 300_000
FLAGS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking")
AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))  # npm install axe-core


@pytest.fixture(scope="module")
def address(folder):
    """With its token, of the command as a user starts it."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder.parent / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "reeltune", "serve", str(folder), "--port", "0", "--edit", "--run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", address), address
            yield address
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS], timeout=WAIT_MS)
        except Error as error:  # such as Ubuntu's, which only names a snap
            pytest.skip(f"{CHROMIUM} does not start here: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


@contextmanager
def visited(browser, address, **context):
    """A tab that has been let in. What the browser complains of fails the test: a broken policy, a script's error."""
    with browser.new_context(**context) as window:
        tab, complaints = window.new_page(), []
        tab.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.set_default_timeout(WAIT_MS)
        tab.goto(address)
        assert "token" not in tab.url
        yield tab
        assert complaints == []


def until(tab, script, *given):
    """Playwright's own wait_for_function evaluates strings, which the page's policy forbids."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while not tab.evaluate(script, *given):
        assert time.monotonic() < deadline, script
        time.sleep(0.1)


def begun(metrics, tab):
    """Returns once there is a step. Fails after a silence of all that the starting run writes."""
    files, since = 0, time.monotonic()
    while not metrics.exists() or b'"kind": "step"' not in metrics.read_bytes():
        now = sum(path.stat().st_size + 1 for path in metrics.parent.rglob("*") if path.is_file())
        files, since = (now, time.monotonic()) if now != files else (files, since)
        assert time.monotonic() - since < WAIT_MS / 1000, tab.locator("pre").inner_text()
        time.sleep(0.1)


def sound(tab):
    """No part is wider than the window; and what axe-core finds, where it is there."""
    wide, window = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= window, f"{tab.url} is {wide} pixels wide"
    if AXE.is_file():
        tab.evaluate(AXE.read_text(encoding="utf-8"))
        found = tab.evaluate("async () => (await axe.run()).violations.map(v => [v.id, v.nodes.map(n => n.html)])")
        assert found == [], tab.url


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "served"
    folder.mkdir()
    rows = []
    for i in range(6):
        ball(folder / f"{i}.mp4", 30 * i)
        ball(folder / f"{i}_control.mp4", 0)
        rows.append(
            {"file_path": f"{i}.mp4", "control_file_path": f"{i}_control.mp4", "text": f"ball {i}", "type": "video"}
        )
    (folder / "metadata.json").write_text(json.dumps(rows))
    (folder / "model").mkdir()
    (folder / "model/toy.json").write_text("{}")
    more = (
        "train_mode: control\nmax_train_steps: 400\nnum_train_epochs: 1000000\nmixed_precision: 'no'\nreport_to: none\n"
    )
    more += "preview_steps: 2\n"
    more += "dataloader_num_workers: 0\ncheckpointing_steps: 1000000\n"
    recipe = RECIPE.format(folder=folder, model=folder / "model")
    (folder / "toy.yaml").write_text(recipe.replace("train_mode: normal\n", "") + more)
    return folder


def test_a_list_is_looked_at_and_a_caption_edited(browser, folder, address):
    with visited(browser, address) as tab:
        tab.get_by_role("link", name="metadata.json").click()
        card = tab.locator(".card").nth(2)
        expect(card).to_contain_text("9 frames, 8 per second")  # measured meanwhile
        card.hover()
        until(tab, "document.querySelector('.card.awake video')?.currentTime > 0.2")
        assert tab.evaluate("[...document.querySelectorAll('.card.awake video')].length") == 4  # clip, control, both
        sound(tab)
        card.get_by_role("textbox").fill("a <b>red</b> ball")
        card.get_by_role("button", name="Save caption").click()
        expect(tab.locator("h1")).to_have_text("metadata.edited.json")
        expect(tab.locator("#e2 textarea")).to_have_value("a <b>red</b> ball")
        assert json.loads((folder / "metadata.edited.json").read_text())[2]["text"] == "a <b>red</b> ball"
        assert json.loads((folder / "metadata.json").read_text())[2]["text"] == "ball 2"
        tab.get_by_role("button", name="Undo").click()
        expect(tab.locator("#e2 textarea")).to_have_value("ball 2")
        tab.go_back()
    (folder / "metadata.edited.json").unlink()


def test_a_micro_step_is_seen(browser, folder, address):
    with visited(browser, address, color_scheme="dark") as tab:
        tab.get_by_role("link", name="metadata.json").click()
        tab.get_by_role("link", name="As the model sees it").click()
        expect(tab.locator("article")).to_have_count(2)
        tab.wait_for_load_state()  # and with it the script that answers keys
        tab.keyboard.press("ArrowRight")
        expect(tab.get_by_label("micro-step")).to_have_value("1")
        sound(tab)


@pytest.fixture
def run(folder):
    """Where the run will be; it ends with the test, however that ends."""
    yield folder / "run"
    if (pid := live.holder(folder / "run")) is not None:
        os.kill(pid, signal.SIGKILL)


def test_a_run_is_begun_watched_stopped_and_resumed(browser, folder, run, address):
    with visited(browser, address) as tab:
        tab.get_by_role("link", name="toy.yaml").click()
        expect(tab.locator("#verdict")).to_contain_text("It fits.")
        sound(tab)
        tab.get_by_label("max_train_steps").fill("none at all")
        expect(tab.locator("#verdict")).to_contain_text("max_train_steps is 'none at all'")
        tab.get_by_label("max_train_steps").fill("1000000")
        tab.get_by_label("save as").fill("longer.yaml")
        tab.get_by_role("button", name="Save in").click()
        tab.get_by_role("button", name="Start it").click()
        begun(run / "metrics.jsonl", tab)
        tab.goto(re.sub(r"\?.*", "", address))
        tab.get_by_role("link", name="run", exact=True).click()
        steps = tab.locator(".numbers div", has_text="steps").locator("b")
        expect(steps).not_to_have_text("")
        before = steps.inner_text()
        expect(steps).not_to_have_text(before)  # nobody has asked for it
        expect(tab.locator("#live")).to_contain_text("going on")
        tab.once("dialog", lambda dialog: dialog.accept())
        tab.get_by_role("button", name="Stop and save").click()
        expect(tab.get_by_role("button", name="Resume")).to_be_visible()
        [checkpoint] = run.glob("checkpoint-*")  # the only one, of the step where it was stopped
        tab.get_by_role("button", name="Resume").click()
        expect(tab.get_by_role("button", name="Stop and save")).to_be_visible()
        stopped_at = int(checkpoint.name.removeprefix("checkpoint-"))
        count = "document.querySelector('.numbers div:last-child b').textContent.replace(',', '')"
        until(tab, f"n => Number({count}) > n + 3", stopped_at)
        tab.once("dialog", lambda dialog: dialog.accept())
        tab.get_by_role("button", name="Stop and save").click()
        expect(tab.get_by_role("button", name="Resume")).to_be_visible()
        sound(tab)
    rows = [
        json.loads(line)["step"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if '"kind": "step"' in line
    ]
    assert rows == list(range(1, len(rows) + 1)) and len(rows) > stopped_at, "it went on where it had stopped"


@pytest.mark.parametrize("name", ["metadata.json", "toy.yaml", "Compare runs", "New run"])
def test_every_screen_is_sound_on_a_small_dark_window(browser, address, name):
    with visited(browser, address, color_scheme="dark", viewport={"width": 390, "height": 800}) as tab:
        sound(tab)
        tab.get_by_role("link", name=name).first.click()
        tab.wait_for_load_state()
        expect(tab.get_by_text("measuring …")).to_have_count(0)  # the page is loaded anew then
        sound(tab)


def test_labels_and_contrast_were_looked_at():
    if not AXE.is_file():
        pytest.skip("axe-core is not here (npm install axe-core, or AXE_CORE=axe.min.js): contrast was not looked at")
