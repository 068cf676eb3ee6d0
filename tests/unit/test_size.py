import torch

from reeltune.memory.size import size_bytes


def test_bytes_of_every_tensor_in_a_tree():
    tree = {"a": [torch.empty(3, 2, dtype=torch.bfloat16), None, 7], "b": (torch.empty(5, device="meta"), {"c": 1.0})}
    assert size_bytes(tree) == 3 * 2 * 2 + 5 * 4
    assert size_bytes(torch.empty(0)) == 0
