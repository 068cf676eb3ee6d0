"""The package flash-attn-4 as it is where it cannot be: its two passes by plain products, on the CPU."""

from collections import Counter

import pytest
import torch

from reeltune.memory import flash_4

calls: Counter[str] = Counter()


def forward(query_BLHD, key_BLHD, value_BLHD, *, softmax_scale, return_lse):
    assert return_lse
    refuse_layout(query_BLHD, key_BLHD, value_BLHD)
    calls["forward"] += 1
    scores_BHLS = softmax_scale * torch.einsum("blhd,bshd->bhls", query_BLHD.float(), key_BLHD.float())
    sums_BHL = scores_BHLS.logsumexp(-1)
    out_BLHD = torch.einsum("bhls,bshd->blhd", scores_BHLS.softmax(-1), value_BLHD.float())
    return out_BLHD.to(query_BLHD.dtype).contiguous(), sums_BHL, None, None, None


def backward(query_BLHD, key_BLHD, value_BLHD, out_BLHD, grad_BLHD, sums_BHL, *, softmax_scale, deterministic):
    refuse_layout(query_BLHD, key_BLHD, value_BLHD, out_BLHD, grad_BLHD)
    calls["backward, deterministic" if deterministic else "backward"] += 1
    query, key, value, out, grad = (x.float() for x in (query_BLHD, key_BLHD, value_BLHD, out_BLHD, grad_BLHD))
    shares_BHLS = (softmax_scale * torch.einsum("blhd,bshd->bhls", query, key) - sums_BHL[..., None]).exp()
    of_shares_BHLS = torch.einsum("blhd,bshd->bhls", grad, value)
    rest_BHL = torch.einsum("blhd,blhd->bhl", grad, out)
    of_scores_BHLS = softmax_scale * shares_BHLS * (of_shares_BHLS - rest_BHL[..., None])
    grads = (
        torch.einsum("bhls,bshd->blhd", of_scores_BHLS, key),
        torch.einsum("bhls,blhd->bshd", of_scores_BHLS, query),
        torch.einsum("bhls,blhd->bshd", shares_BHLS, grad),
    )
    return tuple(one.to(query_BLHD.dtype).contiguous() for one in grads)


def refuse_layout(*tensors):
    for tensor in tensors:
        assert tensor.is_contiguous() and 0 not in tensor.stride(), "must not have broadcast dimensions"
        assert tensor.dtype in (torch.float16, torch.bfloat16), "inputs must be float16 or bfloat16"
        assert tensor.shape[-1] <= 256, "head_dim is too large"


@pytest.fixture
def stand_in(monkeypatch):
    """Gives the counts of its calls."""
    flash_4._attention.register_kernel("cpu")(flash_4.forward_pass)
    flash_4._attention_backward.register_kernel("cpu")(flash_4.backward_pass)
    monkeypatch.setattr(flash_4, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(flash_4, "_kernels", lambda: (forward, backward))
    monkeypatch.setattr(flash_4, "installed", lambda: "4.0.0")
    calls.clear()
    return calls
