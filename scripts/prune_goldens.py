"""Writes tests/goldens from the full set: python scripts/prune_goldens.py ../shared/goldens tests/goldens

Kept are a checkpoint or two of each family and some cases of each kind of file. Tokenizers are replaced by our own,
which know the recorded captions by their ids and read any other letter by letter.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace, Sequence
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.parity import FAMILIES
from reeltune.demo.tiny.easyanimate import CHAT
from reeltune.families import tokenizers

CHECKPOINTS = (
    *(f"wan_fun/checkpoints/{name}" for name in ("control_v1.0", "control_v1.1", "inp")),
    *(f"multi/{name}" for name in ("EasyAnimateV5-Control", "EasyAnimateV5.1-Control")),
    *(f"multi/{name}" for name in ("HunyuanVideo", "HunyuanVideo-I2V")),
    *(f"multi/{name}" for name in ("CogVideoX-Fun-2b-InP", "CogVideoX-Fun-V1.1-5b-InP")),
)
NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_processor", "scheduler")
TOKENIZERS = ("tokenizer", "tokenizer_2", "google/umt5-xxl")
ALL = ("",)
CASES: dict[str, tuple[str, ...]] = {  # file -> what the names of its kept tensors begin with
    "wan_fun/golden/scheduler": ALL,
    "wan_fun/golden/text_encoder": ALL,
    "wan_fun/golden/clip": ("1.",),
    "wan_fun/golden/vae": ("f5.", "f8.", "latents_"),
    "wan_fun/golden/transformer/control_v1.0": ("B.",),
    "wan_fun/golden/transformer/control_v1.1": ("A.",),
    "wan_fun/golden/transformer/inp": ("B.",),
    "wan_fun/golden/train_step/control_ref_dropout_motion": ALL,
    "wan_fun/golden/train_step/inpaint": ALL,
    "multi/golden/easyanimate_sigma_loss/sigma_loss": ALL,
    "multi/golden/easyanimate_v5/scheduler": ALL,
    "multi/golden/easyanimate_v5/text": ALL,
    "multi/golden/easyanimate_v5/vae": ("f1.",),
    "multi/golden/easyanimate_v5/transformer": ("a.",),
    "multi/golden/easyanimate_v5/train_control_ddpm": ALL,
    "multi/golden/easyanimate_v51/scheduler": ALL,
    "multi/golden/easyanimate_v51/text": ALL,
    "multi/golden/easyanimate_v51/vae": ("f9.",),
    "multi/golden/easyanimate_v51/transformer": ("b.",),
    "multi/golden/easyanimate_v51/train_control_ref_flow": ALL,
    "multi/golden/hunyuanvideo_t2v/scheduler": ALL,
    "multi/golden/hunyuanvideo_t2v/vae": ("f25.",),
    "multi/golden/hunyuanvideo_t2v/transformer": ("a.",),
    "multi/golden/hunyuanvideo_t2v/train_single_image": ALL,
    "multi/golden/hunyuanvideo_i2v/scheduler": ALL,
    "multi/golden/hunyuanvideo_i2v/vae": ("f17.",),
    "multi/golden/hunyuanvideo_i2v/transformer": ("c.",),
    "multi/golden/hunyuanvideo_i2v/train_sigma_sqrt_msl": ALL,
    "multi/golden/cogvideox_fun_2b/scheduler": ALL,
    "multi/golden/cogvideox_fun_2b/text": ALL,
    "multi/golden/cogvideox_fun_2b/vae": ("f9.",),
    "multi/golden/cogvideox_fun_2b/transformer": ("a.",),
    "multi/golden/cogvideox_fun_2b/train_inpaint_t2v": ALL,
    "multi/golden/cogvideox_fun_2b/train_inpaint_image": ALL,
    "multi/golden/cogvideox_fun_5b/scheduler": ALL,
    "multi/golden/cogvideox_fun_5b/transformer": ("b.",),
}
UNREAD = ("pipeline_", "ref_pixel_values")  # tensors that no test compares with
WHOLE = (
    "data/[!c]*.json",  # camera.json needs pose files that are not ours
    "released_keys/*.json.gz",
    "wan22/released_keys/*.json.gz",
)


def main(source: Path, target: Path) -> None:
    captions = captions_read(source)
    for name in CHECKPOINTS:
        copy_checkpoint(source / name, target / name, captions)
    share(target / "wan_fun/checkpoints")
    for name, cases in CASES.items():
        copy_cases(source / f"{name}.safetensors", target / f"{name}.safetensors", cases)
    for folder in {(target / name).parent for name in CASES if name.startswith("multi/")}:
        shorten(source / folder.relative_to(target) / "README.md", folder)
    for pattern in WHOLE:
        for path in sorted(source.glob(pattern)):
            copy(path, target / path.relative_to(source))


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def copy_cases(source: Path, target: Path, prefixes: tuple[str, ...]) -> None:
    with safe_open(source, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefixes) and not name.startswith(UNREAD)]  # noqa: SIM118
        tensors, metadata = {name: file.get_tensor(name) for name in names}, file.metadata()
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata)


def shorten(readme: Path, folder: Path) -> None:
    """The checkpoint, settings and tensors of what is kept of a case."""
    head, *sections = re.split(r"^(?=## )", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = [head]
    for section in sections:
        file = folder / section.split()[1]
        if file.is_file():
            with safe_open(file, "pt") as kept:
                names = set(kept.keys())
            lines = section.splitlines()
            text.append("\n".join(line for line in lines if row_of(line) is None or row_of(line) in names) + "\n\n")
    (folder / "README.md").write_text("".join(text).rstrip() + "\n", encoding="utf-8")


def row_of(line: str) -> str | None:
    """The tensor of a table's row."""
    found = re.match(r"\| (\S+) \| \[", line)
    return found and found.group(1)


def copy_checkpoint(source: Path, target: Path, captions: dict[Path, set[str]]) -> None:
    released = (source / "config.json").is_file()  # Wan: files beside each other
    names = {"*"} if released else {"model_index.json", *(f"{part}/*" for part in NETWORKS)}
    for path in sorted(path for pattern in names for path in source.glob(pattern)):
        if path.is_file() and (released or "config" in path.name or path.name.startswith(("model", "diffusion"))):
            copy(path, target / path.relative_to(source))
    for part in ("text_encoder", "."):  # what some checkpoints keep of the tokenizer there
        for path in (target / part).glob("*tokenizer*"):
            path.unlink()
    for part in TOKENIZERS:
        if (source / part).is_dir():
            ours = by_heart(tokenizers.load_tokenizer(source / part), captions[source / part])
            ours.save_pretrained(target / part)


def share(checkpoints: Path) -> None:
    """Links in place of files that an earlier checkpoint has."""
    first: dict[bytes, Path] = {}
    for path in sorted(path for path in checkpoints.glob("*/*") if path.is_file()):
        kept = first.setdefault(path.read_bytes(), path)
        if kept != path:
            path.unlink()
            path.symlink_to(Path("..") / kept.relative_to(checkpoints))


# ---- tokenizers


class Overheard:
    """A tokenizer that notes what it is given."""

    def __init__(self, tokenizer: Any, captions: set[str]):
        self.tokenizer, self.captions = tokenizer, captions

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: str | list[str], **settings: Any) -> Any:
        self.captions.update([text] if isinstance(text, str) else text)
        return self.tokenizer(text, **settings)


def captions_read(source: Path) -> dict[Path, set[str]]:
    """Tokenizer's folder -> all texts that the kept comparisons give it."""
    captions: dict[Path, set[str]] = defaultdict(set)
    load = tokenizers.load_tokenizer
    tokenizers.load_tokenizer = lambda folder: Overheard(load(folder), captions[folder])
    for name in CASES:
        path = source / f"{name}.safetensors"
        for family in FAMILIES:
            if path in family.golden_files(source):
                family.measure(path)
    tokenizers.load_tokenizer = load
    every_wan = {caption for folder, found in captions.items() if "umt5" in folder.name for caption in found}
    for name in CHECKPOINTS:
        captions[source / name / "google/umt5-xxl"] |= every_wan
    return captions


ASCII = [chr(code) for code in range(32, 127)]
PRIVATE = 0xE000  # Unicode's private use area
BREAKS = ("\n\n", "\n", "user\n")  # of templates, before a caption


def by_heart(theirs: Any, captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of our own with the ids of `theirs` for `captions`; of other texts every letter is a token.

    Its tokens are single characters: ASCII's for letters, private ones for the rest. A recorded piece of text is
    first replaced by the characters of its ids.
    """
    captions = sorted(captions, key=len)
    around = [token for token in (theirs.bos_token, theirs.eos_token, theirs.cls_token, theirs.sep_token) if token]
    named = {theirs.pad_token, theirs.unk_token, *around, "<image>", *re.findall(r"<\|\w+\|>", "".join(captions))}
    known = theirs.get_vocab()
    special = {token: known[token] for token in sorted(named - {None}) if token in known}
    rest = [i for i in range(max(known.values()) + 1) if i not in special.values()]
    names = dict(zip(rest, [*ASCII, *(chr(PRIVATE + i) for i in range(len(rest)))], strict=False))
    vocabulary = {name: i for i, name in names.items()} | special

    pieces = {piece for text in captions for piece in re.split("|".join(map(re.escape, special)), text) if piece}
    ids = {piece: theirs(piece, add_special_tokens=False)["input_ids"] for piece in pieces.union(BREAKS)}
    rules = [
        Replace(piece, "".join(names[i] for i in ids[piece]))
        for piece in sorted(ids, key=len, reverse=True)
        if set(ids[piece]) <= names.keys()
    ]
    made = Tokenizer(WordLevel(vocabulary, unk_token=theirs.unk_token or theirs.pad_token))
    made.normalizer = Sequence(rules)
    made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    inner, whole = (theirs(captions[-1], add_special_tokens=more)["input_ids"] for more in (False, True))
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    by_id = {i: token for token, i in special.items()}
    before, after = ([by_id[i] for i in part] for part in (whole[:start], whole[start + len(inner) :]))
    made.post_processor = TemplateProcessing(
        single=" ".join([*before, "$A", *after]), special_tokens=[(token, special[token]) for token in before + after]
    )
    roles = {f"{role}_token": getattr(theirs, f"{role}_token") for role in ("pad", "unk", "bos", "eos")}
    ours = PreTrainedTokenizerFast(
        tokenizer_object=made,
        **{role: token for role, token in roles.items() if token},
        additional_special_tokens=list(special),
        model_max_length=theirs.model_max_length,
        padding_side=theirs.padding_side,
        **({"chat_template": CHAT} if theirs.chat_template else {}),
    )
    for text in captions:
        if ours(text)["input_ids"] != theirs(text)["input_ids"]:
            raise AssertionError(f"{text!r}: {ours(text)['input_ids']} for {theirs(text)['input_ids']}")
    return ours


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
