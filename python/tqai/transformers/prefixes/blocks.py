"""A cache as entries of a store: blocks of 64 tokens of all layers, and the centres of their keys.

A block has the name of its centres, which of each layer's centre sets is its own, and the layers'
tiles as files have them; the first block has the sinks too. Centres, with what the layers' bytes
begin with, are an entry of their own, which all blocks of a text share.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from tqai import _core
from tqai.exchange.cache_bytes import (
    MOST_SETS,
    TILE_TOKENS,
    Block,
    CacheBytes,
    Exact,
    Row,
    Tile,
    taken_apart,
)
from tqai.exchange.envelope import ALIGNED, NotUsable
from tqai.stores import for_torch as stores
from tqai.stores.for_torch.tensor_refs import DTYPES
from tqai.transformers.cache.cache import TqaiCache
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.files import checks
from tqai.transformers.model.devices import layer_device
from tqai.transformers.model.geometry import decoder_of

_DTYPES = {str(dtype): dtype for dtype in DTYPES}
_NAME_BYTES = 16


class LayerCentres(NamedTuple):
    """What all blocks of a layer have in common."""

    preamble: bytes
    dtypes: tuple[str, str]
    sets: tuple[bytes, ...]
    block_bytes: int
    sink_bytes: int


class Centres(NamedTuple):
    """Of each layer; None for those that hold nothing."""

    layers: tuple[LayerCentres | None, ...]

    def payload(self) -> bytes:
        listed: list[Any] = []
        parts: list[bytes] = []
        for layer in self.layers:
            if layer is None:
                listed.append(None)
                continue
            listed.append(
                {
                    "preamble": len(layer.preamble),
                    "dtypes": layer.dtypes,
                    "sets": [len(layer.sets), len(layer.sets[0])],
                    "block": layer.block_bytes,
                    "sinks": layer.sink_bytes,
                }
            )
            parts += [layer.preamble, *layer.sets]
        text = json.dumps(listed).encode()
        return b"".join([struct.pack("<I", len(text)), text, *parts])

    @classmethod
    def of(cls, payload: memoryview) -> Centres:
        """Raises NotUsable for what is none."""
        try:
            (length,) = struct.unpack_from("<I", payload)
            listed = json.loads(bytes(payload[4 : 4 + length]))
            at = 4 + length
            layers: list[LayerCentres | None] = []
            for known in listed:
                if known is None:
                    layers.append(None)
                    continue
                preamble = bytes(payload[at : at + known["preamble"]])
                at += known["preamble"]
                count, each = known["sets"]
                sets = tuple(
                    bytes(payload[at + i * each : at + (i + 1) * each]) for i in range(count)
                )
                at += count * each
                layers.append(
                    LayerCentres(
                        preamble,
                        tuple(known["dtypes"]),
                        tuple(sets),
                        known["block"],
                        known["sinks"],
                    )
                )
            if at != len(payload):
                raise NotUsable("they are no centres")
            return cls(tuple(layers))
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise NotUsable(f"they are no centres ({error})") from error


class StoredBlock(NamedTuple):
    """A block as it lies in a store."""

    centres: str
    """The name of its centres."""
    sets: bytes
    """Of each layer, which of the centre sets."""
    data: memoryview
    """The sinks of all layers, of a first block; then the tiles of all layers."""

    def parts(self) -> list[bytes | memoryview]:
        """What an entry has in it."""
        head = bytes.fromhex(self.centres) + self.sets
        return [head, bytes(-len(head) % ALIGNED), self.data]

    @classmethod
    def of(cls, payload: memoryview, layers: int) -> StoredBlock:
        """Raises NotUsable for what is none."""
        head = _NAME_BYTES + layers
        data = head + -head % ALIGNED
        if len(payload) < data:
            raise NotUsable("they are no block")
        name, sets = bytes(payload[:_NAME_BYTES]).hex(), bytes(payload[_NAME_BYTES:head])
        return cls(name, sets, payload[data:])


class LayerBlock(NamedTuple):
    """What one layer has of a block."""

    sinks: memoryview
    tiles: memoryview
    set: bytes


class LoadedBlock(NamedTuple):
    """A block with its centres."""

    name: str
    centres: Centres
    layers: tuple[LayerBlock | None, ...]

    @classmethod
    def of(cls, name: str, is_first: bool, block: StoredBlock, centres: Centres) -> LoadedBlock:
        """Raises NotUsable where the two do not go together."""
        at = sum(layer.sink_bytes for layer in centres.layers if layer) if is_first else 0
        sinks, layers = 0, []
        for layer, number in zip(centres.layers, block.sets, strict=True):
            if layer is None:
                layers.append(None)
                continue
            end = sinks + (layer.sink_bytes if is_first else 0)
            tiles = block.data[at : at + layer.block_bytes]
            at += layer.block_bytes
            if at > len(block.data) or number >= len(layer.sets):
                raise NotUsable("they are a block with other centres")
            layers.append(LayerBlock(block.data[sinks:end], tiles, layer.sets[number]))
            sinks = end
        if at != len(block.data):
            raise NotUsable("they are a block with other centres")
        return cls(name, centres, tuple(layers))


def stored_blocks(cache: TqaiCache, row: int, padding: int) -> tuple[Centres, list[StoredBlock]]:
    """What a store keeps of a row: its centres, and its blocks from the first on.

    Only those whose tokens stand where they would without the `padding` tokens before them. The
    name of the centres is left to be filled in.
    """
    layers = [_apart(layer) for layer in cache.layers]
    counts = [_usable(held, row, padding) for held in layers if held is not None]
    count = min(counts, default=0)
    if count == 0:
        return Centres(()), []
    centres = Centres(
        tuple(
            None if held is None else _centres(layer, held, row)
            for layer, held in zip(cache.layers, layers, strict=True)
        )
    )
    blocks = []
    for index in range(count):
        sets = bytearray(len(layers))
        sinks, tiles = [], []
        for place, held in enumerate(layers):
            if held is None:
                continue
            own = held.rows[row]
            if index == 0 and own.sinks is not None:
                sinks.append(held.exact[own.sinks].data)
            sets[place] = own.tiles[index].set
            tiles.append(held.blocks[own.tiles[index].block].tiles)
        blocks.append(StoredBlock("", bytes(sets), memoryview(b"".join([*sinks, *tiles]))))
    return centres, blocks


def fill(
    cache: TqaiCache,
    model: torch.nn.Module,
    rows: Sequence[Sequence[LoadedBlock]],
    padding: Sequence[int],
    tokens: int,
) -> None:
    """Makes an empty cache hold the first `tokens` tokens of its rows, padding included.

    rows: of each, blocks that have all of these tokens.

    Raises:
        NotUsable: for what is not of such layers; the cache is empty still.
    """
    decoder = decoder_of(model)
    made: list[tuple[TqaiLayer, _core.KvCache, tuple[torch.dtype, torch.dtype]]] = []
    for index, layer in enumerate(cache.layers):
        known = [block.centres.layers[index] for row in rows for block in row]
        held = [each for each in known if each is not None]
        if not held:
            continue  # it reads another layer's keys, or has no attention
        if not isinstance(layer, TqaiLayer) or len({each[:2] for each in known if each}) > 1:
            raise NotUsable(f"the bytes of layer {index} do not go together")
        if len(held) < len(known):
            raise NotUsable(f"layer {index} lacks tokens")
        try:
            data = _joined(index, held[0], rows, padding, tokens, cache.settings.sink_tokens)
            own = [] if layer.basis is None else [layer.basis]
            core = _core.KvCache.deserialize(data, level=layer.settings.level, key_bases=own)
            keys, values = (_DTYPES[name] for name in held[0].dtypes)
            checks.check_store(Path("the prefix store"), layer, data, core, (keys, values))
        except (ValueError, KeyError, NotImplementedError) as error:
            raise NotUsable(f"the bytes of layer {index} are not the model's: {error}") from error
        made.append((layer, core, (keys, values)))
    if not made:
        raise NotUsable("no layer holds anything")
    for layer, core, dtypes in made:
        layer.core = stores.moved(core, layer.settings, layer_device(decoder, layer.index))
        layer.dtypes = dtypes
        layer.padding = list(padding)
        layer.take_note()
    cache.weights = cache.geometry.weights()


def _apart(layer: Any) -> CacheBytes | None:
    """A layer's store; None: it holds nothing."""
    if not isinstance(layer, TqaiLayer) or layer.core is None:
        return None
    return taken_apart(layer.core.serialize())


def _usable(held: CacheBytes, row: int, padding: int) -> int:
    """How many blocks of a row are whole and where they would be in any cache."""
    own = held.rows[row]
    sinks = 0 if own.sinks is None else held.exact[own.sinks].tokens
    if own.has_gaps or not own.plain or own.first != padding or own.positions[0] != 0:
        return 0
    for index, tile in enumerate(own.tiles):
        block = held.blocks[tile.block]
        place = sinks + index * TILE_TOKENS
        stands = block.first == padding + place and block.position == place and block.plain
        if tile.tokens != TILE_TOKENS or not stands:
            return index
    return len(own.tiles)


def _centres(layer: Any, held: CacheBytes, row: int) -> LayerCentres:
    own = held.rows[row]
    keys, values = map(str, layer.dtypes)
    return LayerCentres(
        held.preamble,
        (keys, values),
        tuple(held.sets[each] for each in own.sets),
        len(held.blocks[own.tiles[0].block].tiles),
        0 if own.sinks is None else len(held.exact[own.sinks].data),
    )


def _joined(
    index: int,
    layer: LayerCentres,
    rows: Sequence[Sequence[LoadedBlock]],
    padding: Sequence[int],
    tokens: int,
    sinks: int,
) -> bytes:
    """The bytes of layer `index` of a cache with these rows; rows share what is the same."""
    exact = _Numbered[Exact]()
    blocks = _Numbered[Block]()
    sets = _Numbered[bytes]()
    made = []
    for row, first in zip(rows, padding, strict=True):
        left = tokens - first - sinks
        own_sets = _Numbered[int]()
        tiles = []
        for at, whole in enumerate(row[: -(-left // TILE_TOKENS)]):
            block = whole.layers[index]
            assert block is not None
            place = sinks + at * TILE_TOKENS
            held = Block(first + place, place, True, block.tiles)
            number = blocks.add((whole.name, first), held)
            set_number = sets.add(block.set, block.set)
            own = own_sets.add(set_number, set_number)
            tiles.append(Tile(number, min(left - at * TILE_TOKENS, TILE_TOKENS), own))
        if len(own_sets.objects) > MOST_SETS:
            raise NotUsable(f"layer {index} would have {len(own_sets.objects)} centre sets")
        first_block = row[0].layers[index]
        assert first_block is not None
        part = exact.add(row[0].name, Exact(sinks, first_block.sinks)) if sinks else None
        stands = tokens - first, True, (0, tokens - first)
        made.append(Row(first, False, part, None, *stands, tuple(own_sets.objects), tuple(tiles)))
    whole = CacheBytes(layer.preamble, tokens, exact.objects, blocks.objects, sets.objects, made)
    return bytes(whole.joined())


_Object = TypeVar("_Object")


class _Numbered(Generic[_Object]):
    """Objects that several rows may share, numbered in the order of their first use."""

    def __init__(self) -> None:
        self.objects: list[_Object] = []
        self._numbers: dict[Any, int] = {}

    def add(self, key: Any, value: _Object) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.objects)
            self.objects.append(value)
        return self._numbers[key]
