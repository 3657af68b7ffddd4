"""Caches that hold sealed tokens, and what is in them."""

from __future__ import annotations

from typing import Any

import torch

SEALING = {"residual_window": 16, "sink_tokens": 2}


def filled(model: Any, cache: Any, ids: torch.Tensor, **options: Any) -> Any:
    """`cache`, after `model` has read `ids`."""
    with torch.no_grad():
        model(ids, past_key_values=cache, **options)
    return cache


def held(cache: Any) -> list[torch.Tensor]:
    """All keys and values in a cache."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return [tensor for tensor in tensors if tensor is not None]


def assert_equal(got: Any, expected: Any) -> None:
    for ours, theirs in zip(held(got), held(expected), strict=True):
        assert torch.equal(ours, theirs)


def traces(model: Any) -> dict[str, Any]:
    """All of `model` that a patch may change."""
    modules = list(model.modules())
    configs = [module.config for module in modules if hasattr(module, "config")]
    return {
        "attributes": [sorted(vars(module)) for module in modules],
        "hooks": [list(module._forward_pre_hooks.items()) for module in modules],
        "hooks with keywords": [list(module._forward_pre_hooks_with_kwargs) for module in modules],
        "implementations": [repr(config._attn_implementation) for config in configs],
        "kinds of names": [type(config._attn_implementation) for config in configs],
        "configs": [sorted(vars(config)) for config in configs],
        "saved": model.config.to_json_string(use_diff=False),
    }
