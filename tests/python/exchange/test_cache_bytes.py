from __future__ import annotations

import numpy as np
import pytest
from tqai import _core
from tqai.exchange.cache_bytes import set_size, taken_apart

ROPE = ([10000 ** (-2 * i / 32) for i in range(16)], "half_split", 32)


def learnt() -> _core.KeyBasis:
    moments = _core.KeyMoments(2, 32)
    drawn = np.random.default_rng(0).standard_normal((64, 32), np.float32)
    for head in range(2):
        moments.add_keys(head, drawn)
        moments.add_queries(head, drawn)
    return _core.KeyBasis.learn(moments, 4)


KINDS = {
    "plain": {},
    "rope": {"rope": ROPE},
    "partial rope": {"rope": (ROPE[0][:8], "interleaved", 16)},
    "sections": {"rope": (*ROPE, [i % 3 for i in range(16)])},
    "other values": {"value_head_dim": 48},
    "trellis": {"value_codes": "trellis"},
    "key trellis": {"key_basis": learnt(), "key_codes": "trellis", "value_codes": "trellis"},
    "no exact tokens": {"sink_tokens": 0, "residual_window": 0},
    "half": {"dtype": _core.DType.float16},
}


def filled(tokens: int = 200, batch: int = 2, **options: object) -> _core.KvCache:
    cache = _core.KvCache(
        **{"batch": batch, "kv_heads": 2, "head_dim": 32, "residual_window": 32, **options}
    )
    chance = np.random.default_rng(tokens)
    kind = np.float16 if cache.dtype == _core.DType.float16 else np.float32
    keys, values = (
        chance.standard_normal((batch, 2, tokens, dim), np.float32).astype(kind)
        for dim in (32, cache.value_head_dim)
    )
    cache.append(_core.borrowed(keys), _core.borrowed(values))
    cache.seal()
    return cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 30, 200])
def test_what_is_taken_apart_goes_together_again(kind: str, tokens: int) -> None:
    data = filled(tokens, **KINDS[kind]).serialize()
    parts = taken_apart(data)
    assert parts.joined() == data
    assert parts.tokens == tokens
    assert [row.first for row in parts.rows] == [0, 0]
    assert all(row.plain and not row.has_gaps for row in parts.rows)


def test_rows_that_share_tiles_go_together_again() -> None:
    cache = filled()
    cache.select([0, 0, 1])
    data = cache.serialize()
    parts = taken_apart(data)
    assert parts.joined() == data
    assert parts.rows[0] == parts.rows[1] != parts.rows[2]


def test_sizes_of_centre_sets_are_those_in_the_bytes() -> None:
    parts = taken_apart(filled(rope=ROPE).serialize())
    assert {len(each) for each in parts.sets} == {set_size(2, 32, 16)}


def test_a_row_with_padding_and_one_with_gaps_say_so() -> None:
    cache = filled(20)
    cache.set_padding([3, 0])
    cache.leave_out([0] * 35 + [1] + [0] * 4)
    rows = taken_apart(cache.serialize()).rows
    assert [row.first for row in rows] == [3, 0]
    assert [row.has_gaps for row in rows] == [False, True]


def test_tokens_that_stand_anywhere_say_so() -> None:
    cache = _core.KvCache(batch=1, kv_heads=1, head_dim=32, rope=ROPE, residual_window=0)
    keys = np.ones((1, 1, 70, 32), np.float32)
    places = np.arange(0, 140, 2, dtype=np.int64).reshape(1, 1, 70)
    stands = places.ctypes.data, places.shape, (70, 70, 1)
    cache.append(_core.borrowed(keys), _core.borrowed(keys), stands)
    cache.seal()
    parts = taken_apart(cache.serialize())
    assert not parts.blocks[0].plain and not parts.rows[0].plain


def test_tiles_put_together_anew_are_the_same_tokens() -> None:
    cache = filled(300, batch=1)
    parts = taken_apart(cache.serialize())
    [row] = parts.rows
    some = row._replace(tail=None, tiles=row.tiles[:2], next_position=4 + 128, positions=(0, 0))
    shorter = parts._replace(
        tokens=4 + 128, exact=parts.exact[:1], blocks=parts.blocks[:2], rows=[some]
    )
    got = _core.KvCache.deserialize(shorter.joined())
    cache.crop(4 + 128)
    assert got.serialize() == cache.serialize()
