"""In which types VAE and encoders are kept, and what a CPU that is slow at one of them is told of."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from reeltune.cache import fill
from reeltune.cache.entries import keys_of
from reeltune.config.parse import build
from reeltune.core.errors import UserError
from reeltune.core.types import Crop, Draw, Shape
from reeltune.estimate.check import check
from reeltune.estimate.estimator import Estimator
from reeltune.estimate.remedies import changes, values_of
from reeltune.memory.size import size_bytes
from reeltune.run import precision
from reeltune.run.model import choose_family, load_parts
from reeltune.run.precision import computes_bf16, slow_bf16
from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.caching import STEPS, cached, entries_written
from tests.runs.same_run import assert_same_end

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """As small as it is, in fp32."""
    return tiny_checkpoint(tmp_path_factory.mktemp("wan") / "wan", "control_t2v")


@pytest.mark.parametrize(
    ("mixed", "asked", "dtype"),
    [
        ("bf16", None, torch.bfloat16),
        ("bf16", "fp32", torch.float32),
        ("bf16", "stored", torch.float32),
        ("no", None, torch.float32),
        ("no", "bf16", torch.bfloat16),
    ],
)
def test_vae_and_encoders_are_kept_as_asked(mixed, asked, dtype, run, wan):
    given = run("run", wan, mixed_precision=mixed, encoder_weights=asked)
    family, _, _ = choose_family(given)
    parts = load_parts(given, family, CPU)
    found = {weight.dtype for network in parts.frozen.values() for weight in network.parameters()}
    assert found == {dtype} and set(parts.frozen) == {"vae", "text"}
    assert {weight.dtype for weight in parts.net.parameters()} == {torch.float32}
    kept, planned = (
        {name: size_bytes(list(network.parameters())) for name, network in loaded.frozen.items()}
        for loaded in (parts, planned_parts(given))
    )
    assert kept == planned


def planned_parts(given):
    family, _, _ = choose_family(given)
    return load_parts(given, family, CPU, network=False, fake=FakeTensorMode(allow_non_fake_inputs=True))


@pytest.fixture
def each_warning(recwarn):
    """torch's own too, each time and not once a process."""
    torch.set_warn_always(True)
    yield recwarn
    torch.set_warn_always(False)


@pytest.mark.slow
def test_one_estimator_tells_types_apart(run, wan, each_warning):
    """And of a norm's weights in fp32 beside a clip in bf16, as autocast has them, torch does not warn."""
    half = run("half", wan, mixed_precision="bf16")
    whole = run("whole", wan, mixed_precision="bf16", encoder_weights="fp32")
    estimator = Estimator(half)
    draws = [Draw(0, Shape(5, 32, 32), Crop(32, 32, 0, 0), tuple(range(5)), 0, 0)]
    vaes = [estimator.step(given, draws, ["a kite"], preview=False).weight_bytes["vae"] for given in (half, whole)]
    assert vaes[1] == 2 * vaes[0]
    assert not [one for one in each_warning if "Mismatch dtype" in str(one.message)]


@pytest.mark.slow
def test_a_run_from_a_cache_of_that_type_is_the_live_run(run, wan, tmp_path, capfd):
    asked = {"mixed_precision": "bf16", "encoder_weights": "fp32"}
    assert train(run("live", wan, **asked)) == 0
    from_cache = cached(run("cached", wan, **asked), tmp_path / "cache")
    assert fill.fill(from_cache) == 0
    assert train(from_cache) == 0
    assert_same_end(tmp_path / "cached", tmp_path / "live", STEPS)
    capfd.readouterr()
    other = cached(run("other", wan, mixed_precision="bf16"), tmp_path / "cache")
    with pytest.raises(UserError, match="it was made with encoder_weights fp32, which now is None"):
        train(other)
    assert fill.fill(other) == 0
    assert entries_written(capfd)[0] > 0  # other bits


def test_a_type_that_is_implied_is_no_other(run, wan, tmp_path):
    def facts(**asked):
        given = cached(run("run", wan, **asked), tmp_path / "cache")
        return keys_of(given, *choose_family(given)[:2]).facts

    assert facts(mixed_precision="bf16") == facts(mixed_precision="bf16", encoder_weights="bf16")
    assert "encoder_weights" not in facts(mixed_precision="no", encoder_weights="fp32")  # as older caches were made
    assert facts(mixed_precision="no", encoder_weights="stored")["encoder_weights"] == "stored"


def test_smaller_encoders_are_offered_where_they_are_in_fp32():
    def offered(**asked):
        return "encoder_weights: bf16" in [
            one.words for one in changes(values_of(build(asked), "one", 1, blocks=0, still_blocks=0, tiles=True))
        ]

    assert offered(mixed_precision="no") and offered(encoder_weights="fp32")
    assert not offered(mixed_precision="bf16") and not offered(mixed_precision="no", encoder_weights="bf16")
    assert not offered(mixed_precision="no", cache_folder="cache", cache_variants=1)


# ---- a CPU without bf16


@pytest.mark.parametrize(
    ("text", "able"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16_not\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),
        ("processor\t: 0\nisa\t: rv64imafdc\n", True),  # tells nothing
    ],
)
def test_what_a_cpu_has(text, able, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    assert computes_bf16(tmp_path / "cpuinfo") is able
    assert computes_bf16(tmp_path / "absent")


@pytest.mark.parametrize("able", [True, False])
def test_a_slow_type_is_told(able, run, toy, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(precision, "computes_bf16", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = "this CPU has no bf16 units: bf16 (mixed_precision, encoder_weights) takes about 4 times as long"
    given = run("run", toy, mixed_precision="bf16", max_train_steps=1)
    assert any(words in line for line in check(given)) is not able
    assert fill.fill(cached(given, tmp_path / "cache")) == 0
    assert (words in capfd.readouterr().err) is not able
    assert train(given) == 0
    told = capfd.readouterr()
    assert (words in told.out + told.err) is not able


def test_encoding_alone_asks_for_its_own_type(monkeypatch):
    monkeypatch.setattr(precision, "computes_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    mixed = build({"mixed_precision": "bf16", "encoder_weights": "fp32"})
    assert len(slow_bf16(mixed)) == 1 and not slow_bf16(mixed, only_encoding=True)
    assert not slow_bf16(build({"mixed_precision": "no"}))
    assert len(slow_bf16(build({"mixed_precision": "no", "encoder_weights": "bf16"}), only_encoding=True)) == 1
