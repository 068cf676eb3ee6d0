"""Memory that runs out while networks are loaded: what they take, what is free, what to change."""

import re

import pytest
import torch

from reeltune.cache import fill
from reeltune.config.parse import build
from reeltune.core.errors import UserError, lacks_memory
from reeltune.core.reading import as_user_error
from reeltune.families import weights
from reeltune.memory.size import size_bytes
from reeltune.run import loading_memory
from reeltune.run.loading_memory import needed_bytes, remedies
from reeltune.run.model import choose_family, load_parts, outlines
from reeltune.training.loop import train
from tests.families.tiny_wan import tiny_checkpoint
from tests.runs.caching import cached

CPU = torch.device("cpu")
HOST = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
FULL = [
    MemoryError(),
    RuntimeError(f"{HOST} 9000000000000 bytes. Error code 12 (Cannot allocate memory)"),
    OSError(12, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."),
]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("wan") / "wan", "control_v1.0")


@pytest.fixture
def full(monkeypatch):
    """Placing the weights of the n-th network finds no memory for them; later, on fake tensors, it does."""

    def at(number, error):
        seen = []

        def fit(net, *how, real=weights.fit, **more):
            seen.append(net)
            if len(seen) == number:
                raise error
            return real(net, *how, **more)

        monkeypatch.setattr(weights, "fit", fit)

    return at


@pytest.mark.parametrize(
    "error",
    [FULL[0], *(pytest.param(error, marks=pytest.mark.slow) for error in FULL[1:])],
    ids=lambda error: type(error).__name__,
)
def test_loading_that_finds_no_memory_is_told_by_part(error, run, wan, full, monkeypatch):
    monkeypatch.setattr(loading_memory, "room_bytes", lambda: 3_210_000_000)
    full(2, error)
    with pytest.raises(UserError) as told:
        train(run("run", wan, mixed_precision="no"))
    (line,) = told.value.problems
    assert line.startswith("the host is full while networks are loaded (")
    parts = "network 0.0 GB, VAE 0.0 GB, text encoder 0.0 GB, image encoder 0.0 GB, 0.0 GB together"
    assert f"The networks take {parts}, and 3.2 GB were free before. Change one or more, the cheapest first: " in line
    assert line.endswith(
        "cache_folder, which `reeltune cache` fills before; encoder_weights: bf16; more memory for the host"
    )
    assert told.value.__cause__ is error


@pytest.mark.slow
def test_bytes_are_those_of_the_networks_loaded(run, wan):
    given = run("run", wan, mixed_precision="no", encoder_weights="bf16")
    family = choose_family(given)[0]
    parts = load_parts(given, family, CPU)
    nets = {"network": parts.net, "VAE": parts.frozen["vae"], "text encoder": parts.frozen["text"]}
    held = {name: size_bytes(list(net.parameters())) for name, net in nets.items()}
    held["image encoder"] = size_bytes(list(parts.frozen["image"].parameters()))
    assert needed_bytes(outlines(given, family), network=True, encoders=True) == held
    assert needed_bytes(outlines(given, family), network=True, encoders=False) == {"network": held.pop("network")}
    assert needed_bytes(outlines(given, family), network=False, encoders=True) == held


def test_with_a_cache_the_network_alone_is_needed(run, wan, tmp_path, full):
    given = cached(run("run", wan, mixed_precision="no", preview_count=0), tmp_path / "cache")
    assert fill.fill(given) == 0
    full(1, MemoryError())
    with pytest.raises(
        UserError, match=r"while networks are loaded \(MemoryError\)\. The networks take network 0\.0 GB, 0"
    ):
        train(given)


def test_a_network_that_is_read_later_is_named(run, wan, tmp_path, full):
    full(2, FULL[1])  # after the VAE or the text encoder, whichever comes first
    with pytest.raises(UserError, match=r"the host is full while the (VAE|text encoder) is loaded \(\[enforce") as told:
        fill.fill(cached(run("run", wan, mixed_precision="no"), tmp_path / "cache"))
    assert "take VAE 0.0 GB" in str(told.value)  # the network is not loaded
    assert re.search(r"first: encoder_weights: bf16; more memory for the host$", str(told.value))


@pytest.mark.parametrize(
    ("tree", "on_device", "network", "lines"),
    [
        ({}, True, True, ["low_vram: true", "cache_folder, which", "trained_weights: bf16_stochastic"]),
        ({"mixed_precision": "no"}, False, True, ["cache_folder, which", "encoder_weights: bf16"]),
        ({"engine": "fsdp", "low_vram": True}, True, True, ["cache_folder, which"]),
        ({"cache_folder": "x", "cache_variants": 1}, True, False, ["low_vram: true"]),
        ({"cache_folder": "x", "cache_variants": 1, "mixed_precision": "no"}, False, False, ["encoder_weights: bf16"]),
        ({"vae_mini_batch": 4}, False, False, []),  # loading is the same
    ],
)
def test_what_can_be_changed(tree, on_device, network, lines):
    told = list(remedies(build(tree), on_device=on_device, network=network))
    assert [line.split(" `")[0] for line in told] == lines


def test_where_encoding_finds_no_memory_fewer_clips_together_are_told(run, toy, tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(fill.Encoder, "_clips", full)
    told = []
    for count in (1, 2):
        with pytest.raises(UserError, match="the host is full while clips are encoded") as error:
            fill.fill(cached(run("run", toy, vae_mini_batch=count), tmp_path / "cache"))
        told.append("vae_mini_batch: 1; " in str(error.value))
    assert told == [False, True]


def test_other_errors_pass(run, wan, full):
    full(1, RuntimeError("a mistake of ours"))
    with pytest.raises(RuntimeError, match="ours"):
        train(run("run", wan))


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_lack_of_memory_is_no_fault_of_a_file(error):
    assert lacks_memory(error) and not lacks_memory(RuntimeError("broken")) and not lacks_memory(OSError(5, "error"))
    with pytest.raises(type(error)) as told, as_user_error("a file", "cannot be read"):
        raise error
    assert told.value is error
