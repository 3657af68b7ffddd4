from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from damages import CORRUPTIONS, damage
from tqai import _core
from tqai.exchange import envelope

FACTS = {"model": "a1b2", "heads": [[2, 64]], "bits": [[4, 2]], "seed": 7}


@pytest.fixture(scope="module")
def sealed() -> bytes:
    keys = np.random.default_rng(0).standard_normal((1, 2, 300, 64), np.float32)
    cache = _core.KvCache(batch=1, kv_heads=2, head_dim=64, bits_k=4, bits_v=2)
    cache.append(_core.borrowed(keys), _core.borrowed(keys))
    cache.seal()
    return bytes(envelope.sealed("cache", FACTS, [cache.serialize()]))


def test_an_envelope_gives_back_what_was_put_into_it(sealed: bytes) -> None:
    payload = envelope.opened(sealed, "cache", FACTS)
    assert len(sealed) == envelope.size("cache", FACTS, len(payload))
    assert (len(sealed) - len(payload)) % envelope.ALIGNED == 0
    assert _core.KvCache.deserialize(payload).tokens == 300


def test_parts_follow_one_another_and_bytes_after_the_end_are_let_be() -> None:
    parts = [b"one", np.arange(3, dtype="<u2").data, b""]
    whole = envelope.sealed("x", {}, parts)
    assert bytes(envelope.opened(bytes(whole) + b"more", "x", {})) == b"one\0\0\1\0\2\0"


def test_an_envelope_that_does_not_fit_is_not_begun() -> None:
    room = bytearray(60)
    with pytest.raises(ValueError, match="does not fit into 60"):
        envelope.seal_into(memoryview(room), "x", {}, [b"payload"])
    assert room == bytes(60)


@pytest.mark.parametrize(
    ("kind", "change", "what"),
    [
        ("other", {}, "another kind"),
        ("cache", {"model": "c3d4"}, "another model"),
        ("cache", {"heads": [[4, 64]]}, "another heads"),
        ("cache", {"bits": [[4, 4]]}, "another bits"),
        ("cache", {"seed": 8}, "another seed"),
        ("cache", {"more": 1}, "another more"),
    ],
)
def test_what_goes_with_something_else_is_not_used(
    sealed: bytes, kind: str, change: dict, what: str
) -> None:
    with pytest.raises(envelope.NotUsable, match=what):
        envelope.opened(sealed, kind, {**FACTS, **change})


def test_another_version_is_named(sealed: bytes) -> None:
    later = bytearray(sealed)
    later[8:12] = struct.pack("<I", 2)
    with pytest.raises(envelope.NotUsable, match="of version 2; this tqai reads 1"):
        envelope.opened(later, "cache", FACTS)


def test_an_envelope_cut_anywhere_is_not_used(sealed: bytes) -> None:
    lengths = [*range(300), *range(300, len(sealed), 97)]
    for length in lengths:
        with pytest.raises(envelope.NotUsable):
            envelope.opened(sealed[:length], "cache", FACTS)


def test_every_flipped_bit_of_the_start_and_the_header_is_seen(sealed: bytes) -> None:
    payload = envelope.opened(sealed, "cache", FACTS)
    for bit in range(8 * (len(sealed) - len(payload))):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(envelope.NotUsable):
            envelope.opened(damaged, "cache", FACTS)


def test_nothing_that_was_damaged_is_ever_used(sealed: bytes) -> None:
    chance = random.Random(1)
    changed = 0
    for _ in range(CORRUPTIONS):
        damaged = damage(sealed, chance)
        if damaged[: len(sealed)] == sealed:
            continue
        changed += 1
        with pytest.raises(envelope.NotUsable):
            envelope.opened(damaged, "cache", FACTS)
    assert changed > 0.9 * CORRUPTIONS


def test_codebooks_are_told_apart_by_dimension_and_bits_in_any_order() -> None:
    assert envelope.codebooks([(64, 4), (64, 2)]) == envelope.codebooks([(64, 2), (64, 4)])
    known = {envelope.codebooks(sides) for sides in ([(64, 4)], [(64, 2)], [(128, 4)], [])}
    assert len(known) == 4
