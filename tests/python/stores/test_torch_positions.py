"""Tokens that stand elsewhere than at 0, 1, 2 …: both stores beside each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tqai import _core
from tqai.settings import Settings
from tqai.shapes.rope import Rope
from tqai.stores import for_torch as stores
from tqai.stores.device.positions import MAX_POSITION, Positions
from tqai.stores.for_torch import Store
from tqai.stores.for_torch.torch_store import TorchStore

CPU = torch.device("cpu")
BOTH_F32 = torch.float32, torch.float32
DIM, HEADS, BATCH = 64, 2, 3
FREQUENCIES = tuple(10000.0 ** (-f / 32) for f in range(32))
SECTIONS = {"one": (), "blocks": (0,) * 8 + (1,) * 12 + (2,) * 12, "in turn": (0, 1, 2, 0) * 8}


def stand(tokens: int, sections: int) -> torch.Tensor:
    """[BATCH, sections, tokens]: text, an image, text, text that stands further back; the last row
    stands elsewhere."""
    positions = torch.arange(tokens).expand(sections, tokens).clone()
    image = torch.arange(100)
    for section in range(sections):
        positions[section, 90:190] = 90 + (0 * image, image // 10, image % 10)[section]
    positions[:, 190:400] = 100 + torch.arange(210)
    positions[:, 400:] = 20 + torch.arange(tokens - 400)
    return torch.stack([positions, positions, positions + 3 * torch.arange(tokens)])


def tokens_at(rope: Rope, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a strong bias that is turned to their positions, and values."""
    bias = 8.0 * torch.randn(DIM)
    keys = torch.randn(BATCH, HEADS, positions.shape[2], DIM) + bias
    for row in range(BATCH):
        for token, position in enumerate(positions[row].T.tolist()):
            keys[row, :, token] = rope.turn(keys[row, :, token], position).float()
    return keys, torch.randn(BATCH, HEADS, positions.shape[2], DIM)


def both(rope: Rope, **settings: object) -> tuple[_core.KvCache, TorchStore]:
    like = torch.empty(BATCH, HEADS, 0, DIM)
    made = [
        stores.make_store(
            Settings(residual_window=16, backend=backend, **settings),
            rope,
            like,
            like,
            BOTH_F32[0],
            True,
        )
        for backend in ("auto", "torch-ops")
    ]
    return made[0], made[1]


def assert_same(native: _core.KvCache, other: TorchStore) -> None:
    for row in range(native.batch):
        assert native.packed_tokens(row) == other.packed_tokens(row)
        assert native.centre_sets(row) == other.centre_sets(row)
    for ours, theirs in zip(
        *(stores.gather(store, 0, native.tokens, BOTH_F32) for store in (native, other)),
        strict=True,
    ):
        # Codes within rounding of a boundary may differ.
        assert ((ours - theirs).abs() > 2e-3).float().mean() < 2e-3
    queries = torch.randn(native.batch, 2 * HEADS, 3, DIM) / 4
    ours, theirs = (stores.attend(store, queries) for store in (native, other))
    assert (ours - theirs).norm() < 2e-2 * theirs.norm()
    # Each reads the other's bytes, and what it writes then is the same to the other.
    back = _core.KvCache.deserialize(
        TorchStore.deserialize(native.serialize(), CPU).serialize(), level=native.level
    )
    assert torch.equal(stores.attend(back, queries), ours)
    data = other.serialize()
    assert _core.KvCache.deserialize(data).serialize() == data


@pytest.mark.parametrize("sections", SECTIONS)
def test_gaps_in_two_turns_and_positions_behind_them(sections: str) -> None:
    rope = Rope(FREQUENCIES, "half_split", SECTIONS[sections])
    torch.manual_seed(2)
    positions = stand(420, rope.section_count)
    positions[:, :, :60] = torch.arange(60)  # consecutive, as what comes without positions is
    keys, values = tokens_at(rope, positions)
    made = both(rope)
    for store in made:
        stores.append(store, keys[:, :, :60], values[:, :, :60])
        for hidden in (range(40, 50), [2, *range(20, 30), 39, 55]):
            marks = torch.zeros(BATCH, 60, dtype=torch.bool)
            marks[:, list(hidden)] = True
            store.leave_out(marks.flatten().tolist())
        assert store.left_out(1) == [(2, 1), (20, 10), (39, 11), (55, 1)]
    assert_same(*made)
    for store in made:
        stores.append(store, keys[:, :, 60:], values[:, :, 60:], positions[:, :, 60:])
    assert_same(*made)
    for store in made:
        store.seal()
    assert_same(*made)


@pytest.mark.parametrize("sections", SECTIONS)
@pytest.mark.parametrize("layout", ["half_split", "interleaved"])
def test_torch_operations_are_the_same(sections: str, layout: str) -> None:
    torch.manual_seed(1)
    rope = Rope(FREQUENCIES, layout, SECTIONS[sections])
    positions = stand(600, rope.section_count)
    keys, values = tokens_at(rope, positions)
    pair = both(rope)

    def each(change: Callable[[Store], None]) -> None:
        for store in pair:
            change(store)

    def append(store: Store, first: int, end: int) -> None:
        part = slice(first, end)
        stores.append(store, keys[:, :, part], values[:, :, part], positions[:, :, part])

    each(lambda store: append(store, 0, 20))
    each(lambda store: store.set_padding([0, 5, 0]))
    for first in range(20, 600, 145):
        each(lambda store, first=first: append(store, first, first + 145))
    each(lambda store: store.seal())
    assert_same(*pair)
    gathered = stores.gather(pair[0], 20, 580, BOTH_F32)[0]
    assert (gathered - keys[:, :, 20:]).square().mean() < 0.012  # the noise's own error at 4 bits
    each(lambda store: store.crop(140))
    each(lambda store: append(store, 140, 300))
    each(lambda store: store.seal())
    assert_same(*pair)
    each(lambda store: store.select([2, 0, 0]))
    # From here on, each token one further than the last in its row.
    each(lambda store: stores.append(store, keys[:, :, :200], values[:, :, :200]))
    each(lambda store: store.seal())
    assert_same(*pair)
    each(lambda store: store.discard_before(250))
    assert pair[0].first_token == pair[1].first_token
    each(lambda store: store.crop(0))
    assert pair[0].serialize() == pair[1].serialize()


def test_rows_get_centres_of_their_own() -> None:
    torch.manual_seed(2)
    keys = torch.randn(BATCH, HEADS, 800, DIM) + 5 * torch.randn(DIM)
    keys[1, :, :200] = torch.randn(DIM)  # one token, over and over
    values = torch.randn(BATCH, HEADS, 800, DIM)
    pair = both(Rope(FREQUENCIES, "half_split"))
    for store in pair:
        for first in range(0, 800, 200):
            stores.append(store, *(part[:, :, first : first + 200] for part in (keys, values)))
            store.seal()
    assert [pair[0].centre_sets(row) for row in range(BATCH)] == [1, 2, 1]
    assert_same(*pair)
    gathered = stores.gather(pair[0], 200, 600, BOTH_F32)[0]
    assert (gathered - keys[:, :, 200:]).square().mean() < 0.012


@pytest.mark.parametrize("hostile", [2**63 - 1, -(2**63), MAX_POSITION + 1])
def test_positions_out_of_range_are_refused(hostile: int) -> None:
    like = torch.zeros(BATCH, HEADS, 4, DIM)
    positions = torch.arange(4).expand(1, 3, 4).clone()
    positions[0, 2, 1] = hostile
    for store in both(Rope(FREQUENCIES, "half_split", SECTIONS["blocks"])):
        before = store.serialize()
        with pytest.raises(ValueError, match=str(hostile)):
            stores.append(store, like, like, positions)
        with pytest.raises(ValueError, match=r"\[1, 2, 4\]"):
            stores.append(store, like, like, torch.zeros(1, 2, 4, dtype=torch.long))
        assert store.serialize() == before


def test_far_positions_take_no_more_memory() -> None:
    torch.manual_seed(3)
    rope = Rope(FREQUENCIES, "half_split", SECTIONS["blocks"])
    keys, values = (torch.randn(BATCH, HEADS, 200, DIM) for _ in range(2))
    sizes = []
    for scale in (7, MAX_POSITION // 200):
        pair = both(rope, centering="rope")
        positions = (scale * torch.arange(200)).expand(1, 3, 200)
        for store in pair:
            stores.append(store, keys, values, positions)
            store.seal()
        assert_same(*pair)
        sizes.append([store.memory()["total_bytes"] for store in pair])
    assert sizes[0] == sizes[1]


def test_old_bytes_are_read() -> None:
    """Written when each token's position was its index, and a row had one set of centres."""
    old = np.load(Path(__file__).with_name("cache_version_1.npz"))
    data = old["data"].tobytes()
    queries, expected = (torch.from_numpy(old[name]) for name in ("queries", "output"))
    native = _core.KvCache.deserialize(data)
    assert [native.packed_tokens(row) for row in range(3)] == [117, 122, 117]
    for store in (native, TorchStore.deserialize(data, CPU)):
        assert (stores.attend(store, queries) - expected).norm() < 1e-2 * expected.norm()
        keys, _ = stores.gather(store, 0, store.tokens, BOTH_F32)
        assert torch.allclose(keys, torch.from_numpy(old["keys"]).float(), rtol=1e-3, atol=1e-3)
    for size in range(0, len(data), 97):
        with pytest.raises(ValueError):
            _core.KvCache.deserialize(data[:size])


def test_positions_are_kept_short() -> None:
    assert Positions.of(np.arange(5, 9)[:, None].repeat(3, 1)).each is None
    jump = Positions(5, 3).joined(Positions(1, 4))
    assert jump.each is not None and jump.next == 5
    assert jump.part(3, 7).each is None  # consecutive again
    assert jump.part(0, 3).joined(Positions(8, 1)) == Positions(5, 4)
