"""Codes as bytes, laid out as include/tqai/packing.hpp says, in torch operations.

Codes come as [..., 64 tokens, coordinates] uint8, the coordinates a multiple of 16; packed they are
[..., coordinates · bits · 8] uint8. Between lie lines: [..., groups, 8, 64], eight of which share
`bits` lines of bytes.
"""

from __future__ import annotations

import torch

TILE_TOKENS = 64
COORDINATE_BLOCK = 16


def padded_dim(coordinates: int) -> int:
    """Smallest multiple of 16 that holds `coordinates`."""
    return -(-coordinates // COORDINATE_BLOCK) * COORDINATE_BLOCK


def pack_keys(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """A lane of 4 bytes is a token: 4 coordinates of 16 tokens make a line."""
    lines = codes.unflatten(-1, (-1, 2, 4)).unflatten(-4, (4, 16))  # s, t, group, q, c
    lines = lines.movedim((-3, -2, -5, -4, -1), (-5, -4, -3, -2, -1))
    return _pack_lines(lines.flatten(-4, -3).flatten(-2), bits).flatten(-3)


def unpack_keys(packed: torch.Tensor, bits: int, shifts: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_keys``. shifts: 0…7 in uint8, on the same device."""
    lines = _unpack_lines(packed.unflatten(-1, (-1, bits, 64)), bits, shifts)
    lines = lines.unflatten(-2, (2, 4)).unflatten(-1, (16, 4))  # group, q, s, t, c
    codes = lines.movedim((-3, -2, -5, -4, -1), (-5, -4, -3, -2, -1))
    return codes.flatten(-5, -4).flatten(-3)


def pack_values(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """A lane of 4 bytes is a coordinate: 4 tokens of 16 coordinates make a line."""
    lines = codes.unflatten(-1, (-1, 16)).unflatten(-3, (2, 8, 4))  # half, i, t, block, c
    lines = lines.movedim((-2, -5, -4, -1, -3), (-5, -4, -3, -2, -1))
    return _pack_lines(lines.flatten(-5, -4).flatten(-2), bits).flatten(-3)


def unpack_values(packed: torch.Tensor, bits: int, shifts: torch.Tensor) -> torch.Tensor:
    """The inverse of ``pack_values``. shifts: 0…7 in uint8, on the same device."""
    lines = _unpack_lines(packed.unflatten(-1, (-1, bits, 64)), bits, shifts)
    lines = lines.unflatten(-3, (-1, 2)).unflatten(-1, (16, 4))  # block, half, i, c, t
    codes = lines.movedim((-4, -3, -1, -5, -2), (-5, -4, -3, -2, -1))
    return codes.flatten(-5, -3).flatten(-2)


def _pack_lines(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., 8, 64] codes into [..., bits, 64] bytes."""
    code = codes.unbind(-2)
    if bits == 8:
        return codes
    if bits == 3:
        return torch.stack(
            [
                code[0] | code[1] << 3 | (code[6] & 3) << 6,
                code[2] | code[3] << 3 | (code[7] & 3) << 6,
                code[4] | code[5] << 3 | (code[6] >> 2) << 6 | (code[7] >> 2) << 7,
            ],
            dim=-2,
        )
    lines, shift = [], 0
    for width in (4, 2, 1):  # planes of so many bits, the lowest bits first
        if not bits & width:
            continue
        parts = [(c >> shift & (1 << width) - 1) for c in code]
        held = 8 // width  # codes in a byte
        for line in range(width):
            byte = parts[held * line]
            for place in range(1, held):
                byte = byte | parts[held * line + place] << width * place
            lines.append(byte)
        shift += width
    return torch.stack(lines, dim=-2)


def _unpack_lines(packed: torch.Tensor, bits: int, shifts: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_pack_lines``, in few operations: each is a launch on a device."""
    if bits == 8:
        return packed
    if bits == 3:
        low = packed.unsqueeze(-2) >> shifts[:6:3, None] & 7
        rest = packed[..., :2, :] >> 6 | (packed[..., 2:, :] >> shifts[6:, None] & 1) << 2
        return torch.cat([low.flatten(-3, -2), rest], dim=-2)
    codes, first, shift = None, 0, 0
    for width in (4, 2, 1):
        if not bits & width:
            continue
        lines = packed[..., first : first + width, :].unsqueeze(-2)
        part = (lines >> shifts[::width, None] & (1 << width) - 1).flatten(-3, -2)
        codes = part if codes is None else codes | part << shift
        first, shift = first + width, shift + width
    assert codes is not None
    return codes
