"""What a user may ask of ``generate`` and the model, as functions for test_matrix.

Each takes a model and ``generate``'s arguments, and gives all outputs; test_cache has others.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import tqai
from conftest import make_ids, make_model

LOGITS = {"return_dict_in_generate": True, "output_logits": True}
_assistants: list[Any] = []


def beam_samples(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    options = {**options, "do_sample": True, "num_beams": 3, "num_return_sequences": 2}
    return [model.generate(make_ids(2), **options)]


def assisted(model: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    """With another model that guesses ahead, compressed where `model` is."""
    if not _assistants:
        _assistants.append(make_model(num_hidden_layers=1))
    if hasattr(model, "_tqai_patch"):
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
    assert isinstance(first.past_key_values, tqai.TqaiCache) == hasattr(model, "_tqai_patch")
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
