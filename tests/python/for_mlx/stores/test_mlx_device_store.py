"""The device store in mlx's arrays, beside torch's and the C++ one: the same tiles and bytes."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small_mlx import mx

# isort: split
from tqai import _core
from tqai.mlx.arrays import mask_ref, rows_contiguous
from tqai.stores.device import Options
from tqai.stores.device import rows as device_rows
from tqai.stores.for_mlx import MlxStore
from tqai.stores.for_mlx.operations import MlxOperations
from tqai.stores.for_torch.torch_store import TorchStore

CPU = torch.device("cpu")
OPTIONS = Options(2, 64, 64, "float32", 4, 2, 4, 16, "auto", "auto", None)


def rope(dim: int, layout: str = "half_split") -> tuple[Any, ...]:
    return tuple(10000.0 ** (-i / dim) for i in range(0, dim, 2)), layout, dim


def native_of(options: Options, batch: int) -> _core.KvCache:
    own = {**vars(options), "dtype": _core.DType[options.dtype]}
    return _core.KvCache(batch=batch, **own)


def tokens_for(
    options: Options, rng: np.random.Generator, batch: int, count: int, mean: float = 0.0
) -> tuple[Any, Any]:
    """Keys and values, with the strides that projections leave."""
    both = []
    for dim, more in ((options.head_dim, mean), (options.value_head_dim, 0.0)):
        numbers = rng.standard_normal((batch, count, options.kv_heads, dim), np.float32)
        numbers += more * np.sin(np.arange(dim, dtype=np.float32))
        both.append(mx.array(numbers).astype(getattr(mx, options.dtype)).transpose(0, 2, 1, 3))
    return both[0], both[1]


def as_torch(array: mx.array) -> torch.Tensor:
    wide = torch.from_numpy(np.array(array.astype(mx.float32)))
    return wide.to(getattr(torch, str(array.dtype).rpartition(".")[2]))


def numbers(array: mx.array | torch.Tensor) -> np.ndarray:
    if isinstance(array, torch.Tensor):
        return array.float().numpy()
    return np.array(array.astype(mx.float32))


def append(store: Any, keys: mx.array, values: mx.array) -> None:
    """To a store of any kind."""
    if isinstance(store, TorchStore):
        store.append(as_torch(keys), as_torch(values))
    elif isinstance(store, MlxStore):
        store.append(keys, values)
    else:
        keys, k = rows_contiguous(keys)
        values, v = rows_contiguous(values)
        store.append(k, v)


def attend(store: Any, queries: mx.array, **options: Any) -> np.ndarray:
    """[batch, n, heads, dim] from a store of any kind."""
    mask, sinks = options.pop("mask", None), options.pop("sinks", None)
    if isinstance(store, MlxStore):
        return numbers(store.attend(queries, mask=mask, sinks=sinks, **options))
    if isinstance(store, TorchStore):
        mask, sinks = (None if part is None else as_torch(part) for part in (mask, sinks))
        return numbers(store.attend(as_torch(queries), mask=mask, sinks=sinks, **options))
    queries, q = rows_contiguous(queries)
    output = np.empty(
        (store.batch, queries.shape[2], queries.shape[1], store.value_head_dim), np.float32
    )
    where = None if mask is None else mask_ref(mask, queries.shape[2])
    sinks = None if sinks is None else np.array(sinks)
    store.attend(
        q,
        _core.borrowed(output, _core.DType.float32),
        mask=where,
        sink_scores=0 if sinks is None else _core.borrowed(sinks)[0],
        **options,
    )
    return output


def different(given: bytes, expected: bytes) -> int:
    """Bytes that differ."""
    pair = (np.frombuffer(part, np.uint8) for part in (given, expected))
    return int(np.not_equal(*pair).sum())


def distance(given: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dim", [16, 24, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_bytes_are_those_of_the_other_stores(bits: int, dim: int) -> None:
    options = replace(
        OPTIONS, head_dim=dim, value_head_dim=dim, bits_k=bits, bits_v=9 - bits, centering="none"
    )
    tokens = tokens_for(options, np.random.default_rng(bits), 2, 300)
    stores = MlxStore(options, 2), TorchStore(options, 2, CPU), native_of(options, 2)
    for store in stores:
        append(store, *tokens)
        assert store.seal() == 0 and store.packed_tokens(1) > 0
    given, *others = (store.serialize() for store in stores)
    for expected in others:
        assert len(given) == len(expected)
        # Coordinates that lie within rounding of a boundary may go either way.
        assert different(given, expected) <= 1e-3 * len(expected)
    assert stores[0].memory()["packed_bytes"] == stores[2].memory()["packed_bytes"] > 0


@pytest.mark.parametrize("bits", range(1, 5))
def test_values_in_trellis_codes(bits: int) -> None:
    """Which the C++ library finds, here too; attention reads them by operations of mlx's."""
    options = replace(OPTIONS, bits_v=bits, value_codes="trellis", centering="none")
    keys, values = tokens_for(options, np.random.default_rng(bits), 2, 400)
    stores = MlxStore(options, 2), TorchStore(options, 2, CPU), native_of(options, 2)
    for store in stores:
        append(store, keys, values)
        store.seal()
    tiles = stores[0].memory()["packed_bytes"]
    assert len({store.serialize()[-tiles:] for store in stores}) == 1
    queries = mx.array(np.random.default_rng(9).standard_normal((2, 6, 1, 64), np.float32))
    ours, theirs = (attend(store, queries) for store in stores[:2])
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-6)
    again = pickle.loads(pickle.dumps(stores[0]))
    assert again.serialize() == stores[0].serialize()


@pytest.mark.parametrize("wide", ["float64", "float32"])
@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
def test_centres_are_those_of_the_other_stores(
    layout: str, wide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the device has no double precision."""
    monkeypatch.setattr(MlxOperations, "wide", getattr(mx, wide))
    options = replace(OPTIONS, rope=rope(64, layout))
    keys, values = tokens_for(options, np.random.default_rng(3), 1, 1200)
    turning = np.array(keys)
    angles = np.arange(1200)[:, None] * np.array(options.rope[0])
    pairs = (np.s_[..., :32], np.s_[..., 32:])
    if layout == "interleaved":
        pairs = np.s_[..., 0::2], np.s_[..., 1::2]
    turning[:, 1][pairs[0]] += 3 * np.cos(angles)  # the second head's mean turns
    turning[:, 1][pairs[1]] += 3 * np.sin(angles)
    turning[:, 0] += 2.0
    stores = MlxStore(options, 1), native_of(options, 1)
    for store in stores:
        append(store, mx.array(turning), values)
        store.seal()
        assert [store.centering(0, head) for head in (0, 1)] == ["mean", "rope"]
    given, expected = (np.frombuffer(store.serialize(), np.uint8) for store in stores)
    assert len(given) == len(expected)
    tiles = stores[0].memory()["packed_bytes"]
    assert np.not_equal(given[-tiles:], expected[-tiles:]).sum() <= 1e-3 * tiles


class Trio:
    """All three stores, after the same operations."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rng = np.random.default_rng(seed)
        choice = self.random.choice
        dim = choice([16, 64, 80, 128])
        own_rope = choice(
            [None, rope(choice([dim, dim // 2]), choice(["half_split", "interleaved"]))]
        )
        self.options = Options(
            kv_heads=choice([1, 2, 3]),
            head_dim=dim,
            value_head_dim=choice([dim, 32]),
            dtype=choice(["float32", "bfloat16", "float16"]),
            bits_k=self.random.randint(2, 8),
            bits_v=self.random.randint(2, 8),
            sink_tokens=choice([0, 4]),
            residual_window=choice([0, 16, 100]),
            rotation=choice(["auto", "haar"]),
            centering=choice(["auto", "none", "mean"] + ["rope"] * (own_rope is not None)),
            rope=own_rope,
            seed=self.random.getrandbits(60),
        )
        batch = choice([1, 2, 4])
        self.mean = choice([0.0, 2.0])
        self.stores: list[Any] = [
            MlxStore(self.options, batch),
            TorchStore(self.options, batch, CPU),
            native_of(self.options, batch),
        ]

    def all(self, change: Callable[[Any], Any]) -> None:
        for store in self.stores:
            change(store)

    def append(self) -> None:
        count = self.random.choice([1, 5, 64, 130, 400])
        tokens = tokens_for(self.options, self.rng, self.stores[0].batch, count, self.mean)
        self.all(lambda store: append(store, *tokens))
        if self.random.random() < 0.6:
            self.all(lambda store: store.seal())

    def crop(self) -> None:
        first, tokens = self.stores[2].first_token, self.stores[2].tokens
        kept = self.random.choice([0, self.random.randint(first, tokens), max(first, tokens - 10)])
        self.all(lambda store: store.crop(kept))

    def select(self) -> None:
        batch = self.stores[0].batch
        rows = [self.random.randrange(batch) for _ in range(self.random.randint(1, 5))]
        self.all(lambda store: store.select(rows))

    def discard(self) -> None:
        token = self.random.randint(0, self.stores[2].tokens)
        self.all(lambda store: store.discard_before(token))

    def copy(self) -> None:
        copies = [store.copy() for store in self.stores]
        self.append()  # which the copies must not see
        self.stores = copies

    def pad(self) -> None:
        native = self.stores[2]
        if native.first_token > 0 or native.packed_tokens(0) > 0:
            return
        counts = [self.random.randint(0, min(native.tokens, 20)) for _ in range(native.batch)]
        if all(native.packed_tokens(row) == 0 for row in range(native.batch)):
            self.all(lambda store: store.set_padding(counts))

    def exchange(self) -> None:
        """Each goes on from another's bytes."""
        ours, theirs, native = (store.serialize() for store in self.stores)
        assert pickle.loads(pickle.dumps(self.stores[0])).serialize() == ours
        self.stores = [
            MlxStore.deserialize(native),
            TorchStore.deserialize(ours, CPU),
            _core.KvCache.deserialize(theirs),
        ]

    def compare(self) -> None:
        ours, theirs, native = self.stores
        for store in (theirs, native):
            assert (ours.tokens, ours.batch) == (store.tokens, store.batch)
            assert ours.first_token == store.first_token
            for row in range(ours.batch):
                assert ours.packed_tokens(row) == store.packed_tokens(row)
                for head in range(ours.kv_heads):
                    assert ours.centering(row, head) == store.centering(row, head)
            for name in ("tokens", "packed_tokens", "uncompressed_bytes"):
                assert ours.memory()[name] == store.memory()[name]
        data = ours.serialize()
        twin = TorchStore.deserialize(data, CPU)  # the very same codes
        assert twin.serialize() == data
        if ours.tokens == 0:
            return
        first = self.random.randrange(ours.tokens)
        given = ours.gather(first, ours.tokens - first, (mx.float32, mx.float32))
        expected = twin.gather(first, ours.tokens - first, (torch.float32, torch.float32))
        for one, other in zip(given, expected, strict=True):
            assert np.allclose(numbers(one), numbers(other), rtol=1e-4, atol=1e-4)
        self.compare_attention(twin)

    def compare_attention(self, twin: TorchStore) -> None:
        ours, _, native = self.stores
        chance, choice = self.random.random, self.random.choice
        heads = ours.kv_heads * choice([1, 2, 4])
        count = min(ours.tokens, choice([1, 3, 20]))
        shape = ours.batch, heads, count, ours.head_dim
        queries = mx.array(self.rng.standard_normal(shape, np.float32))
        options: dict[str, Any] = {
            "first_token": choice([0, ours.tokens // 3]),
            "window": choice([0, 50]),
            "soft_cap": choice([0.0, 5.0]),
            "causal": chance() < 0.8,
        }
        if chance() < 0.4:
            of = choice([1, ours.batch]), choice([1, heads]), count
            mask = self.rng.random((*of, ours.tokens - options["first_token"])) > 0.3
            if chance() < 0.5:
                more = self.rng.standard_normal(mask.shape, np.float32)
                mask = np.where(mask, more, np.float32(-1e30))
            options["mask"] = mx.array(mask)
        if chance() < 0.4:
            options["sinks"] = mx.array(self.rng.standard_normal(heads, np.float32))
        given = attend(ours, queries, **options)
        assert np.isfinite(given).all()
        assert distance(given, attend(twin, queries, **options)) < 1e-5
        assert distance(given, attend(native, queries, **options)) < 0.04  # integer products


@pytest.mark.parametrize("seed", range(12))
def test_the_same_operations_give_the_same_cache(seed: int) -> None:
    trio = Trio(seed)
    others = [trio.crop, trio.select, trio.discard, trio.copy, trio.pad, trio.exchange]
    for _ in range(12):
        trio.random.choice([trio.append] * 5 + others)()
        trio.compare()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_attention_is_that_of_the_other_store(bits: int, dim: int) -> None:
    options = replace(
        OPTIONS, head_dim=dim, value_head_dim=dim, bits_k=bits, bits_v=10 - bits, rope=rope(dim)
    )
    rng = np.random.default_rng(dim + bits)
    store = MlxStore(options, 1)
    store.append(*tokens_for(options, rng, 1, 700, 2.0))
    store.seal()
    twin = TorchStore.deserialize(store.serialize(), CPU)
    queries = mx.array(rng.standard_normal((1, 6, 2, dim), np.float32))
    mask = mx.array(rng.random((1, 1, 2, 700)) > 0.3)
    sinks = mx.array(rng.standard_normal(6, np.float32))
    for asked in (
        {},
        {"window": 300, "scale": 0.3},
        {"causal": False, "mask": mask, "sinks": sinks, "soft_cap": 4.0},
    ):
        given = attend(store, queries, **asked)
        assert distance(given, attend(twin, queries, **asked)) < 1e-5
    assert store.attend(queries.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_a_decoding_step_computes_nothing_before_it_is_asked_to() -> None:
    """mlx lets nothing be computed while it traces a function."""
    options = replace(OPTIONS, rope=rope(64))
    rng = np.random.default_rng(0)
    store = MlxStore(options, 1)
    store.append(*tokens_for(options, rng, 1, 5000, 2.0))
    store.seal()

    def step(keys: mx.array, values: mx.array, queries: mx.array) -> mx.array:
        store.append(keys, values)
        store.seal()
        return store.attend(queries, window=4000, sinks=mx.zeros(4))

    token = tokens_for(options, rng, 1, 1)
    queries = mx.array(rng.standard_normal((1, 4, 1, 64), np.float32))

    class TracedError(Exception):
        """The whole function was traced; to compile it would take long."""

    def traced(*arrays: mx.array) -> mx.array:
        step(*arrays)
        raise TracedError

    def looking(*arrays: mx.array) -> None:
        store.copy().append(*(mx.concatenate([array] * 2, 2) for array in arrays))

    with pytest.raises(ValueError, match="eval an array"):  # what would be seen
        mx.compile(looking)(*token)
    with pytest.raises(TracedError):
        mx.compile(traced)(*token, queries)


def test_pages_are_unpacked_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """What attention takes beside the cache does not grow with it, put off as all of it is."""
    monkeypatch.setattr(device_rows, "_SCRATCH_FLOATS", 1 << 18)
    rng = np.random.default_rng(6)
    options = replace(OPTIONS, kv_heads=1, rope=rope(64))
    peaks = []
    for parts in (3, 24):
        store = MlxStore(options, 1)
        for _ in range(parts):
            store.append(*tokens_for(options, rng, 1, 500, 2.0))
            store.seal()
        queries = mx.array(rng.standard_normal((1, 4, 16, 64), np.float32))
        mx.eval(store.attend(queries))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(store.attend(queries))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 2 * peaks[0]


def test_nan_is_refused_and_in_single_tokens_when_they_are_sealed() -> None:
    rng = np.random.default_rng(1)
    store = MlxStore(OPTIONS, 1)
    store.append(*tokens_for(OPTIONS, rng, 1, 100))
    before = store.serialize()
    keys, values = tokens_for(OPTIONS, rng, 1, 3)
    with pytest.raises(ValueError, match=r"values\[0, 0\] of token 100 holds NaN"):
        store.append(keys, values * math.inf)
    assert store.serialize() == before
    store.append(keys[:, :, :1] * math.nan, values[:, :, :1])
    store.append(*tokens_for(OPTIONS, rng, 1, 64))
    with pytest.raises(ValueError, match="token 100 holds NaN"):
        store.seal()


def test_the_report_is_what_the_arrays_take() -> None:
    """But for what mlx leaves of larger memory in the place of copying, 16 KB at most an array."""
    rng = np.random.default_rng(2)
    options = replace(OPTIONS, head_dim=128, value_head_dim=128, rope=rope(128))
    MlxStore(options, 1)  # whose tables are shared
    tokens = [tokens_for(options, rng, 1, count) for count in (2000, 1, 200)]
    mx.eval(tokens)
    before = mx.get_active_memory()
    store = MlxStore(options, 1)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: store.crop(1500),
        lambda: store.discard_before(1000),
        lambda: store.select([0]),
    ]
    for change in changes:
        change()
        for part in tokens:
            store.append(*part)
            store.seal()
        mx.eval(store.attend(mx.zeros((1, 2, 1, 128))))
        report = store.memory()
        held = mx.get_active_memory() - before
        assert report["packed_bytes"] > 0
        assert report["total_bytes"] <= held + 16384 and held <= report["total_bytes"] + 65536


def test_copies_share_tiles_and_the_window_is_their_own() -> None:
    rng = np.random.default_rng(4)
    store = MlxStore(OPTIONS, 2)
    store.append(*tokens_for(OPTIONS, rng, 2, 700))
    store.seal()
    queries = mx.array(rng.standard_normal((2, 4, 1, 64), np.float32))
    expected = store.attend(queries)
    twin = copy.deepcopy(store)
    assert twin.rows[0].pages[0].tiles is store.rows[0].pages[0].tiles
    twin.append(*tokens_for(OPTIONS, rng, 2, 1))
    store.append(*tokens_for(OPTIONS, rng, 2, 1))
    store.crop(700)
    assert mx.array_equal(store.attend(queries), expected)
