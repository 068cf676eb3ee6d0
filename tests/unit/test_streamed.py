"""Files written tensor by tensor, as the library itself reads them."""

import json

import torch
from safetensors.torch import load_file

from reeltune.export import streamed
from reeltune.families import weights
from reeltune.families.stored import Stored

STATE = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "one": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "matrix": torch.arange(12.0).view(3, 4),
    "turned": torch.arange(6.0).view(2, 3).T,  # not contiguous
    "wide": torch.arange(2, dtype=torch.float64),
}
OUTLINE = {name: tensor.to("meta") for name, tensor in STATE.items()}


def test_the_library_reads_what_is_written(tmp_path):
    asked = []
    (file,) = streamed.write(tmp_path, OUTLINE, lambda name: asked.append(name) or STATE[name], 10**6)
    assert file.name == "diffusion_pytorch_model.safetensors" and sorted(asked) == sorted(STATE)
    written = load_file(file)
    assert written.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor)
    head = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    begins = {name: held["data_offsets"][0] for name, held in head.items() if name != "__metadata__"}
    assert all(begins[name] % tensor.itemsize == 0 for name, tensor in STATE.items())


def test_shards_are_read_back_one_tensor_at_a_time(tmp_path):
    files = streamed.write(tmp_path, OUTLINE, STATE.__getitem__, 50)
    assert [sum(t.numel() * t.itemsize for t in weights.read(file).values()) for file in files] == [20, 48, 37]
    stored = Stored(tmp_path)
    assert stored.outline.keys() == set(stored) == STATE.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in STATE.items())
    assert all(meta.is_meta and meta.dtype == STATE[name].dtype for name, meta in stored.outline.items())
