"""Which centres the tiles of a row refer to, as src/cache/centre_sets.cpp chooses them."""

from __future__ import annotations

import numpy as np

from tqai.stores.device.centres import (
    Moments,
    RowCentres,
    choose_centres,
    least_left,
    left_by,
)
from tqai.stores.device.codec import Options

# The same as in src/cache/centre_sets.cpp, where each is explained.
MOST_SETS = 32
_BADLY_SERVED = 3.0
_GROWN = 1.5
_WORTH_A_SET = 2.0
_BETTER = 1.25
_NOTHING = 1e-4


def choose_centre_sets(
    options: Options, held: list[RowCentres], moments: Moments, row_tiles: int
) -> tuple[list[RowCentres], list[int]]:
    """A row's sets, the `held` ones first, and for each of these tiles which it refers to.

    row_tiles: how many tiles the row has had, these ones included.
    """
    sets = list(held) or [choose_centres(options, moments)]
    if options.centering == "none":
        return sets[:1], [0] * moments.tiles
    of_tile = _assigned(sets, moments)
    done: set[int] = set()
    most = min(MOST_SETS, 1 + max(row_tiles, 1).bit_length())
    while len(sets) < most:
        worst = _worst_tile(options, sets, of_tile, moments, done)
        if worst is None:
            break
        done.add(worst)
        new = _set_for(options, sets, of_tile, moments, worst)
        if new is not None:
            sets.append(new)
            of_tile = _assigned(sets, moments)
    if not held:
        used = list(dict.fromkeys(of_tile))
        sets = [sets[index] for index in used]
        of_tile = [used.index(index) for index in of_tile]
    return sets, of_tile


def _set_for(
    options: Options, sets: list[RowCentres], of_tile: list[int], moments: Moments, worst: int
) -> RowCentres | None:
    """A set for tile `worst` and those like it; None where it brings too little."""
    seed = _cost(choose_centres(options, moments.some([worst])), moments)
    costs = np.stack([_cost(each, moments) for each in sets])
    members = [
        tile
        for tile in range(moments.tiles)
        if tile == worst or seed[tile] < costs[of_tile[tile], tile]
    ]
    some = moments.some(members)
    new = choose_centres(options, some)
    nothing = _NOTHING * some.energy
    lefts = [left_by(each, some) for each in sets]
    before = np.stack([lefts[of_tile[tile]][:, i] for i, tile in enumerate(members)], 1) + nothing
    after = left_by(new, some) + nothing
    before, after = before.sum(1), after.sum(1)
    if not (before >= _WORTH_A_SET * after).any():
        return None
    old = sets[of_tile[worst]]
    better = before >= _BETTER * after
    return RowCentres(
        np.where(better[:, None], new.constant, old.constant),
        np.where(better[:, None, None], new.means, old.means),
        np.where(better, new.left, old.left),
        tuple(new.kinds[h] if yes else old.kinds[h] for h, yes in enumerate(better)),
    )


def _assigned(sets: list[RowCentres], moments: Moments) -> list[int]:
    if len(sets) == 1:
        return [0] * moments.tiles
    return np.stack([_cost(each, moments) for each in sets]).argmin(0).tolist()


def _cost(centres: RowCentres, moments: Moments) -> np.ndarray:
    """[tiles]. Heads count by the factor, not the energy, as each has its own softmax."""
    left = left_by(centres, moments) + _NOTHING * moments.energy
    return np.log(left + np.finfo(np.float64).tiny).sum(0)


def _worst_tile(
    options: Options,
    sets: list[RowCentres],
    of_tile: list[int],
    moments: Moments,
    done: set[int],
) -> int | None:
    """The tile that is served worst, of those that are served badly."""
    nothing = _NOTHING * moments.energy
    lefts, was = _served(sets, of_tile, moments)
    least = least_left(options, moments) + nothing
    times = (lefts + nothing) / np.maximum(least, np.finfo(np.float64).tiny)
    times[lefts <= _GROWN * was + nothing] = 0.0
    worst = times.max(0)
    worst[list(done)] = 0.0
    tile = int(worst.argmax())
    return tile if worst[tile] > _BADLY_SERVED else None


def _served(
    sets: list[RowCentres], of_tile: list[int], moments: Moments
) -> tuple[np.ndarray, np.ndarray]:
    """[kv_heads, tiles] each: what a tile's set leaves of it, and left of its own first keys."""
    lefts = np.stack([left_by(centres, moments) for centres in sets])
    tiles = np.arange(moments.tiles)
    was = np.stack([sets[index].left for index in of_tile], 1).astype(np.float64)
    return lefts[of_tile, :, tiles].T, was
