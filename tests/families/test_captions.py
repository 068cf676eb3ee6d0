"""Captions that an encoder cuts are counted and named with their tokens over, in every family, without weights."""

import re

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from reeltune import families
from reeltune.families import captions, tokenizers
from reeltune.families.captions import cut_captions
from tests.families.tiny_wan import tiny_checkpoint


def test_tokens_over_are_counted(tmp_path):
    """The tiny tokenizer has a token a letter: "b" repeated, one for the word's beginning, one for the end."""
    family = families.find(tiny_checkpoint(tmp_path / "wan", "control_t2v"))
    texts = ["a cat", "b" * 510, "b" * 511, "b" * 600, "é" * 3]
    named = [(f"entry {i}", text) for i, text in enumerate(texts)]
    (line,) = cut_captions(family, named)
    assert line == (
        "2 captions are longer than the 512 tokens that the text encoder reads, and cut there: "
        "entry 2 (1 over), entry 3 (90 over)"
    )
    assert cut_captions(family, named[:2]) == []
    (many,) = cut_captions(family, [(f"entry {i}", "b" * 511) for i in range(30)])
    assert many.startswith("30 captions") and many.endswith("entry 7 (1 over), and 22 more")


def test_every_family_tells_what_it_cuts(any_checkpoint, tmp_path):
    """What is counted is what the family's own tokenising cuts: the same caption, one word shorter, is not cut."""
    family = families.find(any_checkpoint.lay_out(tmp_path))
    if not family.token_limits:
        assert family.name == "toy"
        return
    long = "a bird, " * 600
    lines = cut_captions(family, [("entry 0", "a bird"), ("entry 1", long)])
    assert len(lines) == len(family.token_limits)
    for line, limit in zip(lines, family.token_limits, strict=True):
        most, over = map(int, re.search(r"the (\d+) tokens .*: entry 1 \((\d+) over\)", line).groups())
        tokenizer = tokenizers.load_tokenizer(limit.tokenizer)
        (counted,) = captions._counts(tokenizer, limit, [long])
        assert counted == most + over and most <= limit.tokens


def test_prefilter_never_hides_a_long_caption(tmp_path):
    """ASCII that is short enough is not tokenised; just below and at the limit both ways agree."""
    family = families.find(tiny_checkpoint(tmp_path / "wan", "control_t2v"))
    (limit,) = family.token_limits
    tokenizer = tokenizers.load_tokenizer(limit.tokenizer)
    for length in range(506, 516):
        text = "x" * length
        (count,) = captions._counts(tokenizer, limit, [text])
        assert bool(cut_captions(family, [("one", text)])) == (count > 512)


def test_what_is_cut_does_not_reach_the_encoder(tmp_path):
    """The tail over the limit changes nothing, which is why it is told."""
    family = families.find(tiny_checkpoint(tmp_path / "wan", "control_t2v"))
    parts = family.load(tmp_path / "wan")
    kept, cut = "b" * 511 + "c", "b" * 511 + "d" * 40
    one, other = (family.describe(parts, [text], None).cond["text"] for text in (kept, cut))
    assert torch.equal(one, other)


def test_captions_are_cut_as_tokenizer_json_says(tmp_path, monkeypatch):
    """Whatever class the files name: before transformers 5.22 the one that they do name cuts by Llama 2's rules."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocab={**letters, "re": 256, "red": 257}, merges=[("r", "e"), ("re", "d")]))
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    plain.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(transformers, "AutoTokenizer", None)
    ours, caption = tokenizers.load_tokenizer(tmp_path), "a red fox, 2 of them: jumping"
    ids = plain.encode(caption).ids
    assert ours(caption, add_special_tokens=False).input_ids == ids
    assert 257 in ids and len(ids) == len(caption) - 2
