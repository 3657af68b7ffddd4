"""Which rotary position embedding each layer's keys go through, found out by trying.

Nothing here trusts names: the model itself is run once on one token at several positions, and a
layer's keys at position 0, turned by what the model's ``inv_freq`` buffers say, must be its keys at
the others. Layouts, partial rotation, scaled frequencies and different bases in one model all come
out of that; what fits nothing gets no rotary centre.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from tqai.stores.rope import LAYOUTS, Rope
from tqai.transformers.devices import device_of, lacks_memory
from tqai.transformers.names import cache_argument
from tqai.transformers.shadow import shadow_of

POSITIONS = (0, 1, 2, 3, 5, 8, 13, 29, 64, 127, 300, 511)
# Largest error of the turned keys, of their length. Keys in bf16 carry 0.4 % of rounding; a wrong
# layout or base is off by more than a tenth.
TOLERANCE = 0.02
# Frequencies of these kinds change with the length of the text.
CHANGING = ("dynamic", "longrope")


def find_ropes(decoder: torch.nn.Module, config: Any, layers: int) -> tuple[Rope | None, ...]:
    """The rotary embedding of each of the decoder's cache layers; None where none is recognised.

    Costs one forward pass of a dozen single tokens, by a shadow of the decoder: nothing is done to
    the decoder itself, and weights that are not in memory are not read.

    Raises:
        MemoryError, RuntimeError: where there is no memory for that.
    """
    none = (None,) * layers
    frequencies = _frequencies(decoder)
    if not frequencies or _changes(config):
        return none
    keys = _probe(decoder, config)
    if keys is None or len(keys) != layers:
        return none
    return tuple(_fit(layer, frequencies) for layer in keys)


def _frequencies(decoder: torch.nn.Module) -> list[tuple[float, ...]]:
    """The distinct ``inv_freq`` buffers of the decoder's rotary modules."""
    found: dict[tuple[float, ...], None] = {}
    for name, buffer in decoder.named_buffers():
        last = name.rpartition(".")[2]
        if last.endswith("inv_freq") and "original" not in last and buffer.ndim == 1:
            if buffer.device.type == "meta":  # its numbers are nowhere
                return []
            found[tuple(buffer.float().tolist())] = None
    return list(found)


def _changes(config: Any) -> bool:
    """Whether the configuration asks for frequencies that depend on the text's length."""
    pending = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if value.get("rope_type", value.get("type")) in CHANGING:
                return True
            pending.extend(value.values())
    return False


def _probe(decoder: torch.nn.Module, config: Any) -> list[torch.Tensor | None] | None:
    """Keys of each layer, [positions, kv_heads, head_dim]; None where it takes no such call.

    Every row of the batch is the same single token at another position. A token that sees only
    itself leaves every layer the same at any position, but for what is done to its key.
    """
    limit = getattr(config, "max_position_embeddings", None) or max(POSITIONS) + 1
    positions = [position for position in POSITIONS if position < limit]
    if len(positions) < 4:
        return None
    cache = DynamicCache(config=config)
    # Another token than the usual special ones, which some models treat apart.
    token = min(11, (getattr(config, "vocab_size", None) or 2) - 1)
    device = device_of(decoder)
    numbered = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(numbered):
            shadow_of(decoder)(
                input_ids=torch.full((len(positions), 1), token, device=device),
                position_ids=torch.tensor(positions, device=device)[:, None],
                use_cache=True,
                **cache_argument(decoder, cache),
            )
    except Exception as error:  # whatever a model's own code raises: it cannot be asked so
        if lacks_memory(error):
            raise
        return None
    return [_keys(layer, len(positions)) for layer in cache.layers]


def _keys(layer: Any, positions: int) -> torch.Tensor | None:
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, torch.Tensor) or keys.ndim != 4 or keys.shape[::2] != (positions, 1):
        return None
    return keys[:, :, 0].cpu()


def _fit(keys: torch.Tensor | None, frequencies: list[tuple[float, ...]]) -> Rope | None:
    """The embedding that takes the keys of position 0 to the others, if there is one."""
    if keys is None or not torch.isfinite(keys).all():
        return None
    best, best_error = None, TOLERANCE
    for inv_freq in frequencies:
        for layout in LAYOUTS:
            rope = Rope(inv_freq, layout)
            if rope.rotary_dim > keys.shape[-1]:
                continue
            error = max(
                _distance(rope.turn(keys[0], position), keys[row])
                for row, position in enumerate(POSITIONS[: len(keys)])
            )
            if error < best_error:
                best, best_error = rope, error
    # Keys that stay as they are would fit any embedding of theirs that hardly turns.
    moved = max(_distance(keys[0].double(), row) for row in keys)
    return best if moved > 2 * best_error else None


def _distance(expected: torch.Tensor, given: torch.Tensor) -> float:
    """Largest error of any head's key, of its length."""
    lengths = expected.norm(dim=-1).clamp_min(1e-12)
    return float(((expected - given.double()).norm(dim=-1) / lengths).max())
