"""Layers without keys and values, as each version of transformers has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tqai
import transformers
from caches import SEALING, assert_equal, filled
from conftest import HALF_SLIDING, SMALL, make_ids
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.model import other_layers
from tqai.transformers.model.other_layers import tensors_of
from transformers import cache_utils

SHARED = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 150,
    "layer_types": HALF_SLIDING * 2,
    "vocab_size_per_layer_input": 128,
    "hidden_size_per_layer_input": 16,
}


class Layer:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


def test_tensors_are_found_however_they_are_kept() -> None:
    first, second, third = torch.ones(1), torch.ones(2), torch.ones(3)
    layer = Layer(keys=first, again=first, states={0: second, 1: None}, deep=[(third, "x")], n=4)
    assert [tensor.numel() for tensor in tensors_of(layer)] == [1, 2, 3]
    assert tensors_of(Layer(keys=None, states={})) == []


@pytest.mark.parametrize("kind", ["LinearAttentionLayer", "DummyLayer"])
def test_kinds_are_told_apart(kind: str) -> None:
    if not hasattr(cache_utils, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    layer = getattr(cache_utils, kind)()
    assert other_layers.is_recurrent(layer) == (kind == "LinearAttentionLayer")
    assert other_layers.holds_nothing(layer) == (kind == "DummyLayer")
    for other in (cache_utils.DynamicLayer(), TqaiLayer(0, tqai.settings.Settings())):
        assert not other_layers.is_recurrent(other) and not other_layers.holds_nothing(other)


@pytest.mark.skipif(not other_layers.HYBRIDS, reason="no recurrent layers before transformers 5.5")
def test_only_states_of_convolutions_go_back() -> None:
    layer = cache_utils.LinearAttentionLayer()
    if not other_layers.forgets_its_past(layer):
        assert not other_layers.can_go_back(layer)
        layer.activate_past_recording()
    layer.update_conv_state(torch.randn(1, 8, 4))
    assert other_layers.can_go_back(layer)
    layer.update_recurrent_state(torch.randn(1, 2, 8, 8))
    assert not other_layers.can_go_back(layer)


def test_layers_that_read_others_are_left_alone(tmp_path: Any) -> None:
    """Gemma 3n's last layers: empty ones since transformers 5.23, none at all before."""
    config = transformers.Gemma3nTextConfig(**{**SMALL, **SHARED})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(2, 200))
    assert [type(layer) for layer in cache.layers[:2]] == [TqaiLayer] * 2
    assert all(other_layers.holds_nothing(layer) for layer in cache.layers[2:])
    assert all(layer["total_bytes"] == 0 for layer in cache.memory_report()["layers"][2:])
    tqai.save_cache(cache, tmp_path / "f")
    loaded = tqai.load_cache(tmp_path / "f", model)
    assert_equal(Layer(layers=loaded.layers[:2]), Layer(layers=cache.layers[:2]))
    cache.crop(-3)
    assert cache.get_seq_length() == 197
