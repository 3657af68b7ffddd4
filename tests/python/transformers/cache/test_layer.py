from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tqai import _core
from tqai.settings import Settings
from tqai.shapes.heads import Heads
from tqai.transformers.cache.layer import TqaiLayer
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

HEADS, DIM = 2, 16
EXACT = Settings(residual_window=10_000)
PACKING = Settings(residual_window=16, sink_tokens=2)


def states(tokens: int, batch: int = 2, seed: int = 0, **options: object) -> torch.Tensor:
    """Keys and values, [2, batch, heads, tokens, dim]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, HEADS, tokens, DIM, generator=generator).to(**options)


def hidden(tokens: int, *counts: int) -> torch.Tensor:
    """[rows, tokens] bool: the first counts[row] ones."""
    return torch.arange(tokens) < torch.tensor(counts)[:, None]


def layer_with(tokens: int, settings: Settings = EXACT, window: int | None = None) -> TqaiLayer:
    layer = TqaiLayer(0, settings, window)
    layer.update(*states(tokens))
    layer.settle(was_empty=True)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 8])
def test_views_and_sizes_are_those_of_the_layers_of_transformers(
    dtype: torch.dtype, window: int | None
) -> None:
    ours = TqaiLayer(0, EXACT, window)
    plain = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
    for step, tokens in enumerate([3, 1, 1, 7, 1, 20, 1, 1]):
        positions = torch.arange(tokens)  # what transformers 4 asks with
        sizes = ours.get_mask_sizes(tokens)
        assert sizes == ours.get_mask_sizes(positions)
        new = states(tokens, seed=step, dtype=dtype)
        expected = plain.update(new[0], new[1])
        got = ours.update(new[0], new[1])
        assert sizes[0] == expected[0].shape[-2]
        for view, tensor in zip(got, expected, strict=True):
            assert view.shape == tensor.shape and view.dtype == tensor.dtype
            assert torch.equal(view * 1, tensor)
        assert ours.get_seq_length() == plain.get_seq_length()
        assert torch.equal(ours.keys, plain.keys) and torch.equal(ours.values, plain.values)


def test_layout_of_the_new_tokens_does_not_matter() -> None:
    keys, values = states(70)
    expected = TqaiLayer(0, PACKING).update(keys, values)
    scattered = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (keys, values)]
    assert scattered[0].stride(-1) != 1
    layer = TqaiLayer(0, PACKING)
    got = layer.update(*scattered)
    assert torch.equal(got[0] * 1, expected[0] * 1) and torch.equal(got[1] * 1, expected[1] * 1)
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_sealed_tokens_come_back_near_and_exact_ones_equal() -> None:
    layer = layer_with(200, Settings(bits_k=8, bits_v=8, residual_window=16, sink_tokens=2))
    assert layer.is_packed()
    keys, values = states(200)
    for got, given in ((layer.keys, keys), (layer.values, values)):
        assert torch.equal(got[:, :, :2], given[:, :, :2])
        assert torch.equal(got[:, :, -16:], given[:, :, -16:])
        assert not torch.equal(got, given)
        assert torch.linalg.norm(got - given) < 0.02 * torch.linalg.norm(given)


@pytest.mark.parametrize("settings", [EXACT, PACKING])
@pytest.mark.parametrize(("amount", "left"), [(-3, 197), (0, 200), (50, 50), (500, 200), (-500, 0)])
def test_crop_takes_a_count_or_a_length(settings: Settings, amount: int, left: int) -> None:
    layer = layer_with(200, settings)
    before = layer.gather(0, 200)
    layer.crop(amount)
    assert layer.get_seq_length() == left
    if left:
        for got, was in zip(layer.gather(0, left), before, strict=True):
            assert torch.equal(got, was[:, :, :left])
    views = layer.update(*states(1, seed=1))
    assert views[0].shape[-2] == left + 1


def test_a_sliding_layer_goes_back_only_as_far_as_its_window_reaches() -> None:
    layer = layer_with(5, window=8)
    layer.crop(-2)
    assert layer.get_seq_length() == 3
    layer = layer_with(300, window=8)
    with pytest.raises(RuntimeError, match="layer 0.*300 tokens to 100.*activate_past_recording"):
        layer.crop(-200)
    assert layer.get_seq_length() == 300
    layer.crop(0)
    assert layer.get_seq_length() == 300


def test_a_sliding_layer_that_records_goes_back_like_that_of_transformers() -> None:
    ours, plain = TqaiLayer(0, EXACT, 8), DynamicSlidingWindowLayer(sliding_window=8)
    if not hasattr(plain, "activate_past_recording"):
        pytest.skip("transformers 4 cannot crop a sliding layer")
    for layer in (ours, plain):
        layer.activate_past_recording()
    for step, (tokens, back) in enumerate([(30, 0), (4, 2), (1, 0), (5, 5), (1, 1), (9, 0)]):
        new = states(tokens, seed=step)
        got, expected = ours.update(new[0], new[1]), plain.update(new[0], new[1])
        assert torch.equal(got[0] * 1, expected[0]) and torch.equal(got[1] * 1, expected[1])
        ours.crop(-back)
        plain.crop(-back)
        assert ours.get_seq_length() == plain.get_seq_length()
        assert torch.equal(ours.keys, plain.keys)


@pytest.mark.parametrize("settings", [EXACT, PACKING])
def test_rows_are_reordered_chosen_and_repeated(settings: Settings) -> None:
    def rows_of(change: object) -> tuple[torch.Tensor, torch.Tensor]:
        layer = layer_with(200, settings)
        before = layer.values
        change(layer)
        return layer.values, before

    got, before = rows_of(lambda layer: layer.reorder_cache(torch.tensor([1, 1, 0])))
    assert torch.equal(got, before[[1, 1, 0]])
    got, before = rows_of(lambda layer: layer.batch_repeat_interleave(2))
    assert torch.equal(got, before.repeat_interleave(2, 0))
    for indices in (torch.tensor([1]), torch.tensor([-1, 0]), torch.tensor([False, True])):
        got, before = rows_of(lambda layer, chosen=indices: layer.batch_select_indices(chosen))
        assert torch.equal(got, before[indices])


def test_an_empty_layer_takes_every_operation() -> None:
    layer = TqaiLayer(0, EXACT)
    layer.crop(-1)
    layer.reset()
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.get_seq_length() == 0 and layer.keys is None and layer.values is None
    assert not layer.is_initialized and not layer.is_packed() and not hasattr(layer, "batch_size")


def test_reset_empties_and_frees() -> None:
    start = _core.allocated_bytes()
    layer = layer_with(200, PACKING)
    assert layer.batch_size == 2 and _core.allocated_bytes() > start
    layer.reset()
    assert layer.get_seq_length() == 0 and _core.allocated_bytes() == start
    assert layer.update(*states(3, batch=5))[0].shape == (5, HEADS, 3, DIM)


def test_copies_do_not_see_each_other_and_share_tiles() -> None:
    start = _core.allocated_bytes()
    layer = layer_with(2000, PACKING)
    alone = _core.allocated_bytes() - start
    packed = layer.core.memory()["packed_bytes"]
    twin = copy.deepcopy(layer)
    assert _core.allocated_bytes() - start < 2 * alone - 0.9 * packed
    before = layer.keys
    twin.update(*states(3, seed=1))
    twin.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.keys, before)
    assert torch.equal(twin.keys[:, :, :2000], before[[1, 0]])


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.update(*states(3, seed=1)),
        lambda layer: layer.crop(-150),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.reset(),
        lambda layer: layer.settle(was_empty=True),
    ],
)
def test_keys_that_were_read_stay_as_they_were(change: Any) -> None:
    layer = TqaiLayer(0, PACKING)
    layer.update(*states(200))
    keys, values = layer.keys, layer.values
    change(layer)
    expected = states(200)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_keys_are_dequantised_when_they_are_read_not_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = layer_with(200, PACKING)
    calls: list[int] = []
    gather = layer.gather
    monkeypatch.setattr(layer, "gather", lambda *span: calls.append(1) or gather(*span))
    assert layer.keys.shape == (2, HEADS, 200, DIM) and layer.values.numel() > 0
    layer.update(*states(3))
    assert not calls
    assert (layer.keys + layer.values).shape[2] == 203
    assert len(calls) == 1


def test_a_sliding_layer_frees_what_no_query_sees_again() -> None:
    layer = TqaiLayer(0, Settings(residual_window=16), sliding_window=100)
    sizes = []
    for step in range(40):
        layer.update(*states(32, seed=step))
        layer.settle(was_empty=step == 0)
        sizes.append(layer.core.memory()["total_bytes"])
    assert layer.get_seq_length() == 1280
    assert max(sizes[20:]) <= max(sizes[10:20])
    assert layer.core.memory()["tokens"] < 2 * (100 + 32 + 64 + 64)


def test_a_sliding_layer_keeps_no_sink_tokens() -> None:
    settings = Settings(residual_window=16, sink_tokens=100)
    assert layer_with(200, settings, window=190).core.packed_tokens(0) == 128
    assert layer_with(200, settings).core.packed_tokens(0) == 64


BAD = {
    "nan": (lambda x: x.index_fill(3, torch.tensor([1]), float("nan")), ValueError, "[Nn]a[Nn]"),
    "inf": (lambda x: x.index_fill(3, torch.tensor([1]), float("inf")), ValueError, "[Ii]nf"),
    "heads": (lambda x: x[:, :1], ValueError, "1"),
    "batch": (lambda x: x[:1], ValueError, "1"),
    "dim": (lambda x: x[..., :8], ValueError, "8"),
    "dtype": (lambda x: x.half(), ValueError, "float16"),
    "double": (lambda x: x.double(), ValueError, "float64.*expected float32, float16 or bfloat16"),
    "rank": (lambda x: x[0], ValueError, "expected"),
    "device": (lambda x: x.to("meta"), NotImplementedError, "meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tokens_are_refused_and_change_nothing(case: str) -> None:
    change, error, message = BAD[case]
    layer = layer_with(200, PACKING)
    before, memory = layer.keys, layer.core.memory()
    with pytest.raises(error, match=rf"layer 0: (?s:.*){message}"):
        layer.update(*map(change, states(3)))
    assert torch.equal(layer.keys, before) and layer.core.memory() == memory
    assert layer.update(*states(1))[0].shape[-2] == 201


@pytest.mark.parametrize("dim", [4, 584])
def test_a_head_dim_that_cannot_be_compressed_names_the_layer(dim: int) -> None:
    layer = TqaiLayer(7, EXACT)
    with pytest.raises(NotImplementedError, match=rf"layer 7.*head_dim {dim}.*skip_layers=\[7\]"):
        layer.update(*torch.randn(2, 1, 2, 3, dim))
    assert layer.core is None


def test_keys_of_another_shape_than_the_models_are_refused() -> None:
    layer = TqaiLayer(0, EXACT, heads=Heads(4, 32))
    with pytest.raises(ValueError, match="2 heads of 16.*4 of 32.*new_cache"):
        layer.update(*states(3))
    assert layer.core is None


def test_zero_vectors_are_legal() -> None:
    layer = TqaiLayer(0, PACKING)
    layer.update(*torch.zeros(2, 1, HEADS, 200, DIM))
    layer.settle(was_empty=True)
    assert layer.is_packed()
    assert torch.count_nonzero(layer.keys) == 0


def test_a_vector_too_long_for_its_norm_stays_exact_and_is_remarked_on_once() -> None:
    layer = TqaiLayer(3, PACKING)
    keys, values = states(300, dtype=torch.bfloat16)
    values[0, 0, 0] = 1e6  # a sink
    values[1, 1, 150] = 1e6
    layer.update(keys, values)
    with pytest.warns(UserWarning, match=r"layer 3 has a key or value longer.*skip_layers=\[3\]"):
        layer.settle(was_empty=True)
    assert [layer.core.packed_tokens(row) for row in (0, 1)] == [256, 128]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.update(*states(100, dtype=torch.bfloat16))
        layer.settle(was_empty=False)
    assert layer.get_seq_length() == 400
    assert torch.equal(layer.values[1, :, 130:300], values[1, :, 130:])
    assert torch.equal(layer.values[:, :, :2], values[:, :, :2])


def test_padding_takes_no_bytes_and_moves_with_its_row() -> None:
    layer = TqaiLayer(0, PACKING)
    layer.update(*states(200))
    layer.mark_hidden(hidden(200, 150, 0))
    layer.settle(was_empty=True)
    assert [layer.core.packed_tokens(row) for row in range(2)] == [0, 128]
    assert layer.core.memory()["tokens"] == 250
    before = layer.keys
    assert torch.count_nonzero(before[0, :, :150]) == 0
    assert torch.count_nonzero(before[0, :, 150:]) > 0
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.padding == [0, 150]
    assert torch.equal(layer.keys, before[[1, 0]])


def test_padding_may_span_several_updates() -> None:
    layer = TqaiLayer(0, EXACT)
    for counts in ([10, 4], [3, 0], [5, 5]):
        layer.update(*states(10))
        layer.mark_hidden(hidden(10, *counts))
    assert layer.padding == [13, 4]
    assert layer.core.memory()["tokens"] == 60 - 17


@pytest.mark.parametrize("name", ["keys", "values"])
def test_what_is_packed_cannot_be_assigned_and_says_what_to_do(name: str) -> None:
    layer = layer_with(200, PACKING)
    before = getattr(layer, name).clone()
    with pytest.raises(NotImplementedError, match=rf"the {name} .* skip_layers=\[{layer.index}\]"):
        setattr(layer, name, before[:, :, 100:])
    assert torch.equal(getattr(layer, name), before)
