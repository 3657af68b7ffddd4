"""What a user may ask of ``generate`` and the model, as functions.

Each takes a model and ``generate``'s arguments, and gives all outputs.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import tqai
from conftest import make_ids, make_model
from transformers import DynamicCache

LOGITS = {"return_dict_in_generate": True, "output_logits": True}
_assistants: list[Any] = []


def plain(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    result = model.generate(make_ids(2), **LOGITS, **options)
    return [result.sequences, *result.logits]


def left_padded(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    ids = make_ids(3)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    mask[2, :22] = 0
    result = model.generate(ids, attention_mask=mask, **LOGITS, **options)
    return [result.sequences, *result.logits]


def beams(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    options = {**options, "num_beams": 3, "num_return_sequences": 2}
    return [model.generate(make_ids(2), **options)]


def chunked(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    return [model.generate(make_ids(2, 40), prefill_chunk_size=7, **options)]


def sampled(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    options = {**options, "do_sample": True, "num_return_sequences": 3}
    return [model.generate(make_ids(), **options)]


def prompt_lookup(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    return [model.generate(make_ids().repeat(1, 2), prompt_lookup_num_tokens=3, **options)]


def turns(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    patched = tqai.is_patched(model)
    cache = tqai.new_cache(model) if patched else DynamicCache(config=model.config)
    ids, outputs = make_ids(), []
    for turn in range(3):
        outputs.append(model.generate(ids, past_key_values=cache, **options))
        ids = torch.cat([outputs[-1], make_ids(tokens=5, seed=turn)], 1)
    return outputs


def forward(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        first = model(make_ids(2))
        again = model(make_ids(2, 5), past_key_values=first.past_key_values)
        return [first.logits, again.logits]


def beam_samples(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    options = {**options, "do_sample": True, "num_beams": 3, "num_return_sequences": 2}
    return [model.generate(make_ids(2), **options)]


def assisted(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    """With another model that guesses ahead, compressed where `model` is."""
    if not _assistants:
        _assistants.append(make_model(num_hidden_layers=1))
    if tqai.is_patched(model):
        tqai.patch(_assistants[0])
    return [model.generate(make_ids(), assistant_model=_assistants[0], **options)]


def guided(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    negative = make_ids(2, 9, seed=1)
    return [
        model.generate(make_ids(2), guidance_scale=1.7, negative_prompt_ids=negative, **options)
    ]


def embedded(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    embeddings = model.get_input_embeddings()(make_ids(2)).detach()
    result = model.generate(inputs_embeds=embeddings, **LOGITS, **options)
    return [result.sequences, *result.logits]


def returned(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    """The cache that ``generate`` gives back goes into the next call."""
    first = model.generate(make_ids(2), return_dict_in_generate=True, **options)
    assert isinstance(first.past_key_values, tqai.TqaiCache) == tqai.is_patched(model)
    ids = torch.cat([first.sequences, make_ids(2, 5)], 1)
    second = model.generate(ids, past_key_values=first.past_key_values, **LOGITS, **options)
    return [first.sequences, second.sequences, *second.logits]


def masked(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    """A mask of the user's own, [batch, 1, queries, keys]: three texts packed into one row."""
    lengths = [9, 5, 6]
    total = sum(lengths)
    text = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    seen = (text[:, None] == text[None]) & torch.ones(total, total, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, total, total).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = mask.to(model.dtype)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = make_ids(1, total)
    given = {"position_ids": positions} if takes_positions(model) else {}
    with torch.no_grad():
        first = model(ids[:, :-2], attention_mask=mask[..., :-2, :-2],
                      **{name: value[:, :-2] for name, value in given.items()})  # fmt: skip
        again = model(ids[:, -2:], attention_mask=mask[..., -2:, :],
                      past_key_values=first.past_key_values,
                      **{name: value[:, -2:] for name, value in given.items()})  # fmt: skip
    return [first.logits, again.logits]


def takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters
