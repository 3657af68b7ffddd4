"""What it costs to keep a prompt's keys and values elsewhere, and what it brings.

A prompt is read once. Its keys and values go through each format in chunks, as between servers, and
the model reads on from what comes back, beside a cache that never left; the packed ones go to
stores and back; and the time that reading took stands beside the time that fetching would take.
"""

from __future__ import annotations

import math
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import DynamicCache

from tqai import api
from tqai.exchange.chunk import ChunkCodec
from tqai.exchange.chunk_options import ChunkOptions
from tqai.exchange.shelf import shelf_at
from tqai.measure.text import prose
from tqai.measure.time_prefill import _read, _seal, _seconds
from tqai.settings import DEFAULT_BITS, Dtype
from tqai.transformers.loading import load
from tqai.transformers.model.geometry import geometry_of
from tqai.transformers.model.names import cache_argument
from tqai.transformers.prefixes.store import PrefixStore

LINKS = (1, 10, 25, 100, 400)
"""Gbit/s."""
Tensors = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class FormatCost:
    """A format of chunks."""

    name: str
    bytes: int
    """Of the prompt."""
    times_smaller: float
    """Than bfloat16."""
    encode_gigabytes: float
    """Of bfloat16 a second and core; 0: there is nothing to do."""
    decode_gigabytes: float
    kl: float
    """Mean KL divergence of the next tokens' distributions from those of the exact cache."""
    later_kl: float
    """The same after `rest` tokens, which are exact wherever the tokens before them come from."""
    fetch_seconds: dict[int, float] = field(default_factory=dict)
    """Over links of ``LINKS``, with decoding on one core: computed."""
    break_even: float = 0.0
    """Gbit/s from which on fetching is faster than reading the prompt; infinite: never."""


@dataclass(frozen=True)
class ShelfTime:
    """A store's own times for the prompt's packed chunks."""

    url: str
    put_gigabytes: float
    """Of packed bytes a second."""
    fetch_gigabytes: float


@dataclass(frozen=True)
class StoreTime:
    """All of it."""

    tokens: int
    threads: int
    dtype: str
    read_seconds: float
    """Reading the prompt, to the first token."""
    with_prefix_seconds: float
    """The same by ``generate`` with a store that has the prompt."""
    prefix_tokens: int
    """Of the prompt, how many the store had."""
    prefix_bytes: int
    in_process_kl: tuple[float, float]
    """Of tqai's cache that never left the process, at the default bits: ``kl`` and ``later_kl``."""
    formats: list[FormatCost]
    shelves: list[ShelfTime]


@torch.inference_mode()
def time_store(
    model: str | None = None,
    dtype: Dtype = "float32",
    tokens: int = 4096,
    *,
    read: int = 64,
    rest: int = 128,
    chunk: int = 256,
    urls: Iterable[str] = (),
    exact_first: Iterable[int] = (),
    rounds: int = 5,
    progress: Callable[[int, int, str], None] | None = None,
) -> StoreTime:
    """Measures a prompt of `tokens` tokens of real text on the CPU.

    Args:
        model, dtype: as for ``tqai.transformers.loading.load``.
        read: tokens that follow, whose distributions are compared; once more after `rest` tokens:
            of a prompt that is fetched in chunks, half a chunk is read as it is on average, and a
            cache in the process has its window.
        chunk: tokens of a chunk, a multiple of 64.
        urls: stores to time beside a folder of its own.
        exact_first: other numbers of first tokens of each chunk to keep exact than the default,
            each a further format.
        rounds: of each format; the fastest counts.
        progress: called with steps done, all steps, and what is being done.

    Raises:
        ValueError: for numbers out of range, more tokens than the text has, and a model whose
            layers have not all heads of one dimension.
    """
    if chunk < 64 or chunk % 64 or tokens < chunk or read < 1 or rounds < 1 or rest < 0:
        raise ValueError(
            f"tokens={tokens}, chunk={chunk}, read={read}, rest={rest}, rounds={rounds}: expected "
            "chunks of a multiple of 64 tokens, at least one of them, and at least 1 of the others"
        )
    loaded, tokenizer = load(model, dtype)
    ids = torch.tensor([tokenizer(prose(), verbose=False).input_ids])
    tokens = tokens // chunk * chunk
    end = tokens + rest + read
    if end > ids.shape[1]:
        raise ValueError(f"tokens={tokens}: expected at most {ids.shape[1] - end + tokens}")
    prompt, more = ids[:, :tokens], [ids[:, tokens : end - read], ids[:, end - read : end]]
    steps = _Steps(progress, 5)
    plain = DynamicCache()
    steps.next("reading the prompt")
    read_seconds = _seconds(lambda: _read(loaded, prompt, plain), prompt.device)
    layers: list[Any] = plain.layers
    states = [(layer.keys, layer.values) for layer in layers]
    expected = _says(loaded, _cache_of(states), more)

    def divergences(cache: Any) -> tuple[float, float]:
        found = _says(loaded, cache, more)
        return _kl(expected[:read], found[:read]), _kl(expected[-read:], found[-read:])

    steps.next("formats")
    options = _options(loaded)
    packed: list[tuple[str, dict[str, Any]]] = [
        ("K4/V4", {"bits_k": 4, "bits_v": 4}),
        ("K4/V2", {}),
        ("K4/V2, trellis", {"codec": "trellis"}),
        ("K2/V2", {"bits_k": 2}),
        *((f"K4/V2, first {n} exact", {"exact_first": n}) for n in exact_first),
    ]
    formats = []
    chunks = _chunks(states, chunk)
    for name, convert in (
        ("bfloat16", None),
        ("fp8 (e4m3)", torch.float8_e4m3fn),
        *((name, ChunkCodec(ChunkOptions(**options, **extra))) for name, extra in packed),
    ):
        cost, back = _through(name, convert, chunks, rounds)
        found = divergences(_cache_of(_tensors(back, states)))
        whole = sum(each.nbytes for each in chunks)
        formats.append(_with_links(cost, found, whole, read_seconds))
    steps.next("a cache of this process")
    with api.patched(loaded, **DEFAULT_BITS):
        cache = api.new_cache(loaded)
        _seal(cache, states)
        in_process = divergences(cache)
    steps.next("stores")
    entry = bytes(_encoded(ChunkCodec(ChunkOptions(**options)), chunks[0]))
    folder = tempfile.mkdtemp()
    try:
        shelves = [_time_shelf(url, entry, len(chunks)) for url in (f"{folder}/shelf", *urls)]
        steps.next("a prompt that is stored")
        with_prefix, held, size = _with_prefix(loaded, prompt, states, f"{folder}/prefixes")
    finally:
        shutil.rmtree(folder)
    return StoreTime(
        tokens,
        torch.get_num_threads(),
        dtype,
        read_seconds,
        with_prefix,
        held,
        size,
        in_process,
        formats,
        shelves,
    )


class _Steps:
    def __init__(self, progress: Callable[[int, int, str], None] | None, count: int) -> None:
        self._progress, self._count, self._done = progress, count, 0

    def next(self, what: str) -> None:
        if self._progress is not None:
            self._progress(self._done, self._count, what)
        self._done += 1


def _options(model: Any) -> dict[str, Any]:
    """Of ``ChunkOptions``, what the model says."""
    geometry = geometry_of(model, afresh=True)
    dims = {None if heads is None else heads.dim for heads in geometry.heads}
    if len(dims) != 1 or None in dims:
        raise ValueError(f"{geometry.describe()}: its layers have not all heads of one dimension")
    ropes = set(geometry.ropes)
    rope = ropes.pop() if len(ropes) == 1 else None
    options: dict[str, Any] = {"head_dim": dims.pop()}
    if rope is not None and not rope.sections and not rope.changes:
        options["rope"] = {"inv_freq": list(rope.inv_freq), "layout": rope.layout}
    return options


def _chunks(states: Tensors, chunk: int) -> list[torch.Tensor]:
    """Chunks [2, layers, chunk, heads · dim] in bfloat16."""
    sides = [torch.stack([pair[side][0] for pair in states]) for side in range(2)]
    whole = torch.stack(sides).transpose(2, 3).flatten(3).to(torch.bfloat16)
    return [part.contiguous() for part in whole.split(chunk, 2)]


def _tensors(chunks: Sequence[torch.Tensor], like: Tensors) -> Tensors:
    whole = torch.cat(list(chunks), 2)
    heads, dim = like[0][0].shape[1], like[0][0].shape[3]
    sides = whole.to(like[0][0].dtype).unflatten(3, (heads, dim)).transpose(2, 3)
    return [(keys[None], values[None]) for keys, values in zip(*sides, strict=True)]


def _cache_of(states: Tensors) -> DynamicCache:
    cache = DynamicCache()
    for index, (keys, values) in enumerate(states):
        cache.update(keys, values, index)
    return cache


def _distributions(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities after each of `ids`, [tokens, vocabulary]."""
    output = model(ids, use_cache=True, **cache_argument(model, cache))
    return output.logits[0].float().log_softmax(-1)


def _says(model: Any, cache: Any, more: Sequence[torch.Tensor]) -> torch.Tensor:
    """Log-probabilities after each of all these ids, read one part after another."""
    return torch.cat([_distributions(model, cache, ids) for ids in more if ids.shape[1]])


def _kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def _encoded(codec: ChunkCodec, chunk: torch.Tensor) -> bytearray:
    data = bytearray(codec.size(chunk.shape, chunk.dtype))
    codec.encode(chunk, memoryview(data))
    return data


def _through(
    name: str, convert: ChunkCodec | torch.dtype | None, chunks: list[torch.Tensor], rounds: int
) -> tuple[FormatCost, list[torch.Tensor]]:
    """What a format costs, and the chunks as they come back."""
    whole = sum(chunk.nbytes for chunk in chunks)
    back, size = [], 0
    encoding = decoding = 0.0
    if convert is None:
        back, size = chunks, whole
    elif isinstance(convert, torch.dtype):
        back = [chunk.to(convert).to(chunk.dtype) for chunk in chunks]
        size = whole // 2
        one = chunks[0].to(convert)
        encoding = _fastest(lambda: chunks[0].to(convert), rounds)
        decoding = _fastest(lambda: one.to(chunks[0].dtype), rounds)
    else:
        for chunk in chunks:
            data = _encoded(convert, chunk)
            size += len(data)
            back.append(torch.empty_like(chunk))
            convert.decode(memoryview(data), back[-1])
        room = bytearray(convert.size(chunks[0].shape, chunks[0].dtype))
        encoding = _fastest(lambda: convert.encode(chunks[0], memoryview(room)), rounds)
        into = torch.empty_like(chunks[0])
        decoding = _fastest(lambda: convert.decode(memoryview(room), into), rounds)
    speeds = [
        chunks[0].nbytes / seconds / 1e9 if seconds else 0.0 for seconds in (encoding, decoding)
    ]
    return FormatCost(name, size, whole / size, *speeds, kl=0.0, later_kl=0.0), back


def _fastest(call: Callable[[], Any], rounds: int) -> float:
    """Seconds of a call on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call()
        return min(_timed(call) for _ in range(max(rounds, 1)))
    finally:
        torch.set_num_threads(threads)


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _with_links(
    cost: FormatCost, kl: tuple[float, float], whole: int, read_seconds: float
) -> FormatCost:
    """whole: bytes of the prompt in bfloat16."""
    decoding = whole / 1e9 / cost.decode_gigabytes if cost.decode_gigabytes else 0.0
    fetch = {link: 8 * cost.bytes / 1e9 / link + decoding for link in LINKS}
    left = read_seconds - decoding
    even = 8 * cost.bytes / 1e9 / left if left > 0 else math.inf
    return replace(cost, kl=kl[0], later_kl=kl[1], fetch_seconds=fetch, break_even=even)


def _time_shelf(url: str, entry: bytes, count: int) -> ShelfTime:
    """Puts and fetches `count` entries of these bytes, and takes them away again."""
    shelf = shelf_at(url, 1 << 40)
    names = [secrets.token_hex(16) for _ in range(count)]
    try:
        put = _timed(lambda: [shelf.put(name, entry) for name in names])
        fetched = _timed(lambda: shelf.fetch(names))
    finally:
        for name in names:
            shelf.remove(name)
    size = count * len(entry) / 1e9
    return ShelfTime(url, size / put, size / fetched)


def _with_prefix(
    model: Any, prompt: torch.Tensor, states: Tensors, url: str
) -> tuple[float, int, int]:
    """Seconds to the first token with a store that has the prompt, tokens and bytes in it."""
    with api.patched(model):
        store, cache = PrefixStore(url), api.new_cache(model)
        cache.weights = cache.geometry.weights()
        _seal(cache, states)
        store.save(cache, prompt)
        store.attach(model)
        seconds = _timed(
            lambda: model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=0,
            )
        )
        return seconds, store.report()["loaded_tokens"], store.used_bytes()
