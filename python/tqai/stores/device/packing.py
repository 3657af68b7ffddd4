"""Codes as bytes, laid out as include/tqai/packing.hpp says, in operations on arrays.

Codes come as [..., 64 tokens, coordinates] uint8, the coordinates a multiple of 16; packed they are
[..., coordinates · bits · 8] uint8. Between lie lines: [..., groups, 8, 64], eight of which share
`bits` lines of bytes.
"""

from __future__ import annotations

from tqai.stores.device.operations import Array, Operations

TILE_TOKENS = 64
COORDINATE_BLOCK = 16
KEY_WINDOW_BITS = 6


def padded_dim(coordinates: int) -> int:
    """Smallest multiple of 16 that holds `coordinates`."""
    return -(-coordinates // COORDINATE_BLOCK) * COORDINATE_BLOCK


def pack_keys(ops: Operations, codes: Array, bits: int) -> Array:
    """A lane of 4 bytes is a token: 4 coordinates of 16 tokens make a line."""
    lead, groups = codes.shape[:-2], codes.shape[-1] // 8
    lines = codes.reshape(*lead, 4, 16, groups, 2, 4)  # s, t, group, q, c
    lines = _order_last(ops, lines, (-3, -2, -5, -4, -1)).reshape(*lead, groups, 8, 64)
    return _pack_lines(ops, lines, bits).reshape(*lead, groups * bits * 64)


def unpack_keys(ops: Operations, packed: Array, bits: int, shifts: Array) -> Array:
    """The inverse of ``pack_keys``. shifts: 0…7 in uint8, on the same device."""
    lead, groups = packed.shape[:-1], packed.shape[-1] // (bits * 64)
    lines = _unpack_lines(ops, packed.reshape(*lead, groups, bits, 64), bits, shifts)
    lines = lines.reshape(*lead, groups, 2, 4, 16, 4)  # group, q, s, t, c
    return _order_last(ops, lines, (-3, -2, -5, -4, -1)).reshape(*lead, TILE_TOKENS, groups * 8)


def unpack_key_paths(ops: Operations, packed: Array, bits: int, shifts: Array, start: int) -> Array:
    """Windows of keys in trellis codes, in the order of their paths (include/tqai/trellis.hpp), as
    ``unpack_keys``. start: what stands below the first code's bits."""
    codes = unpack_keys(ops, packed, bits, shifts)
    quads = codes.shape[-1] // 4
    lead = codes.shape[:-1]
    paths = _order_last(ops, codes.reshape(*lead, quads, 4), (-1, -2)).reshape(*lead, 4 * quads)
    windows = paths << KEY_WINDOW_BITS - bits
    first = paths[..., :1]
    for back in range(1, -(-KEY_WINDOW_BITS // bits)):
        shift = KEY_WINDOW_BITS - (back + 1) * bits
        # Of what stands before the first code the part that is `back` codes before.
        given = [(start << bits >> KEY_WINDOW_BITS - bits * (back - i)) for i in range(back)]
        outside = [first * 0 + (value & (1 << bits) - 1) for value in given]
        before = ops.concat([*outside, paths[..., :-back]], -1)
        windows = windows | (before << shift if shift >= 0 else before >> -shift)
    return windows


def pack_values(ops: Operations, codes: Array, bits: int) -> Array:
    """A lane of 4 bytes is a coordinate: 4 tokens of 16 coordinates make a line."""
    lead, groups = codes.shape[:-2], codes.shape[-1] // 8
    lines = codes.reshape(*lead, 2, 8, 4, groups // 2, 16)  # half, i, t, block, c
    lines = _order_last(ops, lines, (-2, -5, -4, -1, -3)).reshape(*lead, groups, 8, 64)
    return _pack_lines(ops, lines, bits).reshape(*lead, groups * bits * 64)


def unpack_values(
    ops: Operations, packed: Array, bits: int, shifts: Array, trellis: bool = False
) -> Array:
    """The inverse of ``pack_values``; of trellis codes the windows in place of the codes. shifts:
    0…7 in uint8, on the same device."""
    lead, groups = packed.shape[:-1], packed.shape[-1] // (bits * 64)
    packed = packed.reshape(*lead, groups, bits, 64)
    if trellis:
        unpack = _unpack_stream if bits == 3 else _unpack_lines
        codes = unpack(ops, packed, bits, shifts).reshape(*lead, groups * 8, 64)
        lines = _windows(ops, codes, bits)
    else:
        lines = _unpack_lines(ops, packed, bits, shifts)
    lines = lines.reshape(*lead, groups // 2, 2, 8, 16, 4)  # block, half, i, c, t
    return _order_last(ops, lines, (-4, -3, -1, -5, -2)).reshape(*lead, TILE_TOKENS, groups * 8)


def _windows(ops: Operations, codes: Array, bits: int) -> Array:
    """The 8 bits that end with each code, of the rings of codes along [..., lines, 64]
    (include/tqai/trellis.hpp)."""
    windows = codes << 8 - bits
    for back in range(1, -(-8 // bits)):
        before = ops.concat([codes[..., -back:, :], codes[..., :-back, :]], -2)
        shift = 8 - (back + 1) * bits
        windows = windows | (before << shift if shift >= 0 else before >> -shift)
    return windows


def _unpack_stream(ops: Operations, packed: Array, bits: int, shifts: Array) -> Array:
    """[..., 3, 64] bytes into [..., 8, 64] codes of 3 bits that follow one another, as those of
    trellises do."""
    first, second, third = ops.unstack(packed, -2)
    codes = (first, first >> 3, first >> 6 | second << 2, second >> 1, second >> 4)
    codes += (second >> 7 | third << 1, third >> 2, third >> 5)
    return ops.stack(codes, -2) & 7


def _order_last(ops: Operations, x: Array, order: tuple[int, ...]) -> Array:
    """`x`, its last axes in another order."""
    return ops.permute_dims(x, (*range(x.ndim - len(order)), *(x.ndim + axis for axis in order)))


def _pack_lines(ops: Operations, codes: Array, bits: int) -> Array:
    """[..., 8, 64] codes into [..., bits, 64] bytes."""
    code = ops.unstack(codes, -2)
    if bits == 8:
        return codes
    if bits == 3:
        return ops.stack(
            [
                code[0] | code[1] << 3 | (code[6] & 3) << 6,
                code[2] | code[3] << 3 | (code[7] & 3) << 6,
                code[4] | code[5] << 3 | (code[6] >> 2) << 6 | (code[7] >> 2) << 7,
            ],
            -2,
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
    return ops.stack(lines, -2)


def _unpack_lines(ops: Operations, packed: Array, bits: int, shifts: Array) -> Array:
    """The inverse of ``_pack_lines``, in few operations: each is a launch on a device."""
    if bits == 8:
        return packed
    lead = packed.shape[:-2]
    if bits == 3:
        low = packed[..., None, :] >> shifts[:6:3, None] & 7
        rest = packed[..., :2, :] >> 6 | (packed[..., 2:, :] >> shifts[6:, None] & 1) << 2
        return ops.concat([low.reshape(*lead, 6, 64), rest], -2)
    codes, first, shift = None, 0, 0
    for width in (4, 2, 1):
        if not bits & width:
            continue
        lines = packed[..., first : first + width, None, :]
        part = (lines >> shifts[::width, None] & (1 << width) - 1).reshape(*lead, 8, 64)
        codes = part if codes is None else codes | part << shift
        first, shift = first + width, shift + width
    assert codes is not None
    return codes
