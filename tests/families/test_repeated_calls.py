"""What a VAE takes with calls that are alike counted and not run again, against all of them run."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from reeltune.core.types import Shape
from reeltune.estimate import frozen_networks
from reeltune.estimate.fake_batch import empty_batch
from reeltune.estimate.frozen_networks import decode, encode
from reeltune.estimate.memory_tracker import Tracker
from reeltune.estimate.repeated_calls import Once, counted_once
from reeltune.run.model import choose_family, encode_options, load_parts
from reeltune.sampling.sample import Setup
from tests.runs.small_run import recipe
from tests.runs.test_estimate import CAPTIONS, draws

SHAPE = Shape(17, 32, 48)


@pytest.mark.family("wan_fun", "easyanimate", "hunyuan_video", "cogvideox_fun")
def test_clips_and_portions_that_are_alike_take_what_they_take_when_run(one_of_a_family, tmp_path, monkeypatch):
    run = recipe(one_of_a_family.lay_out(tmp_path), tmp_path, tmp_path / "out", **one_of_a_family.asked)
    family, mode, objective = choose_family(run)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    parts = load_parts(run, family, torch.device("cpu"), network=False, fake=fake)
    setup, ran = Setup(family, mode, parts, objective, options=encode_options(run)), []
    for name in ("encoder", "decoder"):
        getattr(parts.frozen["vae"], name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))

    def taken():
        ran.clear()
        encoding = encode(setup, empty_batch(family, mode, draws(SHAPE), CAPTIONS, fake), fake)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in encoding.encoded.tensors().items()}
        return encoding.work, encoding.clip_bytes, shapes, decode(setup, encoding.encoded.x0.mean, fake)

    once, few = taken(), ran.count("encoder")
    monkeypatch.setattr(frozen_networks, "counted_once", lambda *_: nullcontext())
    assert once == taken()
    assert 0 < few <= ran.count("encoder") / 2  # there are two clips
    assert not any(isinstance(module, Once) for module in parts.frozen["vae"].modules())


class Coder(nn.Module):
    """Keeps its last input, as the next portion of a clip needs it, and counts in a list that it is given."""

    def __init__(self):
        super().__init__()
        self.before: Tensor | None = None
        self.ran: list[int] = []  # lengths

    def forward(self, x: Tensor, count: list[int]) -> Tensor:
        self.ran.append(len(x))
        out = x.clone() if self.before is None else torch.cat([self.before, x])
        self.before, count[0] = x.clone(), count[0] + 1
        return out[:1] if len(x) == 3 else out


def test_calls_are_alike_that_find_and_leave_the_same():
    fake, vae, coder = FakeTensorMode(allow_non_fake_inputs=True), nn.Module(), Coder()
    vae.encoder, tracker = coder, Tracker(fake)
    with tracker, tracker.phase("encode"), counted_once(vae, tracker):
        for length, count, ran in [
            (600, 0, True),
            (600, 0, True),  # now it has one before
            (600, 0, False),
            (600, 1, True),  # and is given another number
            (700, 0, True),
            (600, 0, True),  # as the one before is longer
            (600, 0, False),
            (3, 0, True),
            (3, 0, True),
            (3, 0, True),  # part of a tensor, which would not be made again
        ]:
            x, counts = torch.empty(length), [count]
            coder.ran.clear()
            out = vae.encoder(x, counts)
            assert coder.ran == [length] * ran
            assert counts == [count + 1] and coder.before is not None and len(coder.before) == length
            del out
    assert vae.encoder is coder
