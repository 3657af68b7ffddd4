"""Which rotary position embedding each layer's keys go through, found out by trying.

Nothing here trusts names: the model itself is run once on one token at several positions, and a
layer's keys at position 0, turned by what the model's ``inv_freq`` buffers say, must be its keys at
the others. Layouts, partial rotation, scaled frequencies and different bases in one model all come
out of that; what fits nothing gets no rotary centre. Where a token has several positions (M-RoPE),
it is run once more, on one token at positions that differ, to see which of them turns what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache

from tqai.shapes.rope import LAYOUTS, MAX_SECTIONS, Rope
from tqai.signals import is_of_a_handler
from tqai.transformers.model.devices import device_of, lacks_memory
from tqai.transformers.model.names import cache_argument
from tqai.transformers.model.positions import frequencies, positions_among, rotary_modules
from tqai.transformers.model.shadow import shadow_of
from tqai.transformers.weights.held import CHANGING

POSITIONS = (0, 1, 2, 3, 5, 8, 13, 29, 64, 127, 300, 511)
# Largest error of the turned keys, of their length. Keys in bf16 carry 0.4 % of rounding; a wrong
# layout or base is off by more than a tenth.
TOLERANCE = 0.02
# A pair that hardly turns shows which position turns it when that is far.
FAR_POSITIONS = (7, 331, 5003, 100003)


def find_ropes(decoder: torch.nn.Module, config: Any, layers: int) -> tuple[Rope | None, ...]:
    """The rotary embedding of each of the decoder's cache layers; None where none is recognised.

    Costs one forward pass of a dozen single tokens, by a shadow of the decoder: nothing is done to
    the decoder itself, and weights that are not in memory are not read.

    Raises:
        MemoryError, RuntimeError: where there is no memory for that.
    """
    none = (None,) * layers
    if not any(True for _ in rotary_modules(decoder)):
        return none
    limit, changes = _limit(config)
    positions = [position for position in POSITIONS if position < limit]
    if len(positions) < 4:
        return none
    shadow = shadow_of(decoder)
    probe = _probe(shadow, config, torch.tensor(positions, device="cpu")[:, None])
    if probe is None or len(probe.keys) != layers:
        return none
    bases = _frequencies(shadow)
    ropes = tuple(_fit(layer, positions, bases) for layer in probe.keys)
    if changes:
        ropes = tuple(rope and replace(rope, changes=True) for rope in ropes)
    if not 1 < probe.sections <= MAX_SECTIONS:
        return ropes
    far = [position for position in FAR_POSITIONS if not changes or position < limit]
    # [sections, rows, 1]: all at 0, then each section alone at each position.
    shape = probe.sections, 1 + probe.sections * len(far), 1
    apart = torch.zeros(shape, dtype=torch.long, device="cpu")
    for section in range(probe.sections):
        start = 1 + section * len(far)
        apart[section, start : start + len(far), 0] = torch.tensor(far, device="cpu")
    probe = _probe(shadow, config, apart)
    if probe is None or len(probe.keys) != layers:
        return ropes
    return tuple(
        _with_sections(rope, layer, far, len(apart))
        for rope, layer in zip(ropes, probe.keys, strict=True)
    )


def turn_unrecognised(
    shadow: torch.nn.Module, config: Any, ropes: Sequence[Rope | None]
) -> tuple[bool, ...]:
    """Whether each layer's keys go through an embedding that ``find_ropes`` did not recognise.

    shadow: of the decoder whose layers have `ropes`; None there also stands for no embedding.
    """
    recognised = (False,) * len(ropes)
    if None not in ropes or not any(True for _ in rotary_modules(shadow)):
        return recognised
    positions = [position for position in POSITIONS if position < first_too_far(config)]
    probe = _probe(shadow, config, torch.tensor(positions, device="cpu")[:, None])
    if probe is None or len(probe.keys) != len(ropes):
        return tuple(rope is None for rope in ropes)
    return tuple(
        rope is None and (keys is None or not _distance_moved(keys) < TOLERANCE)
        for rope, keys in zip(ropes, probe.keys, strict=True)
    )


def first_too_far(config: Any) -> int:
    """The first position that is too far to try on a model of this configuration."""
    return _limit(config)[0]


def _frequencies(decoder: torch.nn.Module) -> list[tuple[float, ...]]:
    """The distinct ``inv_freq`` buffers of the decoder's rotary modules."""
    found: dict[tuple[float, ...], None] = {}
    for buffer in frequencies(decoder):
        if buffer.device.type == "meta":  # its numbers are nowhere
            return []
        found[tuple(buffer.float().tolist())] = None
    return list(found)


def _limit(config: Any) -> tuple[int, bool]:
    """The first position that is too far to try, and whether frequencies depend on the length.

    Those that do are what they are at first up to a length that the configuration knows.
    """
    lengths = [getattr(config, "max_position_embeddings", None)]
    changes = False
    pending = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if value.get("rope_type", value.get("type")) in CHANGING:
                changes = True
                lengths.append(value.get("original_max_position_embeddings"))
            pending.extend(value.values())
    if changes:
        lengths.append(getattr(config, "original_max_position_embeddings", None))
    known = [length for length in lengths if length]
    return min(known, default=max(POSITIONS) + 1), changes


class _Probe(NamedTuple):
    """What a decoder did to one token in each row of a batch."""

    keys: list[torch.Tensor | None]
    """Of each layer, [rows, kv_heads, head_dim]; None where it has none."""
    sections: int
    """Positions a token that its rotary modules are handed; 0: they are not called."""


def _probe(shadow: torch.nn.Module, config: Any, positions: torch.Tensor) -> _Probe | None:
    """None where the decoder takes no such call. positions: its argument, int64.

    Every row of the batch is the same single token at another position. A token that sees only
    itself leaves every layer the same at any position, but for what is done to its key.
    """
    cache = DynamicCache(config=config)
    rows, sections = positions.shape[-2], 0

    def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal sections
        handed = positions_among(args, kwargs)
        if handed is not None and handed.shape[-2:] == (rows, 1):
            sections = len(handed) if handed.ndim == 3 else 1

    handles = [
        module.register_forward_pre_hook(see, with_kwargs=True) for module in rotary_modules(shadow)
    ]
    # Another token than the usual special ones, which some models treat apart.
    token = min(11, (getattr(config, "vocab_size", None) or 2) - 1)
    device = device_of(shadow)
    numbered = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(numbered):
            shadow(
                input_ids=torch.full((rows, 1), token, device=device),
                position_ids=positions.to(device),
                use_cache=True,
                **cache_argument(shadow, cache),
            )
    except Exception as error:  # whatever a model's own code raises: it cannot be asked so
        if lacks_memory(error) or is_of_a_handler(error):
            raise
        return None
    finally:
        for handle in handles:
            handle.remove()
    return _Probe([_keys(layer, rows) for layer in cache.layers], sections)


def _keys(layer: Any, rows: int) -> torch.Tensor | None:
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4 or keys.shape[::2] != (rows, 1):
        return None
    return keys[:, :, 0].cpu()


def _fit(
    keys: torch.Tensor | None, positions: list[int], bases: list[tuple[float, ...]]
) -> Rope | None:
    """The embedding that takes the keys of position 0 to the others, if there is one."""
    if keys is None or not torch.isfinite(keys).all():
        return None
    best, best_error = None, TOLERANCE
    for inv_freq in bases:
        for layout in LAYOUTS:
            rope = Rope(inv_freq, layout)
            if rope.rotary_dim > keys.shape[-1]:
                continue
            error = max(
                _distance(rope.turn(keys[0], position), keys[row])
                for row, position in enumerate(positions)
            )
            if error < best_error:
                best, best_error = rope, error
    # Keys that stay as they are would fit any embedding of theirs that hardly turns.
    return best if _distance_moved(keys) > 2 * best_error else None


def _with_sections(
    rope: Rope | None, keys: torch.Tensor | None, far: list[int], sections: int
) -> Rope | None:
    """`rope` with the section that turns each pair.

    keys: [1 + sections · positions, kv_heads, head_dim], all sections at 0, then each alone at each
    of the positions.
    """
    if rope is None or keys is None or not torch.isfinite(keys).all():
        return rope
    pairs = len(rope.inv_freq)
    errors = torch.zeros(sections, pairs, dtype=torch.float64, device="cpu")
    for section in range(sections):
        for row, position in enumerate(far):
            expected = rope.turn(keys[0], position)
            given = keys[1 + section * len(far) + row].double()
            error = (expected - given)[..., : rope.rotary_dim].square().sum(0)
            split = rope.layout == "half_split"
            errors[section] += error.unflatten(0, (2, pairs) if split else (pairs, 2)).sum(
                0 if split else 1
            )
    return replace(rope, sections=tuple(errors.argmin(0).tolist()))


def _distance_moved(keys: torch.Tensor) -> float:
    """How far positions move keys, [rows, kv_heads, head_dim], from the first row's."""
    return max(_distance(keys[0].double(), row) for row in keys)


def _distance(expected: torch.Tensor, given: torch.Tensor) -> float:
    """Largest error of any head's key, of its length."""
    lengths = expected.norm(dim=-1).clamp_min(1e-12)
    return float(((expected - given.double()).norm(dim=-1) / lengths).max())
