"""The report is one file, its numbers are the run's, and it trusts no text."""

import json
import math
import re
from html.parser import HTMLParser
from random import Random

import numpy as np
import pytest
from PIL import Image

from reeltune.core.errors import UserError
from reeltune.data.media import write_clip
from reeltune.reporting import report
from reeltune.reporting.metrics import read_metrics
from reeltune.reporting.obedience import UNMEASURED, verdict

NASTY = "<script>alert(\"a\")</script> & 'b' {{ 7 * 7 }}"


def moving_disc(frames, height, width, *, hue, blur, noise, seed):
    """uint8 F H W C: a disc on its way across; blur and noise as of a poor model."""
    y, x = np.mgrid[:height, :width]
    t = np.linspace(0, 1, frames)[:, None, None]
    distance = np.hypot(x - width * (0.2 + 0.6 * t), y - height * (0.5 + 0.3 * np.sin(6 * t))) - height / 5
    disc = 1 / (1 + np.exp(distance / blur))[..., None]
    ground = np.array([0.12, 0.14, 0.2]) + 0.1 * (y / height)[None, :, :, None]
    picture = ground * (1 - disc) + np.array(hue) * disc
    picture = picture + noise * np.random.default_rng(seed).normal(size=picture.shape)
    return (picture.clip(0, 1) * 255).astype(np.uint8)


def outline(clip):
    edges = np.abs(np.diff(clip.astype(int).sum(-1), axis=2, prepend=0)) > 40
    return np.repeat((edges * 255).astype(np.uint8)[..., None], 3, axis=-1)


def obedience(step, change, *, band=(-0.02, 0.03), **more):
    """A row of two previews, that had 0.11 and 0.15."""
    starts = (0.11, 0.15)
    scores = [{"score": start + change, "score_start": start, "truth": 0.9, "recall": 0.5} for start in starts]
    row = {"kind": "obedience", "step": step, "start_step": 0, "control_kind": "canny", "measure": f"edges {NASTY}"}
    row |= {"unit": "", "rises": True, "score": 0.13 + change, "score_start": 0.13, "difference": change, "truth": 0.9}
    return row | {"band95": [change + edge for edge in band], "previews": scores, "n": 2} | more


def make_run(folder, *, steps=120, seed=3, better=True):
    """A run's folder as training leaves it, with numbers that differ everywhere."""
    chance = Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "notice", "step": 0, "text": f"train_mode control_object means control_ref {NASTY}"}]
    for step in range(1, steps + 1):
        data, encode, forward, optimizer = (chance.uniform(0.8, 1.2) * part for part in (0.03, 0.3, 0.55, 0.06))
        data += 4.0 if step == 1 else 0.0
        whole = data + encode + forward + optimizer
        lines.append(
            {
                "kind": "step",
                "step": step,
                "epoch": step // 30,
                "loss": 0.25 + 0.5 * math.exp(-step / 40) + chance.gauss(0, 0.06),
                "grad_norm": 0.4 + 2 * math.exp(-step / 20) * chance.uniform(0.6, 1.4),
                "lr": 1e-4 * min(step / 20, 1),
                "shape": [9, 64, 96],
                "samples": 4,
                "tokens": 4 * 72,
                "step_s": whole,
                "data_s": data,
                "encode_s": encode,
                "forward_backward_s": forward,
                "optimizer_s": optimizer,
                "samples_per_s": 4 / whole,
                "tokens_per_s": 288 / whole,
                "mfu": None,
                "peak_memory_bytes": 2**30 + step * 2**18,
            }
        )
        if step in (1, steps // 3, 2 * steps // 3, steps):
            done = 0 if step == 1 else step
            change = (-1 if better else 1) * 0.21 * (1 - math.exp(-done / 50))
            bands = [
                {"level": level, "loss_start": start, "loss": start + change * share}
                for level, start, share in ((0.2, 0.31, 0.5), (0.55, 0.42, 0.8), (0.83, 0.55, 1.2), (0.97, 0.71, 1.5))
            ]
            lines.append(
                {
                    "kind": "validation",
                    "step": done,
                    "start_step": 0,
                    "loss": 0.4975 + change,
                    "loss_start": 0.4975,
                    "difference": change,
                    "band95": [change - 0.02 * (done > 0), change + 0.03 * (done > 0)],
                    "per_band": bands,
                    "n": 24,
                }
            )
            lines.append(obedience(done, 0.72 * done / steps))
    saved = {"step": steps, "path": f"checkpoint-{steps}", "seconds": 1.5, "blocked_seconds": 0.25}
    lines.append({"kind": "save", **saved, "bytes": 7 * 2**20})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    problems = [
        {"entry": 3, "path": f"train/{NASTY}.mp4", "reason": "has no moov atom: cut short", "remedy": "copy it again"},
        {"entry": 11, "path": "train/kite.mp4", "reason": "control has 12 frames, the clip 40", "remedy": "remake it"},
    ]
    ledger = {
        "entries": 1234,
        "used": 1101,
        "not_reached": 87,
        "held_out": 44,
        "left_out": 2,
        "samples": 4 * steps,
        "samples_repeated": 17,
        "most_used": 3,
        "failed_reads": 0,
        "problems": problems,
    }
    (folder / "ledger.json").write_text(json.dumps(ledger))
    recipe = {
        "train_data_dir": "data",
        "train_data_meta": f"data/metadata_control{NASTY}.json",
        "learning_rate": 3e-4,
        "seed": 42,
        "trainable_modules": ["."],
        "fix_sample_size": [64, 96],
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    run = {
        "family": "wan_fun/control_v1.1",
        "mode": "control_ref",
        "parameters": 1_234_567,
        "trainable": 1_200_001,
        "started": "2026-11-21T04:12:09",
        "versions": {"reeltune": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "machine": {"processor": "Xeon", "cores": 2, "device": "cpu"},
    }
    (folder / "run.json").write_text(json.dumps(run))
    for step, blur, noise in ((0, 14, 0.2), (steps, 2.5, 0.02)):
        for i, hue in enumerate(((0.95, 0.5, 0.3), (0.3, 0.7, 0.9))):
            previews = folder / "previews"
            for name in (f"step-{step}", "control", "truth"):
                (previews / name).mkdir(parents=True, exist_ok=True)
            truth = moving_disc(9, 64, 96, hue=hue, blur=1.5, noise=0, seed=i)
            write_clip(previews / "truth" / f"{i}.mp4", truth, 8)
            write_clip(previews / "control" / f"{i}.mp4", outline(truth), 8)
            made = moving_disc(9, 64, 96, hue=hue, blur=blur, noise=noise, seed=i)
            write_clip(previews / f"step-{step}" / f"{i}.mp4", made, 8)
            told = {"prompt": f"a disc drifts, {i} {NASTY}", "seed": 1000 + i, "steps": 30, "guidance_scale": 6.0}
            told |= {
                "frames": 9,
                "height": 64,
                "width": 96,
                "fps": 8.0,
                "control": f"/data/control/{i}.mp4",
                "entry": None,
            }
            (previews / f"step-{step}" / f"{i}.json").write_text(json.dumps(told))
    first = folder / "first_batch"
    first.mkdir(exist_ok=True)
    for i in range(2):
        clip = moving_disc(9, 64, 96, hue=(0.8, 0.8, 0.3), blur=1.5, noise=0, seed=i)
        write_clip(first / f"{i}_pixels.mp4", clip, 8)
        write_clip(first / f"{i}_control.mp4", outline(clip), 8)
        Image.fromarray(clip[0]).save(first / f"{i}_reference.png")
        (first / f"{i}_text.txt").write_text(f"a yellow disc {NASTY}\n\nshape: (9, 64, 96)\ndropped: none\n")
    return folder


class Page(HTMLParser):
    """What the browser would load, run and show."""

    def __init__(self, html):
        super().__init__()
        self.loads, self.tags, self.shown, self.inside = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.inside.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "xlink:href", "poster", "srcset")]

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" not in self.inside and "style" not in self.inside:
            self.shown.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.shown).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("runs") / "discs")
    assert report.write(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def html(run):
    return (run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_it_is_one_file(page, html):
    outside = [load for load in page.loads if not load.startswith(("data:", "#"))]
    assert outside == []
    assert not re.search(r"""@import|url\((?!["']?#)|https?://|<link|<iframe""", html)
    assert page.tags.count("video") == 2 * 4 + 2 * 2 and page.tags.count("img") == 2
    assert "default-src 'none'" in html


def test_text_is_shown_and_never_run(page, html):
    assert page.tags.count("script") == 1
    assert "alert(" not in re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    told = 1 + 1 + 2 + 2 + 1  # notice, problem, prompts, first batch, recipe
    obeys = 1 + 1 + 2 * 3  # sentence, number, clips
    assert page.text.count(NASTY) == told + obeys
    assert "{{" not in html.replace("{{ 7 * 7 }}", "")


def test_the_headline_is_the_last_validation(page):
    change = -0.21 * (1 - math.exp(-120 / 50))
    assert "It is learning." in page.text
    assert f"from 0.4975 to {0.4975 + change:.4f} between step 0 and step 120" in page.text
    told = f"{change:+.4f}, 95 % band {change - 0.02:+.4f} to {change + 0.03:+.4f}, over 24 clips"
    assert told.replace("-", "−") in page.text


def test_its_numbers_are_those_of_metrics_and_ledger(run, page):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    first = sum(row["loss"] for row in steps[:12]) / 12
    last = sum(row["loss"] for row in steps[-12:]) / 12
    assert f"training loss {first:.4f} → {last:.4f} mean of the last and first 12" in page.text
    whole = sum(row["step_s"] for row in steps)
    for name, told in (("encode_s", "encoding"), ("data_s", "waiting for data"), ("optimizer_s", "optimizer")):
        assert f"{100 * sum(row[name] for row in steps) / whole:.0f} % {told}" in page.text
    assert f"{whole / 120:.3g} s" in page.text
    assert f"follows its control 0.13 → 0.85 edges {NASTY}; real clips: 0.90" in page.text
    for told in ("0.11", "0.83", "0.15", "0.87"):
        assert page.text.count(f"edges {NASTY}: {told}") == 1
    assert page.text.count(f"edges {NASTY}: 0.90") == 2  # of the clips themselves
    for told in (
        "1,101 used",
        "87 not reached",
        "44 held out",
        "2 left out",
        "1,234 entries",
        "480 samples trained on",
    ):
        assert told in page.text
    assert "3 train/" in page.text and "control has 12 frames, the clip 40" in page.text
    assert "in 1.5 s, of which training waited 0.2 s: checkpoint-120 , 7.0 MiB" in page.text
    assert "1,200,001 of 1,234,567 parameters" in page.text


def test_a_preview_has_its_seed_and_settings(page):
    assert "seed 1001 steps 30 guidance scale 6.0 frames 9 height 64 width 96 fps 8.0 control 1.mp4" in page.text
    assert "entry None" not in page.text and "/data/control" not in page.text


def test_the_recipe_tells_what_was_set_from_what_was_left(page):
    chosen, left = re.search(r"what was set (.*) Recipe: defaults (.*?) Versions", page.text).groups()
    assert "learning_rate 0.0003" in chosen and "fix_sample_size 64 96" in chosen
    assert left == "seed 42 trainable_modules ."


@pytest.mark.parametrize(
    ("difference", "band", "answer"),
    [
        (-0.2, (-0.3, -0.1), "It is learning."),
        (0.2, (0.1, 0.3), "It got worse."),
        (-0.2, (-0.5, 0.1), "Not shown yet."),
        (0.0, (0.0, 0.0), "Not shown yet."),
        (-0.2, None, "Not shown yet."),
    ],
)
def test_the_verdict_is_the_bands(difference, band, answer):
    row = {
        "step": 9,
        "start_step": 0,
        "loss": 1 + difference,
        "loss_start": 1.0,
        "difference": difference,
        "band95": band,
        "n": 4,
    }
    before = row | {"step": 0, "band95": (0.0, 0.0), "difference": 0.0}
    told = report.verdict(report.Metrics(validations=[before, row]))
    assert told["answer"] == answer
    assert report.verdict(report.Metrics(validations=[before]))["answer"] == "Nobody can say yet."


@pytest.mark.parametrize(
    ("change", "row", "answer", "warns"),
    [
        (0.3, {}, "It follows its control better.", False),
        (-0.3, {}, "It follows its control less.", True),
        (0.01, {}, "That it follows its control better is not shown.", True),
        (0.3, {"band95": None, "n": 1}, "That it follows its control better is not shown.", True),
        (-3.0, {"rises": False, "unit": "°"}, "It follows its control better.", False),
        (3.0, {"rises": False, "unit": "°"}, "It follows its control less.", True),
    ],
)
def test_what_is_said_of_obedience_is_the_bands(change, row, answer, warns):
    rows = [obedience(0, 0.0), obedience(9, change, **row)]
    told = verdict(rows, loss_falls=True)
    assert told["answer"] == answer and ("warning" in told) == warns
    assert "warning" not in verdict(rows, loss_falls=False)
    assert verdict(rows[:1], loss_falls=True) is None and verdict([], loss_falls=True) is None


def test_obedience_in_words():
    told = verdict([obedience(9, 0.3)], loss_falls=False)["reason"]
    assert f"the edges {NASTY} went from 0.13 to 0.43 (1 is best; the real clips have 0.90)" in told
    assert told.endswith("a mean change of +0.300, 95 % band +0.280 to +0.330, over 2 previews.")
    degrees = obedience(9, -3.0, rises=False, unit="°", score=4.04, score_start=7.04, truth=None)
    told = verdict([degrees], loss_falls=False)["reason"]
    assert "from 7.0° to 4.0° (0 is best): a mean change of −3.00°, 95 % band −3.02° to −2.97°" in told


def test_a_report_warns_where_the_loss_falls_and_obedience_does_not_rise(tmp_path):
    lines = [
        json.loads(line)
        for line in (make_run(tmp_path) / "metrics.jsonl").read_text().splitlines()
        if '"obedience"' not in line
    ]
    lines.append(obedience(120, 0.0))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(report.write(tmp_path).read_text(encoding="utf-8")).text
    assert "It is learning." in text and "The held-out loss falls and obedience does not rise" in text
    assert UNMEASURED not in text
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    text = Page(report.write(tmp_path).read_text(encoding="utf-8")).text
    assert UNMEASURED in text and "follows its control" not in text


def test_a_bare_folder_still_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 0.5, "samples": 2}\n')
    text = Page(report.write(tmp_path).read_text(encoding="utf-8")).text
    assert "Nobody can say yet." in text and "training loss 0.5000 → 0.5000" in text


def test_a_run_that_is_writing_has_a_page(tmp_path):
    lines = ['{"kind": "step", "step": 1, "loss": 0.5, "samples": 2}\n', '{"kind": "step", "step": 2, "lo']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert read_metrics(tmp_path / "metrics.jsonl").steps["step"] == [1]


def test_a_folder_in_the_place_of_its_metrics_is_told(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="is a folder, not a file"):
        report.write(tmp_path)


def test_clips_beyond_the_bound_are_linked(tmp_path, monkeypatch):
    make_run(tmp_path)
    clips = sorted((tmp_path / "previews").rglob("*.mp4"), key=lambda path: path.stat().st_size)
    monkeypatch.setattr(report, "EMBED_BYTES", clips[-1].stat().st_size - 1)
    html = report.write(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    linked = [load for load in page.loads if not load.startswith(("data:", "#"))]
    assert clips[-1].relative_to(tmp_path).as_posix() in linked and page.tags.count("video") < 12
    assert all((tmp_path / link).is_file() for link in linked)
    assert sum(len(load) for load in page.loads if load.startswith("data:")) < 1.4 * report.EMBED_BYTES + 100 * 14
