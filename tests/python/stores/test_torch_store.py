"""The store in torch operations beside the C++ one: the same operations, tiles and bytes."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqai import _core
from tqai.stores import for_torch as stores
from tqai.stores.device import Options
from tqai.stores.device import rows as device_rows
from tqai.stores.device.attend import attend_tiles
from tqai.stores.device.codec import codec_of
from tqai.stores.for_torch.operations import TorchOperations
from tqai.stores.for_torch.tensor_refs import mask_ref, ref
from tqai.stores.for_torch.torch_store import TorchStore

CPU = torch.device("cpu")
F32 = torch.float32
BOTH_F32 = F32, F32
ROPE = tuple(10000.0 ** (-i / 32) for i in range(0, 32, 2)), "half_split", 32
OPTIONS = Options(2, 64, 64, "float32", 4, 2, 4, 16, "auto", "auto", None)


def native_of(options: Options, batch: int) -> _core.KvCache:
    values = {name: value for name, value in vars(options).items() if name != "rope"}
    rope = None if options.rope is None else (list(options.rope[0]), *options.rope[1:])
    return _core.KvCache(batch=batch, rope=rope, **{**values, "dtype": _core.DType[options.dtype]})


def tokens_for(
    options: Options, batch: int, count: int, mean: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randn(batch, options.kv_heads, count, options.head_dim)
    keys += mean * torch.arange(options.head_dim).sin()
    values = torch.randn(batch, options.kv_heads, count, options.value_head_dim)
    dtype = getattr(torch, options.dtype)
    return keys.to(dtype), values.to(dtype)


def filled(options: Options, batch: int, count: int, mean: float = 0.0) -> TorchStore:
    store = TorchStore(options, batch, CPU)
    store.append(*tokens_for(options, batch, count, mean))
    store.seal()
    return store


def native_gather(store: _core.KvCache) -> tuple[torch.Tensor, torch.Tensor]:
    shape = store.batch, store.kv_heads, store.tokens
    keys = torch.empty(*shape, store.head_dim)
    values = torch.empty(*shape, store.value_head_dim)
    store.gather(0, ref(keys), ref(values))
    return keys, values


def exact_attention(
    store: TorchStore, queries: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """In double precision, over what the store decompresses. visible: [.., n, tokens] bool."""
    keys, values = (part.double() for part in store.gather(0, store.tokens, BOTH_F32))
    groups = queries.shape[1] // store.kv_heads
    keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
    scores = queries.double() @ keys.mT * scale
    scores = scores.masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ values).transpose(1, 2)


# The same as the C++ library's.


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [16, 24, 128])
def test_the_bytes_are_those_of_the_native_store(bits: int, dim: int) -> None:
    torch.manual_seed(bits)
    options = replace(
        OPTIONS, head_dim=dim, value_head_dim=dim, bits_k=bits, bits_v=9 - bits, centering="none"
    )
    keys, values = tokens_for(options, 2, 400)
    store, native = TorchStore(options, 2, CPU), native_of(options, 2)
    store.append(keys, values)
    native.append(ref(keys), ref(values))
    store.seal()
    native.seal()
    given, expected = store.serialize(), native.serialize()
    assert len(given) == len(expected)
    assert store.memory()["packed_bytes"] == native.memory()["packed_bytes"] > 0
    # Coordinates that lie within rounding of a boundary may go either way.
    different = sum(a != b for a, b in zip(given, expected, strict=True))
    assert different <= 1e-3 * len(expected)


class Pair:
    """Both stores, after the same operations."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        choice = self.random.choice
        dim = choice([16, 24, 64, 80])
        rotary = choice([dim, dim // 2])
        inv_freq = tuple(10000.0 ** (-i / rotary) for i in range(0, rotary, 2))
        rope = choice([None, (inv_freq, choice(["half_split", "interleaved"]), rotary)])
        self.options = Options(
            kv_heads=choice([1, 2, 3]),
            head_dim=dim,
            value_head_dim=choice([dim, 32]),
            dtype=choice(["float32", "bfloat16", "float16"]),
            bits_k=self.random.randint(1, 8),
            bits_v=self.random.randint(1, 8),
            sink_tokens=choice([0, 4]),
            residual_window=choice([0, 16, 100]),
            rotation=choice(["auto", "haar"]),
            centering=choice(["auto", "none", "mean"] + ["rope"] * (rope is not None)),
            rope=rope,
            seed=self.random.getrandbits(60),
        )
        batch = choice([1, 2, 4])
        self.mean = choice([0.0, 2.0])
        self.store = TorchStore(self.options, batch, CPU)
        self.native = native_of(self.options, batch)

    def append(self) -> None:
        count = self.random.choice([1, 5, 64, 130, 500])
        keys, values = tokens_for(self.options, self.store.batch, count, self.mean)
        self.store.append(keys, values)
        self.native.append(ref(keys), ref(values))
        if self.random.random() < 0.6:
            self.store.seal()
            self.native.seal()

    def crop(self) -> None:
        first, tokens = self.native.first_token, self.native.tokens
        kept = self.random.choice([0, self.random.randint(first, tokens), max(first, tokens - 10)])
        self.store.crop(kept)
        self.native.crop(kept)

    def select(self) -> None:
        count = self.random.randint(1, 5)
        rows = [self.random.randrange(self.store.batch) for _ in range(count)]
        self.store.select(rows)
        self.native.select(rows)

    def discard(self) -> None:
        token = self.random.randint(0, self.native.tokens)
        self.store.discard_before(token)
        self.native.discard_before(token)

    def copy(self) -> None:
        copies = copy.deepcopy(self.store), self.native.copy()
        self.append()  # which the copies must not see
        self.store, self.native = copies

    def pad(self) -> None:
        if self.native.first_token > 0 or self.native.packed_tokens(0) > 0:
            return
        most = min(self.native.tokens, 20)
        counts = [self.random.randint(0, most) for _ in range(self.store.batch)]
        try:
            self.native.set_padding(counts)
        except ValueError:
            with pytest.raises(ValueError):
                self.store.set_padding(counts)
        else:
            self.store.set_padding(counts)

    def exchange(self) -> None:
        """Each goes on from the other's bytes."""
        data = self.store.serialize(), self.native.serialize()
        assert pickle.loads(pickle.dumps(self.store)).serialize() == data[0]
        self.native = _core.KvCache.deserialize(data[0])
        self.store = TorchStore.deserialize(data[1], CPU)

    def compare(self) -> None:
        store, native = self.store, self.native
        assert (store.tokens, store.batch) == (native.tokens, native.batch)
        assert store.first_token == native.first_token
        for row in range(store.batch):
            assert store.packed_tokens(row) == native.packed_tokens(row)
            for head in range(store.kv_heads):
                assert store.centering(row, head) == native.centering(row, head)
        memory = store.memory(), native.memory()
        for name in ("tokens", "packed_tokens", "uncompressed_bytes"):
            assert memory[0][name] == memory[1][name]
        gathered = store.gather(0, store.tokens, BOTH_F32), native_gather(native)
        for given, expected in zip(*gathered, strict=True):
            errors = (given - expected).norm(dim=-1)
            moved = errors > 1e-3 * expected.norm(dim=-1) + 1e-5  # by a code at a boundary
            assert moved.sum() <= max(2, 5e-3 * moved.numel())
        if store.tokens > 0:
            self.compare_attention()

    def compare_attention(self) -> None:
        store, native, chance = self.store, self.native, self.random.random
        heads = store.kv_heads * self.random.choice([1, 2, 4])
        count = min(store.tokens, self.random.choice([1, 3, 20]))
        queries = torch.randn(store.batch, heads, count, store.head_dim)
        options: dict[str, Any] = {
            "first_token": self.random.choice([0, store.tokens // 3]),
            "window": self.random.choice([0, 50]),
            "soft_cap": self.random.choice([0.0, 5.0]),
            "causal": chance() < 0.8,
        }
        mask = sinks = None
        if chance() < 0.4:
            batch, mask_heads = self.random.choice([1, store.batch]), self.random.choice([1, heads])
            mask = torch.rand(batch, mask_heads, count, store.tokens - options["first_token"]) > 0.3
            if chance() < 0.5:
                mask = torch.where(mask, torch.randn(mask.shape), -1e30)
        if chance() < 0.4:
            sinks = torch.randn(heads)
        expected = torch.empty(store.batch, count, heads, store.value_head_dim)
        native.attend(
            ref(queries),
            ref(expected),
            mask=None if mask is None else mask_ref(mask),
            sink_scores=0 if sinks is None else sinks.data_ptr(),
            **options,
        )
        given = store.attend(queries, mask=mask, sinks=sinks, **options)
        assert torch.isfinite(given).all()
        assert (given - expected).norm() <= 0.04 * expected.norm()  # what integer products cost


@pytest.mark.parametrize("seed", range(30))
def test_the_same_operations_give_the_same_cache(seed: int) -> None:
    pair = Pair(seed)
    others = [pair.crop, pair.select, pair.discard, pair.copy, pair.pad, pair.exchange]
    for _ in range(16):
        pair.random.choice([pair.append] * 5 + others)()
        pair.compare()


# Attention.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("centering", ["none", "mean", "rope"])
def test_attention_is_that_over_the_decompressed_tokens(dtype: str, centering: str) -> None:
    torch.manual_seed(1)
    store = filled(replace(OPTIONS, rope=ROPE, centering=centering, dtype=dtype), 2, 5000, 2.0)
    queries = torch.randn(2, 6, 3, 64)
    position = torch.arange(store.tokens - 3, store.tokens)[:, None]
    visible = torch.arange(store.tokens) <= position
    given = store.attend(queries)
    assert given.shape == (2, 3, 6, 64)
    expected = exact_attention(store, queries, visible, 64**-0.5)
    assert (given - expected).norm() < 1e-5 * expected.norm()
    windowed = store.attend(queries, window=700, scale=0.3)
    expected = exact_attention(
        store, queries, visible & (torch.arange(store.tokens) > position - 700), 0.3
    )
    assert (windowed - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(
        store.attend(queries.half()).float(), store.attend(queries.half().float()).half().float()
    )


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    store = filled(OPTIONS, 2, 300)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[1] = False
    output = store.attend(torch.randn(2, 2, 1, 64), mask=mask)
    assert (output[1] == 0).all() and (output[0] != 0).any()


def test_a_query_that_is_not_a_number_spoils_no_other() -> None:
    store = filled(OPTIONS, 1, 300)
    queries = torch.randn(1, 4, 1, 64)
    expected = store.attend(queries)
    queries[0, 2, 0, 5] = math.nan
    output = store.attend(queries)
    assert output[0, 0, 2].isnan().all()
    assert torch.equal(output[0, 0, [0, 1, 3]], expected[0, 0, [0, 1, 3]])


def test_results_do_not_depend_on_how_many_tiles_are_opened_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(2)
    tokens, queries = tokens_for(OPTIONS, 2, 6000, 1.0), torch.randn(2, 4, 5, 64)
    results = []
    for floats in (1, 1 << 30):
        monkeypatch.setattr(device_rows, "_SCRATCH_FLOATS", floats)
        store = TorchStore(replace(OPTIONS, rope=ROPE), 2, CPU)
        store.append(*tokens)
        store.seal()
        results.append((store.attend(queries), *store.gather(0, 6000, BOTH_F32)))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    for one, all_at_once in zip(results[0][1:], results[1][1:], strict=True):
        assert ((one - all_at_once).norm(dim=-1) > 1e-3).float().mean() < 1e-3


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, result.numel())
        return result


def test_the_whole_cache_is_never_decompressed() -> None:
    options = replace(OPTIONS, kv_heads=1)
    sizes = []
    for count in (40_000, 80_000):
        store = filled(options, 1, count)
        with Largest() as largest:
            store.attend(torch.randn(1, 2, 1, 64))
        sizes.append(largest.elements)
    assert sizes[0] == sizes[1] < 40_000 * 64 / 4


def test_a_compiler_takes_a_step_whole() -> None:
    """No graph break, and other lengths need no other graph than the first two."""
    store = filled(replace(OPTIONS, centering="none"), 2, 1200)
    codec = codec_of(store.options, TorchOperations(CPU))
    (page,) = store.rows[0].pages
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attend_tiles, fullgraph=True, backend=backend)
    queries = torch.randn(2, 2, 2, 1, 64)
    for count in (5, 7, 9, 11):
        arguments = (codec, None, queries, page.read(0, count), 64 * count, torch.zeros(()), None)
        for given, expected in zip(
            compiled(*arguments, 0.0), attend_tiles(*arguments, 0.0), strict=True
        ):
            assert torch.equal(given, expected)
    assert len(graphs) <= 2


# Memory.


def storages(store: TorchStore) -> dict[int, int]:
    """Bytes of the storages that a store holds tokens in, by address."""
    found = {}
    for rows in store.rows:
        tensors = [part.tiles for part in rows.pages]
        tensors += [*rows.sinks.part(0, 0), *rows.tail.part(0, 0)]
        for centres in rows.centre_sets:
            tensors += [centres.constant, centres.means, torch.from_numpy(centres.left)]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() > 0:
                found[storage.data_ptr()] = storage.nbytes()
    return found


def test_the_report_is_what_the_tensors_take() -> None:
    torch.manual_seed(3)
    store = TorchStore(replace(OPTIONS, rope=ROPE), 3, CPU)
    changes = [
        lambda: None,
        lambda: store.crop(700),
        lambda: store.select([2, 0, 2, 1]),
        lambda: store.discard_before(300),
        lambda: store.crop(20 + store.first_token),
    ]
    store.append(*tokens_for(store.options, 3, 20))
    store.set_padding([0, 3, 7])
    for change in changes:
        change()
        for count in (1, 150, 1000):
            store.append(*tokens_for(store.options, store.batch, count))
            store.seal()
            assert sum(storages(store).values()) == store.memory()["total_bytes"]
    assert store.memory()["packed_bytes"] > 0


def test_sealed_tokens_take_what_they_take_in_the_native_store() -> None:
    memory = filled(replace(OPTIONS, head_dim=128, value_head_dim=128), 1, 64 * 100 + 20).memory()
    assert memory["packed_tokens"] == 6400
    assert memory["packed_bytes"] == 6400 * 2 * (128 * 6 // 8 + 4)
    store = filled(OPTIONS, 1, 64 * 100 + 20)
    store.crop(0)
    assert store.memory()["total_bytes"] == 0


def test_copies_and_beams_share_tiles() -> None:
    store = filled(OPTIONS, 2, 3000)
    pages = {page.tiles.data_ptr() for page in store.rows[0].pages}
    twin = store.copy()
    assert {page.tiles.data_ptr() for page in twin.rows[0].pages} == pages
    packed = store.memory()["packed_bytes"]
    store.select([1, 1, 1, 1])
    assert store.memory()["packed_bytes"] == packed // 2
    expected = twin.gather(0, 3000, BOTH_F32)[0][1]
    assert all(torch.equal(row, expected) for row in store.gather(0, 3000, BOTH_F32)[0])


def test_decoding_fills_pages() -> None:
    """Or attention would go through as many pages as tiles."""
    store = filled(OPTIONS, 1, 84)
    for _ in range(100):
        store.append(*tokens_for(OPTIONS, 1, 64))
        store.select([0, 0])  # as beams do
        store.select([0])
    store.seal()
    assert store.packed_tokens(0) == 64 * 101
    assert [page.count for page in store.rows[0].pages] == [64, 37]


# Errors, and what is around.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda k, v: (k.index_fill(2, torch.tensor(3), math.nan), v), "NaN"),
        (lambda k, v: (k, v.index_fill(2, torch.tensor(3), math.inf)), "infinity"),
        (lambda k, v: (k[..., :32], v), "head_dim"),
        (lambda k, v: (k[:1], v[:1]), "batch"),
        (lambda k, v: (k, v[:, :, 1:]), "tokens"),
    ],
)
def test_what_cannot_be_held_is_refused_and_changes_nothing(change: Any, words: str) -> None:
    store = filled(OPTIONS, 2, 300)
    before, memory = store.serialize(), store.memory()
    with pytest.raises(ValueError, match=words):
        store.append(*change(*tokens_for(OPTIONS, 2, 70)))
    assert store.serialize() == before and store.memory() == memory


@pytest.mark.parametrize("store", ["native", "torch"])
@pytest.mark.parametrize("part", [0, 1])
def test_vectors_too_long_for_their_norms_stay_exact(store: str, part: int) -> None:
    """At a sink without consequences; elsewhere they keep what follows them from being sealed."""
    options = replace(OPTIONS, dtype="bfloat16")
    held: Any = TorchStore(options, 2, CPU) if store == "torch" else native_of(options, 2)
    states = tokens_for(options, 2, 300)
    states[part][0, 0, 0] = 1e30  # a sink
    states[part][1, 1, 100, 5] = 2e4
    stores.append(held, *states)
    assert held.seal() == 192
    assert [held.packed_tokens(row) for row in (0, 1)] == [256, 64]
    for _ in range(3):
        stores.append(held, *tokens_for(options, 2, 70))
    waiting = held.seal()
    assert waiting >= 64 and held.packed_tokens(1) == 64 and held.packed_tokens(0) == 448
    back = stores.gather(held, 0, 300, (torch.bfloat16, torch.bfloat16))[part]
    assert torch.equal(back[1, :, 68:], states[part][1, :, 68:])
    assert torch.equal(back[0, :, :4], states[part][0, :, :4])
    other = TorchStore.deserialize(held.serialize(), CPU)
    assert other.serialize() == held.serialize() and other.seal() == waiting
    held.crop(100)  # without it all goes on
    stores.append(held, *tokens_for(options, 2, 120))
    assert held.seal() == 0 and held.packed_tokens(1) == 192


@pytest.mark.parametrize("store", ["native", "torch"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_short_vectors_are_as_precise_as_others(store: str, bits: int) -> None:
    """FP16 norms are coarse below 6e-5; the codes make up for that."""
    options = replace(OPTIONS, bits_k=bits, bits_v=bits, sink_tokens=0, residual_window=0)
    options = replace(options, centering="none")
    errors = {}
    directions = [part / part.norm(dim=-1, keepdim=True) for part in tokens_for(options, 1, 64)]
    for norm in (1.0, 1e-5, 1e-6, 1e-7, 6e-8, 1e-12):
        held: Any = TorchStore(options, 1, CPU) if store == "torch" else native_of(options, 1)
        stores.append(held, *(norm * part for part in directions))
        assert held.seal() == 0 and held.packed_tokens(0) == 64
        back = stores.gather(held, 0, 64, BOTH_F32)
        pairs = zip(back, directions, strict=True)
        errors[norm] = max(float((x / norm - y).norm() / y.norm()) for x, y in pairs)
    assert errors.pop(1e-12) == 1.0  # zeros
    assert max(errors.values()) < 1.25 * errors[1.0]


@pytest.mark.parametrize("store", ["native", "torch"])
def test_vectors_along_one_rotated_axis_come_back_as_long(store: str) -> None:
    for bits in (1, 4, 8):
        options = replace(OPTIONS, head_dim=512, value_head_dim=512, bits_k=bits, bits_v=bits)
        options = replace(options, sink_tokens=0, residual_window=0, centering="none")
        held: Any = TorchStore(options, 1, CPU) if store == "torch" else native_of(options, 1)
        rotations = [torch.from_numpy(part) for part in native_of(options, 1).rotations]
        norm = 0.999 * _core.KvCache.max_norm
        states = [(norm * part[3]).expand(1, 2, 64, 512).clone() for part in rotations]
        stores.append(held, *states)
        held.seal()
        for part in stores.gather(held, 0, 64, BOTH_F32):
            assert torch.allclose(part.norm(dim=-1), torch.tensor(norm), rtol=2e-3)


def test_infinity_in_half_precision_is_answered_with_a_dtype_that_has_room() -> None:
    keys, values = (part.half() for part in tokens_for(OPTIONS, 1, 3))
    values[0, 1, 2, 3] = math.inf
    options = replace(OPTIONS, dtype="float16")
    for held in (TorchStore(options, 1, CPU), native_of(options, 1)):
        with pytest.raises(ValueError, match=r"values\[0, 1.*65504.*bfloat16 or float32"):
            stores.append(held, keys, values)


def test_single_tokens_of_a_device_are_looked_at_when_they_are_sealed() -> None:
    store = filled(OPTIONS, 1, 100)
    keys, values = tokens_for(OPTIONS, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchOperations, "waits", True)
        store.append(keys * math.nan, values)
    tokens = store.tokens
    with pytest.raises(ValueError, match="token 100 holds NaN"):
        store.append(*tokens_for(OPTIONS, 1, 64))
        store.seal()
    store.crop(tokens - 1)
    store.append(*tokens_for(OPTIONS, 1, 64))
    store.seal()
    assert store.packed_tokens(0) == 128


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda store: store.crop(301), ValueError, "allowed: 0 or 0…300"),
        (lambda store: store.crop(-1), ValueError, "allowed"),
        (lambda store: store.select([]), ValueError, "no rows"),
        (lambda store: store.select([0, 2]), IndexError, "row 2 of a batch of 2"),
        (lambda store: store.set_padding([1]), ValueError, "1 padding counts"),
        (lambda store: store.set_padding([1, 0]), ValueError, "sealed"),
        (lambda store: store.set_padding([301, 0]), ValueError, "0…300"),
        (lambda store: store.discard_before(301), ValueError, "0…300"),
        (lambda store: store.packed_tokens(2), IndexError, "row 2 of a batch of 2"),
        (lambda _: TorchStore(replace(OPTIONS, bits_k=9), 1, CPU), ValueError, "bits_k"),
        (lambda _: TorchStore.deserialize(b"TQAI", CPU), ValueError, "damaged"),
    ],
)
def test_wrong_calls_raise_and_change_nothing(call: Any, error: type, words: str) -> None:
    store = filled(OPTIONS, 2, 300)
    before = store.serialize()
    with pytest.raises(error, match=words):
        call(store)
    assert store.serialize() == before


def test_inference_mode_may_come_and_go() -> None:
    torch.manual_seed(4)
    tokens = [tokens_for(OPTIONS, 1, count) for count in (3, 90, 2, 200)]
    stores = TorchStore(OPTIONS, 1, CPU), TorchStore(OPTIONS, 1, CPU)
    for at, token in enumerate(tokens):
        stores[0].append(*token)
        with torch.inference_mode(at % 2 == 0):
            stores[1].append(*(part.clone() for part in token))
            stores[1].seal()
        stores[0].seal()
    assert stores[0].serialize() == stores[1].serialize()


def test_autocast_changes_nothing() -> None:
    torch.manual_seed(5)
    store, queries = filled(OPTIONS, 1, 500), torch.randn(1, 4, 1, 64)
    tokens = tokens_for(OPTIONS, 1, 300)
    twin = store.copy()
    store.append(*tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        twin.append(*tokens)
        given = twin.attend(queries)
    assert torch.equal(given, store.attend(queries))


@pytest.fixture
def _no_default_device() -> Iterator[None]:
    """Whatever is made without saying where is nowhere, and fails when it is used."""
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("_no_default_device")
def test_every_tensor_is_made_on_the_stores_device() -> None:
    options = replace(OPTIONS, rope=ROPE, seed=random.getrandbits(40))  # no cached tables
    generator = torch.Generator("cpu").manual_seed(6)

    def tensors(batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = batch, 2, count, 64
        keys, values = (torch.randn(shape, generator=generator, device="cpu") for _ in range(2))
        return keys + 1.0, values

    store = TorchStore(options, 2, CPU)
    store.append(*tensors(2, 10))
    store.set_padding([0, 2])
    store.append(*tensors(2, 5000))
    store.seal()
    store.crop(4000)
    store.discard_before(100)
    store.select([1, 0, 1])
    store.append(*tensors(3, 300))
    store.seal()
    queries = tensors(3, 2)[0]
    mask = torch.ones(1, 1, 2, store.tokens, dtype=torch.bool, device="cpu")
    outputs = [
        store.attend(queries),
        store.attend(queries, mask=mask, window=80, soft_cap=3.0, first_token=0),
        store.attend(queries, window=80, sinks=torch.zeros(2, device="cpu")),
        *store.gather(0, store.tokens, BOTH_F32),
        *TorchStore.deserialize(store.serialize(), CPU).gather(0, store.tokens, BOTH_F32),
    ]
    assert all(output.device == CPU for output in outputs)


def test_rows_without_tokens_are_read_whether_they_had_any_or_not() -> None:
    native = native_of(OPTIONS, 2)
    keys, values = tokens_for(OPTIONS, 2, 100)
    keys[0, :, 5:] *= 1e5  # too long to be sealed
    first, rest = (
        [each.contiguous() for each in (keys[:, :, at], values[:, :, at])]
        for at in (slice(5), slice(5, None))
    )
    native.append(*map(ref, first))
    native.set_padding([5, 5])
    native.append(*map(ref, rest))
    native.seal()
    assert [native.packed_tokens(row) for row in (0, 1)] == [0, 64]
    native.crop(5)
    store = TorchStore.deserialize(native.serialize(), CPU)
    assert store.tokens == 5
