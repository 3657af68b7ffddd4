"""Padding between a row's tokens takes neither window nor bytes, nor part in any centre."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
import transformers
import transformers as hf
from conftest import make_model
from tqai.transformers.attention.padding import hidden_tokens
from tqai.transformers.model.geometry import decoder_of
from transformers.cache_utils import DynamicCache

SETTINGS = {"bits_k": 4, "bits_v": 8, "residual_window": 16, "sink_tokens": 2}
# Real tokens of each row in each turn, the rest is padding.
TURNS = [(100, 180), (20, 90), (60, 2)]


def ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 120, (1, count), generator=torch.Generator().manual_seed(seed))


def turns(right: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and mask of each turn, [2, n] each."""
    made = []
    for turn, counts in enumerate(TURNS):
        n = max(counts)
        tokens, mask = torch.zeros(2, n, dtype=torch.long), torch.zeros(2, n, dtype=torch.long)
        for row, count in enumerate(counts):
            at = slice(0, count) if right else slice(n - count, n)
            tokens[row, at], mask[row, at] = ids(count, 10 * turn + row), 1
        made.append((tokens, mask))
    return made


def read(model: Any, cache: Any, pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Reads turns; the mask of all of them."""
    mask = pieces[0][1][:, :0]
    for tokens, new in pieces:
        mask = torch.cat([mask, new], 1)
        stand = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        with torch.no_grad():
            model(tokens, attention_mask=mask, position_ids=stand, past_key_values=cache)
    return mask


def step(model: Any, cache: Any, mask: torch.Tensor) -> torch.Tensor:
    """Logits of one more token in each row."""
    mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.long)], 1)
    tokens = torch.full((len(mask), 1), 7)
    with torch.no_grad():
        stand = (mask.cumsum(1) - 1)[:, -1:]
        options = {"position_ids": stand, "past_key_values": cache}
        return model(tokens, attention_mask=mask, **options).logits[:, -1]


def real_tokens(row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What `turns` has of a row."""
    pieces = [ids(counts[row], 10 * turn + row) for turn, counts in enumerate(TURNS)]
    return [(piece, torch.ones_like(piece)) for piece in pieces]


@pytest.mark.parametrize("right", [False, True], ids=["left", "right"])
@pytest.mark.parametrize(
    "options", [{}, {"backend": "torch-ops"}, {"exact_prefill": False}], ids=str
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_hold_what_they_hold_alone(right: bool, options: Any, attention: str) -> None:
    model = make_model(attn_implementation=attention)
    cache = tqai.patch(model, **SETTINGS, **options)
    mask = read(model, cache, turns(right))
    logits = step(model, cache, mask)
    held = cache.layers[1].core
    assert [sum(count for _, count in held.left_out(row)) > 0 for row in (0, 1)] == [True, True]
    for row in (0, 1):
        alone = tqai.new_cache(model)
        expected = step(model, alone, read(model, alone, real_tokens(row)))
        own = alone.layers[1].core
        assert held.packed_tokens(row) == own.packed_tokens(0)
        assert held.packed_tokens(row) > 0
        assert torch.allclose(logits[row], expected[0], atol=2e-2)
    assert held.memory()["tokens"] == 2 + sum(map(sum, TURNS))


def test_a_mask_that_shows_what_was_dropped_is_refused() -> None:
    model = make_model()
    cache = tqai.patch(model, **SETTINGS)
    mask = read(model, cache, turns(right=False))
    before = cache.get_seq_length()
    message = "of row 0 were padding in the pass that brought them"
    with pytest.raises(ValueError, match=message):
        step(model, cache, torch.ones_like(mask))
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(torch.full((2, 1), 7), past_key_values=cache)
    assert cache.get_seq_length() == before
    assert torch.isfinite(step(model, cache, mask)).all()


# Before, Dynamo traces a pass in pieces, and what attention reads in them is a plain tensor.
IN_PIECES = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 9)


@pytest.mark.parametrize(
    "told, compiled",
    [
        (True, False),
        (False, False),
        pytest.param(
            *(True, True), marks=pytest.mark.skipif(IN_PIECES, reason="attention sees no views")
        ),
    ],
    ids=["mask of the tokens", "own mask", "compiled"],
)
def test_a_mask_that_shows_the_start_of_a_row_is_refused(told: bool, compiled: bool) -> None:
    model = make_model()
    cache = tqai.patch(model, **SETTINGS)
    mask = read(model, cache, turns(right=False)[:1])
    before = cache.get_seq_length()
    shown = torch.ones(2, before + 1, dtype=torch.long)
    hidden = torch.cat([mask, shown[:, -1:]], 1)
    if not told:  # [2, 1, 1, before + 1], additive
        shown, hidden = (
            torch.where(each > 0, 0.0, torch.finfo(torch.float32).min)[:, None, None]
            for each in (shown, hidden)
        )
    tokens = torch.full((2, 1), 7)
    forward = torch.compile(model, backend="eager") if compiled else model
    for given in (shown, None):
        with pytest.raises(ValueError, match="of row 0 were padding in the pass that brought them"):
            with torch.no_grad():
                forward(tokens, attention_mask=given, past_key_values=cache)
        assert cache.get_seq_length() == before
    with torch.no_grad():
        forward(tokens, attention_mask=hidden, past_key_values=cache)
    assert cache.get_seq_length() == before + 1


def test_copies_files_and_choices_of_rows_keep_it(tmp_path: Path) -> None:
    model = make_model()
    cache = tqai.patch(model, **SETTINGS)
    mask = read(model, cache, turns(right=True))
    others = [copy.deepcopy(cache)]
    tqai.save_cache(cache, tmp_path / "cache.safetensors")
    others.append(tqai.load_cache(tmp_path / "cache.safetensors", model))
    for other in others:
        other.batch_select_indices(torch.tensor([1, 0]))
    expected = step(model, cache, mask)
    for other in others:
        with pytest.raises(ValueError, match="were padding"):
            step(model, other, torch.ones_like(mask))
        assert torch.equal(step(model, other, mask[[1, 0]]), expected[[1, 0]])
    cache.crop(150)
    assert cache.layers[0].core.left_out(0) == [(100, 50)]
    assert torch.isfinite(step(model, cache, mask[:, :150])).all()


def test_an_interrupted_pass_brings_back_what_was_there() -> None:
    model = make_model()
    cache = tqai.patch(model, **SETTINGS)
    pieces = turns(right=False)
    mask = read(model, cache, pieces[:2])
    held = [layer.core.left_out(0) for layer in cache.layers]
    handle = decoder_of(model).layers[1].register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(model, cache, [(pieces[2][0], torch.cat([mask, pieces[2][1]], 1))])
    handle.remove()
    assert cache.get_seq_length() == mask.shape[1]
    assert [layer.core.left_out(0) for layer in cache.layers] == held
    assert torch.isfinite(step(model, cache, mask)).all()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_token_that_a_sparse_mask_hides_for_now_is_kept() -> None:
    model = make_model()
    cache = tqai.patch(model, **SETTINGS)
    plain = DynamicCache(config=model.config)
    tokens = ids(40, 0)
    sparse = torch.ones(40, 40, dtype=torch.bool).tril()
    sparse[:, 20:30] = False
    sparse = torch.where(sparse, 0.0, torch.finfo(torch.float32).min)[None, None]
    logits = []
    for each in (cache, plain):
        with torch.no_grad():
            model(tokens, attention_mask=sparse, past_key_values=each)
            logits.append(model(tokens[:, :1], past_key_values=each).logits)
    assert cache.layers[0].core.left_out(0) == []
    assert torch.allclose(*logits, atol=2e-2)


def test_hidden_tokens_are_those_that_no_query_sees() -> None:
    mask = torch.ones(2, 1, 4, 6, dtype=torch.bool).tril(2)
    assert hidden_tokens(mask, 4, 6, 2) is None
    mask[1, :, :, 3] = False
    mask[0, :, 1, 3] = False  # a later query sees it
    expected = torch.tensor([[False] * 4, [False, True, False, False]])
    assert torch.equal(hidden_tokens(mask, 4, 6, 2), expected)
    added = torch.where(mask, 0.0, -torch.inf)
    assert torch.equal(hidden_tokens(added[1:], 4, 6, 3), expected[[1, 1, 1]])
    assert hidden_tokens(mask, 4, 7, 2) is None


def test_a_model_with_sliding_layers() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 128, "head_dim": 32}
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 120}
    model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**shape, **layers, **heads)).eval()
    plain = DynamicCache(config=model.config)
    expected = step(model, plain, read(model, plain, turns(right=False)))
    cache = tqai.patch(model, **SETTINGS)
    got = step(model, cache, read(model, cache, turns(right=False)))
    assert all(layer.core.left_out(0) for layer in cache.layers)
    assert torch.allclose(got, expected, atol=2e-2)
