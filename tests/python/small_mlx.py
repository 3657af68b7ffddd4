"""Small random mlx-lm models, and what is done with them; without mlx their tests are skipped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pytest

_REASON = "mlx is not installed (pip install 'mlx[cpu]' mlx-lm)"
mx = pytest.importorskip("mlx.core", reason=_REASON)
pytest.importorskip("transformers", "5.7", reason="mlx-lm needs transformers 5.7")
pytest.importorskip("mlx_lm", reason=_REASON)

from mlx.utils import tree_map  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

VOCABULARY = 128
compiled_alone = pytest.mark.skipif(
    os.environ.get("TQAI_TEST_BACKEND") == "mlx-ops", reason="about the compiled cache alone"
)
_SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "head_dim": 16,
}
_HALF_SLIDING = {
    "sliding_window": 150,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GEMMA = {"sliding_window": 150, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
# Of four layers, two of which are convolutions.
LFM2 = {
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 96,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1, 3],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_theta": 1e4}),
    "llama3_rope": (
        "llama",
        {
            "max_position_embeddings": 4096,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 512,
            },
        },
    ),
    "mistral": ("llama", {**_HALF_SLIDING}),
    "qwen2": ("qwen2", {"max_position_embeddings": 4096, "rope_theta": 1e6}),
    "qwen3": (
        "qwen3",
        {"max_position_embeddings": 4096, "rope_theta": 1e6, "tie_word_embeddings": True},
    ),
    "gemma3": ("gemma3_text", _GEMMA),
    "gpt_oss": (
        "gpt_oss",
        {
            **_HALF_SLIDING,
            "rope_theta": 1e4,
            "num_local_experts": 4,
            "num_experts_per_tok": 4,  # a choice of experts would turn small errors into large
        },
    ),
}


def make_model(family: str, dtype: Any = None, **changes: Any) -> Any:
    """A model with weights that make attention matter: keys and queries are not small."""
    module, own = FAMILIES.get(family, (family, {}))
    config = {**_SMALL, **own, **changes, "model_type": module}
    kind = import_module(f"mlx_lm.models.{module}")
    mx.random.seed(1)
    model = kind.Model(kind.ModelArgs.from_dict(config))
    if family == "gpt_oss":
        for layer in model.model.layers:
            layer.self_attn.sinks = mx.random.normal(layer.self_attn.sinks.shape)
    if dtype is not None:
        model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    mx.eval(model.parameters())
    return model


def tokens(count: int, rows: int = 1) -> Any:
    return mx.random.randint(2, VOCABULARY, (rows, count), key=mx.random.key(count))


def read(model: Any, cache: Sequence[Any], text: Any, parts: Sequence[int]) -> Any:
    """Logits of a text read in parts of so many tokens, as mlx-lm does, then one by one."""
    outputs, at = [], 0
    for part in (*parts, *[1] * (text.shape[1] - sum(parts))):
        outputs.append(model(text[:, at : at + part], cache=cache))
        mx.eval(outputs[-1], [layer.state for layer in cache])
        at += part
    return mx.concatenate(outputs, axis=1).astype(mx.float32)


def plain_cache(model: Any) -> list[Any]:
    """The model's own cache."""
    return make_prompt_cache(model)


def error(output: Any, expected: Any) -> float:
    """Relative error of logits."""
    return float(mx.linalg.norm(output - expected) / mx.linalg.norm(expected))
