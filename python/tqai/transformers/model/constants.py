"""What a model computes with beside its weights: numbers and names in its configuration.

The same weights with another epsilon, activation or soft cap make other keys and values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

Constant = bool | int | float | str

# By the words of their names: families call the same thing ``rms_norm_eps``, ``layer_norm_epsilon``
# and ``norm_eps``. What weights and files tell by themselves (sizes, biases, rotary frequencies,
# windows) is not among them.
_COMPUTED = frozenset(
    "eps epsilon act activation softcap softcapping cap scale scaling scalar multiplier".split()
)
_WHOLE = frozenset({"num_experts_per_tok", "num_experts_per_token", "moe_k", "norm_topk_prob"})
_TRAINED = frozenset("dropout drop init initial initializer loss jitter".split())
"""What training alone reads."""


def constants_of(config: Any) -> dict[str, Constant]:
    """Names and values in a decoder's configuration that change what it computes."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if _is_computed(name) and isinstance(value, Constant) and _is_finite(value)
    }


def _is_computed(name: str) -> bool:
    words = set(re.split(r"[_\W]+", name.lower()))
    return name in _WHOLE or bool(words & _COMPUTED and not words & _TRAINED)


def _is_finite(value: Constant) -> bool:
    """Others have no place in JSON."""
    return isinstance(value, str) or math.isfinite(value)


def difference(mine: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """The first constant that both have, with other values, as in "rms_norm_eps 1e-05, not 1e-06".

    Empty where there is none. Another version of transformers may know other names.
    """
    for name in sorted(mine.keys() & others.keys()):
        if mine[name] != others[name]:
            return f"{name} {others[name]}, not {mine[name]}"
    return ""
