"""The attention that a patched model had before: which it was, and what it computes.

The name in a patched config is still that of the implementation that tqai stands before, so that
models that ask for it go on as before, nothing has to be remembered beside the config, and a copied
model stays right.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import GeneralInterface

from tqai.signals import is_of_a_handler
from tqai.transformers.model.devices import lacks_memory

PATCHED_NAMES = {"sdpa": "tqai", "eager": "tqai_eager"}
"""Attention implementation → the name that tqai's, standing before it, is registered under."""


_EAGER = "eager_attention_forward"
"""The name of the eager attention function in each model's file."""
_LOOKUPS = vars(sys.modules[GeneralInterface.__module__])
"""The scope of the code that looks up functions by their names."""
_LOOKS_UP = hasattr(type(ALL_ATTENTION_FUNCTIONS), "get_interface")
"""Whether models look up what a name stands for, whatever the name is."""


class PatchedName(str):
    """The name of an attention implementation, as ``tqai.patch`` puts it into a config.

    Its text is the original implementation's, "sdpa" or "eager": models compare it to choose masks
    and formulas that go with it, look it up in sets and tables of their own, configs are checked
    and printed with it. Where transformers looks up functions it finds what is registered for
    tqai, by a hash of its own.
    """

    __slots__ = ("_hash", "_names")
    _hash: int
    _names: tuple[str, str]

    def __new__(cls, original: str) -> PatchedName:
        name = super().__new__(cls, original)
        name._names = original, PATCHED_NAMES[original]
        name._hash = hash(name._names[1])  # asked for several times a layer and token
        return name

    def __hash__(self) -> int:
        # A trace cannot tell who asks.
        if torch.compiler.is_compiling() or sys._getframe(1).f_globals is _LOOKUPS:
            return self._hash
        return str.__hash__(self)

    def __eq__(self, other: object) -> bool:
        # A dictionary compares the keys of its own that have the same hash.
        return isinstance(other, str) and str.__str__(other) in self._names

    def __ne__(self, other: object) -> bool:
        # Up to transformers 5.0 attention modules have no other way to tqai's function than a name
        # that is not "eager"; whoever else compares, as the config does, is told the name.
        if not _LOOKS_UP and other == "eager" and _EAGER in sys._getframe(1).f_globals:
            return True
        return not self == other

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

_UNDERSTOOD = frozenset(
    "module query key value attention_mask scaling dropout is_causal softcap s_aux "
    "sliding_window".split()
)


def patched_name(implementation: str) -> PatchedName:
    """The name for tqai before `implementation`, which may be a name for tqai already.

    Raises:
        NotImplementedError: for an implementation that tqai does not stand before.
    """
    original = original_name(implementation)
    if original not in PATCHED_NAMES:
        raise NotImplementedError(
            f"the model's attention implementation is {implementation!r}; tqai works with "
            f"{' and '.join(map(repr, PATCHED_NAMES))}: model.set_attn_implementation('sdpa') first"
        )
    return PatchedName(original)


def configs_of(decoder: torch.nn.Module) -> list[Any]:
    """The distinct configs of the decoder's parts whose attention implementation can be chosen.

    Models whose attention does not go through the interface are left alone; there the views are
    dequantised.

    Raises:
        NotImplementedError: for an implementation that tqai does not stand before.
    """
    can_set = getattr(type(decoder), "_can_set_attn_implementation", None)
    if can_set is None or not can_set():
        return []
    configs = {}
    for module in decoder.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) is not None:
            patched_name(config._attn_implementation)
            configs[id(config)] = config
    return list(configs.values())


def original_name(implementation: str) -> str:
    """The implementation that `implementation`, perhaps one of tqai's names, stands before."""
    names = {patched: name for name, patched in PATCHED_NAMES.items()}
    text = str(implementation)
    return names.get(text, text)


def original_attention(implementation: str, module: torch.nn.Module) -> Attention:
    """The function that `module` would call were its config set to `implementation`."""
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    return _eager_attention(type(module))


_eager: dict[type, Attention] = {}


def _eager_attention(module: type) -> Attention:
    """Each model file has its own eager function, in the scope of its attention's forward."""
    if module not in _eager:
        _eager[module] = _find_eager_attention(module)
    return _eager[module]


def _find_eager_attention(module: type) -> Attention:
    forward = inspect.unwrap(module.forward)
    scopes = (getattr(forward, "__globals__", {}), vars(sys.modules[module.__module__]))
    for scope in scopes:
        if _EAGER in scope:
            return scope[_EAGER]
    raise NotImplementedError(
        f"{module.__name__} has no eager attention function that tqai can find; "
        "use attn_implementation='sdpa'"
    )


def takes_unknown(attention: Attention, kwargs: dict[str, Any]) -> bool:
    """Whether `kwargs` gives `attention` something by name that the kernel does not know."""
    if attention not in _unknown:
        parameters = inspect.signature(attention).parameters
        _unknown[attention] = tuple(sorted(set(parameters) - _UNDERSTOOD))
    for name in _unknown[attention]:
        if kwargs.get(name) is not None:
            return True
    return False


_unknown: dict[Attention, tuple[str, ...]] = {}


class Formula(NamedTuple):
    """What an attention function computes beyond softmax(scale · q kᵀ + mask) v."""

    soft_cap: bool
    """It caps scores at the `softcap` that it is given."""
    sinks: bool
    """It counts the `s_aux` that it is given in the softmax's sum."""


_formulas: dict[tuple[Attention, type, bool, bool], Formula | None] = {}


def formula_of(
    attention: Attention,
    module: torch.nn.Module,
    heads: tuple[int, int, int, int],
    soft_cap: float | None,
    sinks: torch.Tensor | None,
    device: torch.device,
) -> Formula | None:
    """What `attention` makes of a soft cap and sinks; None: nothing that the kernel computes.

    Found by trying it on a few random vectors, as models' own functions differ and some take
    arguments only to ignore them. Remembered for each function and class of module.

    heads: query heads, key/value heads, head_dim, value_head_dim. device: where `module` computes.
    """
    key = attention, type(module), soft_cap is not None, sinks is not None
    with suppress(KeyError):  # another thread may take it away at any time
        return _formulas[key]
    formula = None
    try:
        formula = _probe(attention, module, heads, soft_cap is not None, sinks, device)
    except Exception as error:  # whatever it needs, it is not what the kernel does
        if is_of_a_handler(error):
            raise
        if lacks_memory(error):
            return None  # says nothing of the function: the next call tries again
    _formulas[key] = formula
    return formula


@torch.no_grad()
def _probe(
    attention: Attention,
    module: torch.nn.Module,
    heads: tuple[int, int, int, int],
    capped: bool,
    sinks: torch.Tensor | None,
    device: torch.device,
) -> Formula | None:
    query_heads, kv_heads, dim, value_dim = heads
    generator = torch.Generator("cpu").manual_seed(1)
    exact: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    random = partial(torch.randn, generator=generator, **exact)
    # Where the module's own weights are, which some functions read.
    query = random(1, query_heads, 2, dim).to(device)
    key = random(1, kv_heads, 3, dim).to(device)
    value = random(1, kv_heads, 3, value_dim).to(device)
    mask = torch.zeros(1, 1, 2, 3, **exact).to(device)
    mask[0, 0, 0, 2] = torch.finfo(mask.dtype).min
    cap, scaling = 1.5, 2.0 / dim**0.5  # scores of about 2, so that the cap shows
    extra: dict[str, Any] = {"softcap": cap} if capped else {}
    if sinks is not None:
        extra["s_aux"] = sinks
    with torch.autocast(device.type, enabled=False):
        got = attention(module, query, key, value, mask, dropout=0.0, scaling=scaling, **extra)[0]

    groups = query_heads // kv_heads
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling
    for with_sinks in (True, False) if sinks is not None else (False,):
        for with_cap in (True, False) if capped else (False,):
            logits = (cap * torch.tanh(scores / cap) if with_cap else scores) + mask
            if with_sinks:
                assert sinks is not None
                column = sinks.float().reshape(1, -1, 1, 1).expand(1, query_heads, 2, 1)
                logits = torch.cat([logits, column], -1)
            weights = logits.softmax(-1)[..., :3]
            expected = (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)
            if torch.allclose(got.float(), expected, rtol=0, atol=2e-3):
                return Formula(with_cap, with_sinks)
    return None


def learn(implementation: str, module: torch.nn.Module) -> None:
    """Finds out now what an attention module's function computes, as tracing cannot stop for it.

    What cannot be found out yet is left to its first call.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    dim = getattr(module, "head_dim", 16)
    sinks = getattr(module, "sinks", None)
    if not (isinstance(groups, int) and isinstance(dim, int)) or groups < 1 or dim < 1:
        return
    heads = groups if sinks is None else sinks.numel()
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    if heads % groups or device.type == "meta":
        return
    try:
        attention = original_attention(implementation, module)
    except NotImplementedError:
        return
    takes_unknown(attention, {})
    for soft_cap in (None, 1.0):
        key = attention, type(module), soft_cap is not None, sinks is not None
        if key not in _formulas:
            shape = heads, heads // groups, dim, dim
            if formula_of(attention, module, shape, soft_cap, sinks, device) is None:
                _formulas.pop(key, None)
