from __future__ import annotations

import random
import struct
import threading
from typing import Any

import pytest
import torch
from damages import CORRUPTIONS, damage
from tqai.exchange.chunk import ChunkCodec
from tqai.exchange.chunk_options import ChunkOptions
from tqai.exchange.envelope import NotUsable

DIM, HEADS, LAYERS = 32, 2, 5
ROPE = {"inv_freq": [10000 ** (-2 * i / DIM) for i in range(DIM // 2)]}
SQUARES = {1: 0.363, 2: 0.118, 3: 0.0346, 4: 0.0096, 8: 0.0001}
"""Squared error that bits leave of a vector, with what 32 coordinates and the int8 grid add."""


def make_chunk(
    tokens: int = 192, planes: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Keys with a mean that is turned as RoPE does, and values of many lengths."""
    chance = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, LAYERS, tokens, HEADS, DIM, generator=chance)
    mean = 4 * torch.randn(LAYERS, 1, HEADS, DIM // 2, 2, generator=chance)
    angles = torch.arange(700, 700 + tokens)[:, None, None] * torch.tensor(ROPE["inv_freq"])
    turned = torch.view_as_complex(mean) * torch.polar(torch.ones_like(angles), angles)
    keys = keys + torch.cat([turned.real, turned.imag], -1)
    values = values * torch.rand(LAYERS, tokens, HEADS, 1, generator=chance).exp2()
    if planes == 2:
        return torch.stack([keys, values]).reshape(2, LAYERS, tokens, -1).to(dtype)
    return torch.stack([keys, values], -2).reshape(1, LAYERS, tokens, -1).to(dtype)


def sides(chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, [layers, tokens, heads, dim]."""
    planes, layers, tokens, _ = chunk.shape
    if planes == 2:
        return tuple(chunk.view(2, layers, tokens, HEADS, DIM).float())
    both = chunk.view(layers, tokens, HEADS, 2, DIM).float()
    return both[..., 0, :], both[..., 1, :]


def encoded(codec: ChunkCodec, chunk: torch.Tensor, of: str = "") -> bytearray:
    data = bytearray(codec.size(chunk.shape, chunk.dtype))
    assert codec.encode(chunk, memoryview(data), of) == len(data)
    return data


def round_trip(chunk: torch.Tensor, **options: Any) -> torch.Tensor:
    codec = ChunkCodec(ChunkOptions(head_dim=DIM, **options))
    found = torch.full_like(chunk, torch.nan)
    codec.decode(memoryview(encoded(codec, chunk)), found)
    return found


def errors(found: torch.Tensor, chunk: torch.Tensor) -> list[float]:
    """Squared errors of keys and of values, of what each is."""
    pairs = zip(sides(found), sides(chunk), strict=True)
    return [((a - b).square().sum() / b.square().sum()).item() for a, b in pairs]


@pytest.mark.parametrize("planes", [2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [(4, 2), (8, 8), (2, 4), (3, 1)])
def test_errors_are_the_quantiser_s(planes: int, dtype: torch.dtype, bits: tuple[int, int]) -> None:
    chunk = make_chunk(256, planes, dtype)
    found = round_trip(chunk, bits_k=bits[0], bits_v=bits[1], rope=ROPE)
    keys, values = errors(found, chunk)
    rounding = 3e-6 if dtype == torch.bfloat16 else 1e-6
    # Keys less their centre have about a 17th of their energy.
    assert keys < 0.1 * SQUARES[bits[0]] + rounding
    assert values < 1.1 * SQUARES[bits[1]] + rounding


def test_both_layouts_have_the_same_tiles() -> None:
    apart, fused = (round_trip(make_chunk(planes=planes), rope=ROPE) for planes in (2, 1))
    for a, b in zip(sides(apart), sides(fused), strict=True):
        assert torch.equal(a, b)


def test_keys_are_centred_before_rotary_embedding_where_that_is_known() -> None:
    chunk = make_chunk(256)
    with_rope, with_mean = (errors(round_trip(chunk, rope=r), chunk)[0] for r in (ROPE, None))
    assert with_rope < 0.3 * with_mean


@pytest.mark.parametrize(("bits", "more"), [(4, 1.003), (3, 1.003), (2, 1.02), (1, 1.02)])
def test_short_norms_cost_next_to_nothing(bits: int, more: float) -> None:
    chunk, options = make_chunk(256), {"bits_k": bits, "bits_v": bits, "rope": ROPE}
    short, long = (errors(round_trip(chunk, norm_bits=n, **options), chunk) for n in (8, 16))
    assert all(a < more * b for a, b in zip(short, long, strict=True))
    codec = ChunkCodec(ChunkOptions(head_dim=DIM, **options))
    bytes_of_norms = 2 * LAYERS * HEADS * 256 * (1 if bits > 2 else 0.5)
    whole = ChunkCodec(ChunkOptions(head_dim=DIM, norm_bits=16, **options))
    saved = whole.size(chunk.shape, chunk.dtype) - codec.size(chunk.shape, chunk.dtype)
    bounds = 8 * LAYERS * HEADS
    assert abs(saved - (2 * LAYERS * HEADS * 256 * 2 - bytes_of_norms - bounds)) <= 64


@pytest.mark.parametrize("tokens", [1, 63, 64, 100, 256, 300])
def test_chunks_of_any_length(tokens: int) -> None:
    chunk = make_chunk(tokens)
    found = round_trip(chunk, bits_k=8, bits_v=8)
    assert max(errors(found, chunk)) < 1e-3
    rest = tokens // 64 * 64
    assert torch.equal(found[:, :, rest:], chunk[:, :, rest:])


def test_layers_have_bits_of_their_own() -> None:
    chunk = make_chunk(128)
    found = round_trip(chunk, bits_k=[8, 2, 8, 2, 8], bits_v={"1": 8, "-1": 8}, rope=ROPE)
    for side, fine in zip((0, 1), ({0, 2, 4}, {1, 4}), strict=True):
        for layer in range(LAYERS):
            a, b = sides(found)[side][layer], sides(chunk)[side][layer]
            error = ((a - b).square().sum() / b.square().sum()).item()
            assert (error < 1e-3) == (layer in fine), (side, layer)
    whole = round_trip(chunk, bits_k=8, rope=ROPE)
    assert torch.equal(sides(found)[0][::2], sides(whole)[0][::2])


@pytest.mark.parametrize("bits", [2, 4])
def test_trellis_codes_have_less_error_in_the_same_bytes(bits: int) -> None:
    chunk = make_chunk(256)
    plain, coded = (
        errors(round_trip(chunk, bits_v=bits, rope=ROPE, codec=codec), chunk)
        for codec in ("scalar", "trellis")
    )
    assert coded[0] == plain[0] and coded[1] < 0.8 * plain[1]
    sizes = {
        ChunkCodec(ChunkOptions(head_dim=DIM, bits_v=bits, codec=c)).size(chunk.shape, chunk.dtype)
        for c in ("scalar", "trellis")
    }
    assert max(sizes) - min(sizes) <= 64  # the header's


def test_exact_tokens_are_exact_and_out_of_the_centres() -> None:
    chunk = make_chunk(128)
    chunk[0, :, :3] *= 30
    found = round_trip(chunk, exact_first=3, exact_last=5, rope=ROPE)
    assert torch.equal(found[:, :, :3], chunk[:, :, :3])
    assert torch.equal(found[:, :, -5:], chunk[:, :, -5:])
    middle = slice(3, -5)
    assert errors(found[:, :, middle], chunk[:, :, middle])[0] < 0.1 * SQUARES[4]
    assert torch.equal(round_trip(chunk, exact_first=200), chunk)


def test_zeros_and_one_vector_among_zeros() -> None:
    chunk = torch.zeros(2, LAYERS, 128, HEADS * DIM)
    assert torch.equal(round_trip(chunk, rope=ROPE), chunk)
    chunk[:, 1, 70] = 1e-3
    found = round_trip(chunk, bits_k=8, bits_v=8)
    assert torch.equal(found[1, :, :70], chunk[1, :, :70])
    assert torch.allclose(found[1, 1, 70], chunk[1, 1, 70], rtol=0.05)


def test_rows_with_several_centres_and_more_of_them_than_there_is_room_for() -> None:
    one = make_chunk(256)
    one[0, 2, 128:] *= -5  # its keys have another mean from there on
    found = round_trip(one, bits_k=8, bits_v=8)
    assert errors(found, one)[0] < 2 * SQUARES[8]
    every = make_chunk(256)
    every[0, :, 128:] *= -5
    found = round_trip(every, bits_k=8, bits_v=8)
    assert errors(found, every)[0] < 5 * SQUARES[8]
    fine = round_trip(make_chunk(256), bits_k=8, bits_v=8)
    assert torch.equal(found[1], fine[1])  # values are as ever


@pytest.mark.parametrize("turned", [0, 1, LAYERS])
def test_bytes_are_the_same_however_many_rows_are_encoded_at_once(
    turned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = make_chunk(256)
    chunk[0, LAYERS - turned :, 128:] *= -5  # several sets each, more than there is room for
    codec = ChunkCodec(ChunkOptions(head_dim=DIM, bits_k=[4, 4, 2, 4, 4], rope=ROPE))
    whole = encoded(codec, chunk)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for staged in (1, 2 * chunk[0, 0].nbytes):
        monkeypatch.setattr("tqai.exchange.chunk._STAGED_BYTES", staged)
        assert encoded(codec, chunk) == whole


def test_the_bytes_are_a_fifth_of_bfloat16() -> None:
    codec = ChunkCodec(ChunkOptions(head_dim=64, rope={"inv_freq": [1.0] * 32}))
    shape = 2, 30, 256, 3 * 64
    whole = 2 * 30 * 256 * 3 * 64 * 2
    assert codec.size(shape, torch.bfloat16) <= whole / 5
    assert codec.size(shape, torch.bfloat16) <= whole / 2 / 2.4


@pytest.fixture(scope="module")
def kept() -> tuple[ChunkCodec, torch.Tensor, bytes]:
    codec = ChunkCodec(ChunkOptions(head_dim=DIM, model="one", rope=ROPE, exact_first=1))
    chunk = make_chunk(128)
    return codec, chunk, bytes(encoded(codec, chunk, "this chunk"))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"bits_k": 3},
        {"bits_v": 3},
        {"bits_v": [2, 2, 2, 2, 3]},
        {"seed": 3},
        {"codec": "trellis"},
        {"rope": None},
        {"rope": {"inv_freq": ROPE["inv_freq"][::-1]}},
        {"rope": {**ROPE, "layout": "interleaved"}},
        {"norm_bits": 16},
        {"exact_first": 2},
        {"exact_last": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_model_or_setting_is_a_miss(
    kept: tuple[ChunkCodec, torch.Tensor, bytes], change: dict[str, Any]
) -> None:
    _, chunk, data = kept
    options = {"head_dim": DIM, "model": "one", "rope": ROPE, "exact_first": 1, **change}
    with pytest.raises(NotUsable):
        ChunkCodec(ChunkOptions(**options)).decode(memoryview(data), chunk.clone(), "this chunk")


def test_another_chunk_shape_and_version_are_misses(
    kept: tuple[ChunkCodec, torch.Tensor, bytes],
) -> None:
    codec, chunk, data = kept
    with pytest.raises(NotUsable, match="another of"):
        codec.decode(memoryview(data), chunk.clone(), "another chunk")
    for other in (make_chunk(64), make_chunk(128, 1), chunk.half(), chunk[:, :4].clone()):
        with pytest.raises(NotUsable):
            codec.decode(memoryview(data), other, "this chunk")
    later = bytearray(data)
    later[8:12] = struct.pack("<I", 9)
    with pytest.raises(NotUsable, match="version 9"):
        codec.decode(memoryview(later), chunk.clone(), "this chunk")


def test_a_damaged_chunk_is_a_miss_whatever_the_damage(
    kept: tuple[ChunkCodec, torch.Tensor, bytes],
) -> None:
    codec, chunk, data = kept
    chance, into = random.Random(2), chunk.clone()
    for _ in range(CORRUPTIONS):
        damaged = damage(data, chance)
        if damaged[: len(data)] != data:
            with pytest.raises(NotUsable):
                codec.decode(memoryview(damaged), into, "this chunk")
    codec.decode(memoryview(data + b"more"), into, "this chunk")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1e6])
def test_what_cannot_be_compressed_is_refused(wrong: float) -> None:
    chunk = make_chunk(128)
    chunk[1, 0, 5, 7] = wrong
    with pytest.raises(ValueError):
        round_trip(chunk)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 4}, "head_dim=4"),
        ({"bits_k": 9}, "bits_k=9"),
        ({"norm_bits": 12}, "norm_bits=12"),
        ({"codec": "adaptive"}, "codec='adaptive'"),
        ({"exact_first": -1}, "exact_first=-1"),
        ({"model": 3}, "model=3"),
        ({"rope": {"inv_freq": [1.0] * 17}}, "head_dim=32"),
        ({"rope": {"inv_freq": [1.0], "layout": "whole"}}, "layout='whole'"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChunkOptions(**{"head_dim": DIM, **options})


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 5, 64, 65), torch.float32),
        ((3, 5, 64, 64), torch.float32),
        ((5, 64, 64), torch.float32),
        ((1, 5, 64, 32), torch.float32),
        ((2, 5, 0, 64), torch.float32),
        ((2, 5, 64, 64), torch.float64),
    ],
)
def test_shapes_and_dtypes_that_are_no_chunk_s(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="a chunk of"):
        ChunkCodec(ChunkOptions(head_dim=DIM)).size(shape, dtype)


def test_threads_share_a_codec() -> None:
    codec = ChunkCodec(ChunkOptions(head_dim=DIM, rope=ROPE))
    expected = {seed: bytes(encoded(codec, make_chunk(seed=seed))) for seed in range(4)}
    found: dict[int, bool] = {}

    def work(seed: int) -> None:
        chunk = make_chunk(seed=seed)
        same = [bytes(encoded(codec, chunk)) == expected[seed] for _ in range(5)]
        codec.decode(memoryview(expected[seed]), chunk)
        found[seed] = all(same)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(expected, True)
