"""Attention of one layer over a packed past, timed beside torch's over the uncompressed one."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from tqai import _core
from tqai.measure.named_settings import parse_setting
from tqai.measure.timing import BUFFER_BYTES, in_turns, memory_reader, ratio
from tqai.settings import Settings
from tqai.stores.for_torch.tensor_refs import ref

CENTERINGS = ("mean", "rope")
SDPA = "torch SDPA"
SDPA_ROWS = "torch SDPA, rows"
MATMUL_ROWS = "torch matmul, rows"

_TORCH_DTYPES = (torch.float32, torch.bfloat16)
# Tokens that differ; they are repeated, as no kernel's time depends on the numbers.
_BLOCK = 1024
_READER = "memory"


@dataclass(frozen=True)
class Shape:
    """One attention call of each layer, batch 1."""

    dim: int
    """Coordinates of a head."""
    group: int
    """Query heads for each kv head."""
    kv_heads: int
    tokens: int
    """In the past. One query reads them all; more queries bring a token each, exact still."""
    queries: int
    layers: int = 1
    """Each with memory of its own. More than one are read in turn, as a model does: what the
    processor's caches do not hold comes from memory. All other numbers are of one of them."""


@dataclass(frozen=True)
class KernelTime:
    """What one way of attending took on one shape."""

    name: str
    """"tqai", or one of torch's: ``SDPA``, ``SDPA_ROWS``, ``MATMUL_ROWS``."""
    dtype: str
    """Of the queries, and of torch's keys and values."""
    bits: str | None
    level: str | None
    centering: str | None
    threads: int
    shape: Shape
    microseconds: float
    """Of the whole call from Python, median; of all layers' calls, divided by their number."""
    nanoseconds_per_token_head: float
    """For each token and kv head, with all of its query heads and queries."""
    bytes_read: int
    """Of keys and values, each counted once."""
    gigabytes_per_second: float
    bandwidth_share: float
    """Of what the machine reads, measured in the same rounds."""
    times_best_torch: float
    """How many times as fast as the best of torch's; the median of the rounds' ratios."""
    is_best_torch: bool
    rounds: int


@dataclass(frozen=True)
class KernelTimes:
    """All ways of attending on one shape."""

    bandwidth: float
    """Bytes a second that a sum over 256 MB reads, median of the same rounds."""
    rows: list[KernelTime]


@dataclass(frozen=True)
class _Way:
    """One way of attending: its call returns [1, queries, query_heads, dim]."""

    call: Callable[[], torch.Tensor]
    bytes_read: int
    name: str
    dtype: str
    bits: str | None = None
    level: str | None = None
    centering: str | None = None

    @property
    def key(self) -> str:
        parts = (self.name, self.dtype, self.bits, self.level, self.centering)
        return " ".join(part for part in parts if part)


def time_kernels(
    shapes: Iterable[Shape],
    bits: Iterable[str] = ("k4v4", "k4v2"),
    *,
    levels: Iterable[str | None] = (None,),
    centerings: Iterable[str] = ("mean",),
    rounds: int = 15,
    seconds: float = 4.0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Iterator[KernelTimes]:
    """Times each shape, with torch's threads.

    The past is packed, but for what does not fill a tile of 64 tokens. Where "rope" is asked for,
    keys have a bias on every other frequency, turned to each position, about as models' have.

    Args:
        bits: as k4v2, or presets.
        levels: of the kernels; None: the best here.
        rounds, seconds: as for ``in_turns``, for each shape.
        progress: called after every turn with the rounds done, all rounds, and what had its turn.

    Raises:
        ValueError: for numbers, bits or centerings out of range.
        NotImplementedError: for a level that this machine lacks.
    """
    shapes = list(shapes)
    for shape in shapes:
        for name, value in vars(shape).items():
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1")
    settings = [
        _settings(name, level, centering)
        for name, level, centering in product(bits, levels, centerings)
    ]
    if not settings:
        raise ValueError("bits, levels and centerings: expected at least one of each")
    for shape, setting in product(shapes, settings):
        _cache(shape, setting)  # raises for a shape that cannot be compressed
    reader = memory_reader()
    for shape in shapes:
        with torch.inference_mode():
            yield _time_shape(shape, settings, reader, rounds, seconds, progress)


def _settings(bits: str, level: str | None, centering: str) -> Settings:
    options = parse_setting(bits)
    if not options.keys() <= {"preset", "bits_k", "bits_v"}:
        raise ValueError(f"bits {bits!r}: expected no more than bits, as k4v2, or a preset")
    if centering not in CENTERINGS:
        raise ValueError(f"centering={centering!r}: expected one of {', '.join(CENTERINGS)}")
    preset = options.pop("preset", None)
    return Settings.named(
        preset,
        **options,
        codec="scalar",  # random keys have no model that bases could be learnt from
        sink_tokens=0,
        residual_window=0,
        centering=centering,
        level=level or _core.default_level(),
    )


def _time_shape(
    shape: Shape,
    settings: list[Settings],
    reader: Callable[[], Any],
    rounds: int,
    seconds: float,
    progress: Callable[[int, int, str], None] | None,
) -> KernelTimes:
    layers = [ways(shape, settings) for _ in range(shape.layers)]
    found = layers[0]
    calls: dict[str, Callable[[], Any]] = {
        same[0].key: _one_after_another([way.call for way in same])
        for same in zip(*layers, strict=True)
    }
    calls[_READER] = reader
    times = in_turns(calls, rounds=rounds, seconds=seconds, progress=progress)
    median = {way.key: statistics.median(times[way.key]) / shape.layers for way in found}
    best = min((way.key for way in found if way.bits is None), key=median.__getitem__)
    bandwidth = BUFFER_BYTES / statistics.median(times[_READER])
    rows = []
    for way in found:
        rate = way.bytes_read / median[way.key]
        rows.append(
            KernelTime(
                name=way.name,
                dtype=way.dtype,
                bits=way.bits,
                level=way.level,
                centering=way.centering,
                threads=torch.get_num_threads(),
                shape=shape,
                microseconds=median[way.key] * 1e6,
                nanoseconds_per_token_head=median[way.key] * 1e9 / (shape.tokens * shape.kv_heads),
                bytes_read=way.bytes_read,
                gigabytes_per_second=rate / 1e9,
                bandwidth_share=rate / bandwidth,
                times_best_torch=ratio(times[best], times[way.key]),
                is_best_torch=way.key == best,
                rounds=len(times[way.key]),
            )
        )
    return KernelTimes(bandwidth, rows)


def _one_after_another(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    def call() -> None:
        for each in calls:
            each()

    return call


def ways(shape: Shape, settings: Iterable[Settings]) -> list[_Way]:
    """All ways to attend on one layer of a shape, over the same random queries, keys and values."""
    settings = list(settings)
    generator = torch.Generator().manual_seed(0)
    new = shape.queries if shape.queries > 1 else 0

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, shape.dim, generator=generator)

    def repeated(tokens: int) -> torch.Tensor:
        block = random(shape.kv_heads, min(_BLOCK, tokens))
        copies = -(-tokens // block.shape[2])
        return block.repeat(1, 1, copies, 1)[:, :, :tokens].contiguous()

    query = random(shape.kv_heads * shape.group, shape.queries)
    keys, values = repeated(shape.tokens + new), repeated(shape.tokens + new)
    if any(setting.centering == "rope" for setting in settings):
        keys += _turned_bias(shape.dim, keys.shape[2])
    return [
        *(_packed(shape, setting, query, keys, values) for setting in settings),
        *(way for dtype in _TORCH_DTYPES for way in _torch(shape, dtype, query, keys, values)),
    ]


def _cache(shape: Shape, settings: Settings) -> _core.KvCache:
    rope = None
    if settings.centering == "rope":
        rope = (_frequencies(shape.dim).tolist(), "half_split", shape.dim // 2 * 2)
    return _core.KvCache(
        batch=1,
        kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        rope=rope,
        **settings.core_options(),
    )


def _packed(
    shape: Shape, settings: Settings, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> _Way:
    cache = _cache(shape, settings)
    # Variables, as references do not keep their tensors alive.
    past = [states[:, :, : shape.tokens] for states in (keys, values)]
    cache.append(ref(past[0]), ref(past[1]))
    cache.seal()
    new = [states[:, :, shape.tokens :] for states in (keys, values)]
    if new[0].shape[2]:
        cache.append(ref(new[0]), ref(new[1]))
    size = 1, shape.queries, query.shape[1], shape.dim

    def attend() -> torch.Tensor:
        output = torch.empty(size)
        cache.attend(ref(query), ref(output))
        return output

    exact = keys.shape[2] - cache.packed_tokens(0)
    return _Way(
        attend,
        cache.memory()["packed_bytes"] + sum(each[:, :, :exact].nbytes for each in (keys, values)),
        "tqai",
        "float32",
        f"k{settings.bits_k}v{settings.bits_v}",
        cache.level,
        settings.centering,
    )


def _torch(
    shape: Shape, dtype: torch.dtype, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> Iterator[_Way]:
    """Torch's attention: as transformers calls it, and with the query heads of a kv head as rows of
    one product, so that keys and values are read once."""
    query, keys, values = (tensor.to(dtype) for tensor in (query, keys, values))
    n, heads = shape.queries, shape.kv_heads
    mask = rows_mask = None
    if n > 1:
        mask = torch.ones(n, shape.tokens + n, dtype=torch.bool).tril(shape.tokens)
        rows_mask = mask.repeat(shape.group, 1)
    scale = shape.dim**-0.5

    def rows() -> torch.Tensor:
        return query.view(1, heads, shape.group * n, shape.dim)

    def unrolled(output: torch.Tensor) -> torch.Tensor:
        return output.view(1, heads * shape.group, n, shape.dim).transpose(1, 2)

    def sdpa() -> torch.Tensor:
        result = scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
        return result.transpose(1, 2)

    def sdpa_rows() -> torch.Tensor:
        return unrolled(scaled_dot_product_attention(rows(), keys, values, rows_mask))

    def matmul_rows() -> torch.Tensor:
        scores = torch.matmul(rows(), keys.transpose(2, 3)) * scale
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(dtype)
        return unrolled(torch.matmul(weights, values))

    found = {SDPA: sdpa, SDPA_ROWS: sdpa_rows}
    if n == 1:  # with more queries the scores alone would take gigabytes
        found[MATMUL_ROWS] = matmul_rows
    for name, call in found.items():
        yield _Way(call, keys.nbytes + values.nbytes, name, str(dtype).removeprefix("torch."))


def _frequencies(dim: int) -> torch.Tensor:
    return 10000.0 ** (-torch.arange(dim // 2) * 2.0 / dim)


def _turned_bias(dim: int, tokens: int) -> torch.Tensor:
    """[tokens, dim]: a bias on every other frequency, turned to each position, halves split."""
    frequencies = _frequencies(dim).double()
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    # Of the keys' own size: larger ones would leave most weights at zero, which may be skipped.
    bias = torch.cat([angles.cos(), angles.sin()], -1)
    bias[:, 1 : dim // 2 : 2] = 0
    bias[:, dim // 2 + 1 :: 2] = 0
    return torch.nn.functional.pad(bias, (0, dim % 2)).float()
