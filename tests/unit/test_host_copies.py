"""Copies in memory that is kept: their bits, whose memory it is, and what is given back."""

import threading

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from reeltune.distributed.sharded_io import Piece
from reeltune.training.host_copies import HostCopies, copied_bytes


def tree(value=0.0):
    """Tensors of every form that a checkpoint holds; two are one, as tied weights are."""
    tied = torch.arange(6.0) + value
    return {
        "weights": {"a": nn.Parameter(torch.rand(3, 4) + value), "b": tied, "again": tied},
        "turned": torch.rand(4, 3).t() + value,
        "turned and short": torch.rand(4, 3, dtype=torch.bfloat16).t() + value,
        "channels last": (torch.rand(2, 3, 4, 5) + value).contiguous(memory_format=torch.channels_last),
        "every second": (torch.rand(8) + value)[::2],
        "steps": [torch.tensor(value), torch.tensor(value + 1)],
        "quantized": torch.full((5,), int(value), dtype=torch.uint8),
        "empty": torch.empty(0, 3),
        "pieces": [Piece("weights/a", (torch.rand(9) + value).narrow(0, 2, 5), 3, 40)],
        "plain": (3, "word", None),
    }


def tensors(tree):
    leaves = [leaf.values_N if isinstance(leaf, Piece) else leaf for leaf in tree_leaves(tree)]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def places(tree):
    return sorted(tensor.data_ptr() for tensor in tensors(tree) if tensor.numel())


def assert_copied(copy, original):
    for one, other in zip(tensors(copy), tensors(original), strict=True):
        plain = other.detach().to("cpu", copy=True)
        assert one.dtype == plain.dtype and one.stride() == plain.stride() and torch.equal(one, plain)
        assert type(one) is torch.Tensor and not one.requires_grad
        assert one.untyped_storage().nbytes() == plain.untyped_storage().nbytes()  # files keep all of it
    assert len(set(places(copy))) == len(places(copy)) and not set(places(copy)) & set(places(original))
    assert copy["plain"] == original["plain"]
    assert (copy["pieces"][0].name, copy["pieces"][0].start, copy["pieces"][0].total) == ("weights/a", 3, 40)


def test_copies_come_into_the_same_memory_with_new_bits():
    copies = HostCopies()
    copies.reserve(tree())
    there = copies.held_bytes()
    assert there == copied_bytes(tree()) == sum(tensor.nbytes for tensor in tensors(tree()))
    reserved = list(copies._free)  # held here too, so that nothing else can come to lie there
    for value in (1.0, 2.0, 3.0):
        original = tree(value)
        copy = copies.copied(original)
        assert_copied(copy, original)
        assert places(copy) == places(reserved)
        assert copies.held_bytes() == 0
        copies.give_back(copy)
        assert copies.held_bytes() == there


def test_what_was_not_given_back_is_not_written_to():
    copies, first, second = HostCopies(), tree(1.0), tree(2.0)
    one = copies.copied(first)
    other = copies.copied(second)
    assert_copied(one, first)
    assert_copied(other, second)
    assert not set(places(one)) & set(places(other))


def test_only_what_is_new_takes_new_memory():
    """State that an optimizer has made since."""
    copies, before = HostCopies(), {"a": torch.rand(4), "b": torch.rand(2, 2)}
    first = copies.copied(before)
    copies.give_back(first)
    second = copies.copied({**before, "new": torch.rand(4)})
    assert set(places(first)) < set(places(second)) and len(places(second)) == 3


def test_what_is_like_nothing_any_more_goes_back():
    copies = HostCopies()
    copies.give_back(copies.copied({"a": torch.rand(4), "b": torch.rand(5), "c": torch.rand(6).bfloat16()}))
    copy = copies.copied({"a": torch.rand(4), "b": torch.rand(5, 1), "c": torch.rand(6)})
    assert copies.held_bytes() == 0
    copies.give_back(copy)
    assert copies.held_bytes() == 4 * (4 + 5 + 6)
    copies.let_go()
    assert copies.held_bytes() == 0


def test_what_is_let_go_is_reserved_no_further(monkeypatch):
    real, written, begun, may_go_on = torch.Tensor.zero_, [], threading.Event(), threading.Event()

    def write(tensor):
        written.append(tensor.numel())
        begun.set()
        assert may_go_on.wait(60)
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "zero_", write)
    copies = HostCopies()
    copies.reserve([torch.ones(3), torch.ones(4), torch.ones(5)])
    assert begun.wait(60)
    copies.let_go()
    may_go_on.set()
    assert copies.held_bytes() == 0
    assert written == [3]
