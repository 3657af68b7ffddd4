"""LMCache's serde classes around ``ChunkCodec``, and their registration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.serde import (
    AsyncSerdeProcessor,
    Deserializer,
    SerdeProcessor,
    Serializer,
    get_registered_serde_types,
    register_serde_factory,
)
from lmcache.v1.memory_management import MemoryObj

from tqai.exchange.chunk import ChunkCodec
from tqai.exchange.chunk_options import ChunkOptions
from tqai.exchange.envelope import NotUsable

NAME = "tqai"
_OWN = ("max_workers",)


class TqaiSerializer(Serializer):
    """Chunks of keys and values as tiles."""

    def __init__(self, codec: ChunkCodec) -> None:
        self.codec = codec

    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:
        """Writes `src` into the bytes of `dst`, and returns how many it took.

        Raises:
            ValueError: for what is no chunk, or cannot be compressed; LMCache stores nothing then.
        """
        to = _bytes_of(dst)
        room = to if to.is_cpu else torch.empty_like(to, device="cpu")
        view = room.numpy().data
        at = 0
        for number, chunk in enumerate(_chunks_of(src)):
            at += self.codec.encode(chunk.cpu(), view[at:], _text(key, number))
        if room is not to:
            to[:at].copy_(room[:at])
        return at

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        """Bytes that chunks of this layout take, exactly."""
        return sum(map(self.codec.size, layout_desc.shapes, layout_desc.dtypes))


class TqaiDeserializer(Deserializer):
    """Tiles as the chunks that they were made from."""

    def __init__(self, codec: ChunkCodec) -> None:
        self.codec = codec

    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:
        """Fills `dst` from the bytes of `src`.

        Raises:
            NotUsable: for bytes that are damaged, or another chunk's, model's or setting's; LMCache
                takes it for a miss.
        """
        data = _bytes_of(src).cpu().numpy().data
        at = 0
        for number, chunk in enumerate(_chunks_of(dst)):
            size = self.codec.size(chunk.shape, chunk.dtype)
            held = chunk if chunk.is_cpu else torch.empty_like(chunk, device="cpu")
            self.codec.decode(data[at : at + size], held, _text(key, number))
            if held is not chunk:
                chunk.copy_(held)
            at += size


def create(kwargs: Mapping[str, Any]) -> SerdeProcessor:
    """The serde of a configuration; see ``codec_and_workers``."""
    codec, workers = codec_and_workers(kwargs)
    return AsyncSerdeProcessor(TqaiSerializer(codec), TqaiDeserializer(codec), max_workers=workers)


def codec_and_workers(kwargs: Mapping[str, Any]) -> tuple[ChunkCodec, int]:
    """What a configuration asks for: the fields of ``ChunkOptions``, and ``max_workers``, how many
    chunks are worked on at once (1).

    Raises:
        ValueError: for a name that is none of these, a value out of range, and without head_dim.
    """
    known = [*ChunkOptions.__dataclass_fields__, *_OWN]
    for name in kwargs:
        if name not in known:
            raise ValueError(f"serde tqai has no {name!r}; it takes {', '.join(known)}")
    workers = kwargs.get("max_workers", 1)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"max_workers={workers!r}: expected an integer of 1 or more")
    if "head_dim" not in kwargs:
        raise ValueError("serde tqai needs head_dim, the coordinates of a key")
    options = {name: value for name, value in kwargs.items() if name not in _OWN}
    return ChunkCodec(ChunkOptions(**options)), workers


def register() -> None:
    """Makes the serde known to LMCache as "tqai", where it is not yet."""
    if NAME not in get_registered_serde_types():
        register_serde_factory(NAME, create)


def _chunks_of(obj: MemoryObj) -> list[torch.Tensor]:
    """The tensors in a memory object, one for each of its shapes."""
    shapes = obj.get_shapes() if hasattr(obj, "get_shapes") else []
    tensor = obj.tensor if len(shapes) < 2 else None
    if len(shapes) < 2:
        if tensor is None:
            raise ValueError("serde tqai needs memory objects with tensors")
        return [tensor]
    chunks, at = [], 0
    for shape, dtype in zip(shapes, obj.get_dtypes(), strict=True):
        end = at + shape.numel() * dtype.itemsize
        chunks.append(obj.raw_data[at:end].view(dtype).view(shape))
        at = end
    return chunks


def _bytes_of(obj: MemoryObj) -> torch.Tensor:
    """The bytes in a memory object, [bytes] uint8."""
    if obj.tensor is None:
        raise ValueError("serde tqai needs memory objects with tensors")
    return obj.tensor.flatten().view(torch.uint8)


def _text(key: ObjectKey, number: int) -> str:
    return repr((key, number))


__all__ = ["NotUsable", "TqaiDeserializer", "TqaiSerializer", "create", "register"]
