"""Which rotary embedding keys go through, as mlx-lm's models call it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_mlx import FAMILIES, make_model, mx, plain_cache, read, tokens

# isort: split
import tqai
from mlx_lm.models.rope_utils import initialize_rope
from tqai.mlx.model.find_rope import Watch, rope_of
from tqai.mlx.model.geometry import geometry_of

DIM = 32
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "traditional": {"traditional": True},
    "linear": {"scaling_config": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        "scaling_config": {
            "rope_type": "llama3",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn": {
        "scaling_config": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "longrope": {
        "scaling_config": {
            "rope_type": "longrope",
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * (DIM // 2),
            "long_factor": [1.0 + f / 8 for f in range(DIM // 2)],
        },
        "max_position_embeddings": 256,
    },
    "partial": {"dims": DIM // 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_module_does(kind: str) -> None:
    options = {"dims": DIM, "base": 10000.0, "traditional": False, **KINDS[kind]}
    module = initialize_rope(**options)
    watch = Watch()
    with watch.looking():
        calls = [
            (watch.call_of(module(mx.ones((1, 1, 1, DIM)), offset=offset)), offset)
            for offset in (0, 2, 1_000_002)
        ]
    rope = rope_of(calls, DIM)
    assert rope is not None and rope.rotary_dim == options["dims"]
    vector = mx.random.normal((1, 2, 1, DIM), key=mx.random.key(3))
    start = torch.from_numpy(np.array(module(vector, offset=0)))
    for position in (1, 7, 200):
        expected = np.array(module(vector, offset=position))
        assert np.abs(rope.turn(start, position).numpy() - expected).max() < 1e-3


def test_frequencies_that_change_with_the_length_are_not_taken() -> None:
    module = initialize_rope(
        DIM, 10000.0, False, {"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=64
    )
    watch = Watch()
    with watch.looking():
        calls = [
            (watch.call_of(module(mx.ones((1, 1, 1, DIM)), offset=offset)), offset)
            for offset in (0, 2, 1_000_002)
        ]
    assert rope_of(calls[:2], DIM) is not None and rope_of(calls, DIM) is None


def test_another_position_than_the_cache_has_is_not_taken() -> None:
    watch = Watch()
    with watch.looking():
        keys = initialize_rope(DIM, 10000.0, False)(mx.ones((1, 1, 1, DIM)), offset=3)
    assert rope_of([(watch.call_of(keys), 3)], DIM) is not None
    assert rope_of([(watch.call_of(keys), 0)], DIM) is None
    assert rope_of([(watch.call_of(keys + 0), 3)], DIM) is None
    assert rope_of([], DIM) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_one_for_each_layer(family: str) -> None:
    before = mx.fast.rope
    model = make_model(family)
    for (shape,) in geometry_of(model, plain_cache(model)).shapes:
        assert shape is not None and shape.rope is not None
        assert shape.rope.rotary_dim == 16 and shape.rope.layout == "half_split"
    assert mx.fast.rope is before


def test_gemma_has_two_bases() -> None:
    model = make_model("gemma3")
    (sliding,), (whole,) = geometry_of(model, plain_cache(model)).shapes
    assert sliding.rope.inv_freq != whole.rope.inv_freq


def test_a_mean_that_turns_is_left_out() -> None:
    """Keys with a bias, as Qwen2 has them: the centre before rotary embedding is the better one."""
    model = make_model("qwen2", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    attention.k_proj.bias = 5 * mx.random.normal(attention.k_proj.bias.shape)
    cache = tqai.patch(model)
    read(model, cache, tokens(300), [300])
    report = cache.memory_report()
    assert report["centering"] == {"rope": 2} and report["rotary"] == {"half_split": 1}
    again = type(cache[0]).from_state(cache[0].state)
    assert again.shape == cache[0].shape


def test_asking_for_one_that_is_not_there_is_refused() -> None:
    model = make_model(
        "gpt2", n_ctx=512, n_embd=64, n_head=4, n_layer=1, n_positions=512, layer_norm_epsilon=1e-5
    )
    with pytest.raises(ValueError, match="layer 0: centering='rope' needs a rotary embedding"):
        tqai.patch(model, centering="rope")
    cache = tqai.patch(model)
    read(model, cache, tokens(300), [300])
    assert cache.memory_report()["rotary"] == {"unrecognised": 1}
