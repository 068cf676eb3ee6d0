"""Captions (and a picture) to what HunyuanVideo reads: states of a language model, their mask, a CLIP vector.

Templates, crops and layers are those of the released pipelines
(https://github.com/huggingface/diffusers/tree/main/src/diffusers/pipelines/hunyuan_video).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reeltune.families.latents import dtype_of
from reeltune.families.spec import Parts, TokenLimit

TEXT_LENGTH = 256  # tokens after the template's system turn
POOLED_LENGTH = 77  # tokens that CLIP reads
LAYER = -3  # of the language model's hidden states: two layers are skipped
ASPECTS = (
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
)
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    f"{ASPECTS}<|start_header_id|>user<|end_header_id|>\n\n{{}}<|eot_id|>"
)
CROP = 95  # tokens of TEMPLATE before the caption
PICTURE_TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe the video by detailing the following aspects "
    f"according to the reference image: {ASPECTS}\n\n<|start_header_id|>user<|end_header_id|>\n\n{{}}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
PICTURE_CROP = 103  # tokens of PICTURE_TEMPLATE before the caption, the picture being one
HEADERS = 3  # turns: system, user, assistant
HEADER_TOKENS = 4  # removed before the assistant's turn: the caption's end of turn and the turn's header

Cond = dict[str, Tensor]


def token_limits(paths: Mapping[str, Path], *, with_picture: bool) -> tuple[TokenLimit, ...]:
    """The limits at which `tokens_of` and `pooled` cut captions. paths: of a checkpoint's components."""
    template, crop = (PICTURE_TEMPLATE, PICTURE_CROP) if with_picture else (TEMPLATE, CROP)
    return (
        TokenLimit("the language model", paths["tokenizer"], TEXT_LENGTH + crop, partial(_filled, template)),
        TokenLimit("CLIP", paths["tokenizer_2"], POOLED_LENGTH),
    )


def _filled(template: str, tokenizer: Any, captions: Sequence[str]) -> list[str]:
    return [template.format(caption) for caption in captions]


def pooled(parts: Parts, captions: Sequence[str]) -> Tensor:
    """float32 B D: CLIP's vector of the whole caption."""
    tokens = parts.extras["tokenizer_2"](
        list(captions), padding="max_length", max_length=POOLED_LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad(), parts.borrow("text_2") as clip:
        return clip(tokens.input_ids.to(parts.device)).pooler_output.float()


def tokens_of(tokenizer: Any, template: str, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """int64 (ids_BL, mask_BL) of the captions in the template, cut and padded at the end to `length`."""
    tokens = tokenizer(
        _filled(template, tokenizer, captions),
        max_length=length,
        padding="max_length",
        truncation=True,
        padding_side="right",
        return_tensors="pt",
    )
    return tokens.input_ids, tokens.attention_mask


def encode_text(parts: Parts, captions: Sequence[str], length: int = TEXT_LENGTH) -> Cond:
    """text float32 B L D, text_mask B L (1 is a token of the caption), pooled float32 B D'."""
    ids_BL, mask_BL = tokens_of(parts.extras["tokenizer"], TEMPLATE, captions, length + CROP)
    ids_BL, mask_BL = ids_BL.to(parts.device), mask_BL.to(parts.device)
    with torch.no_grad(), parts.borrow("text") as model:
        states = model(input_ids=ids_BL, attention_mask=mask_BL, output_hidden_states=True).hidden_states[LAYER]
    return {
        "text": states[:, CROP:].float(),
        "text_mask": mask_BL[:, CROP:],
        "pooled": pooled(parts, captions),
    }


def encode_text_and_picture(
    parts: Parts, captions: Sequence[str], image_u8_BCHW: Tensor, interleave: int, length: int = TEXT_LENGTH
) -> Cond:
    """What `encode_text` gives, with every `interleave`-th of the picture's states before the caption's, as if text."""
    tokenizer = parts.extras["tokenizer"]
    plain = [caption.replace("<image>", "image") for caption in captions]  # one mark a picture, the template's
    ids_BL, mask_BL = tokens_of(tokenizer, PICTURE_TEMPLATE, plain, length + PICTURE_CROP)
    with torch.no_grad(), parts.borrow("text") as llava:
        seen = parts.extras["image_processor"](list(image_u8_BCHW.cpu()), return_tensors="pt").pixel_values
        inputs = expand(ids_BL, llava)
        inputs = {name: value.to(parts.device) for name, value in inputs.items()}
        seen = seen.to(parts.device, dtype_of(llava))
        states_BLD = llava.model(**inputs, pixel_values=seen, output_hidden_states=True).hidden_states[LAYER].float()

    places = picture_places(llava)
    first = int((ids_BL[0] == llava.config.image_token_index).nonzero()[0])
    header = tokenizer.convert_tokens_to_ids("<|end_header_id|>")
    rows, masks = [], []
    for ids, mask, states in zip(ids_BL, mask_BL.to(parts.device), states_BLD, strict=True):
        keep = torch.arange(PICTURE_CROP, len(ids))
        ends = (ids == header).nonzero().flatten().tolist()
        cut = ends[-1] + 1 if len(ends) >= HEADERS else len(ids)  # a long caption leaves no room for the last turn
        keep = keep[(keep < cut - HEADER_TOKENS) | (keep >= cut)]
        picture = states[first : first + places : interleave]
        rows.append(torch.cat([picture, states[keep + places - 1]]))
        masks.append(torch.cat([mask.new_ones(len(picture)), mask[keep]]))
    return {"text": torch.stack(rows), "text_mask": torch.stack(masks), "pooled": pooled(parts, captions)}


def picture_places(llava: Any) -> int:
    """How many tokens a picture is: one a patch."""
    tower = llava.config.vision_config
    return (tower.image_size // tower.patch_size) ** 2


def expand(ids_BL: Tensor, llava: Any) -> Cond:
    """The language model's inputs, with the one picture token repeated once a patch; padding is masked."""
    token, pad, places = llava.config.image_token_index, llava.config.pad_token_id, picture_places(llava)
    ids = torch.stack([row.repeat_interleave(torch.where(row == token, places, 1)) for row in ids_BL])
    mask = (ids != pad).long()
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
