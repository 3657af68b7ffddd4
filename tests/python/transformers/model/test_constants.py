from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tqai
from caches import SEALING, filled
from conftest import Models, make_ids
from tqai.transformers.model.constants import constants_of, difference


def read_on(model: Any, cache: Any) -> None:
    with torch.no_grad():
        model(make_ids(1, 3, seed=9), past_key_values=cache)


def constants(**values: Any) -> dict[str, Any]:
    return constants_of(SimpleNamespace(to_dict=lambda: values))


def test_what_changes_keys_and_values_counts() -> None:
    counted = {
        "rms_norm_eps": 1e-6,
        "layer_norm_epsilon": 1e-5,
        "hidden_act": "silu",
        "activation_function": "gelu",
        "attn_logit_softcapping": 50.0,
        "query_pre_attn_scalar": 256,
        "residual_multiplier": 0.2,
        "routed_scaling_factor": 2.5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    others = {
        "vocab_size": 100,
        "use_cache": True,
        "activation_dropout": 0.1,
        "layer_scale_init_value": 0.1,
        "initializer_range": 0.02,
        "rope_scaling": {"factor": 2.0},
        "hidden_activation": None,
        "logit_scale": float("inf"),
        "transformers_version": "5.24.0",
    }
    assert constants(**counted, **others) == counted


def test_names_that_only_one_knows_say_nothing() -> None:
    assert difference(constants(norm_eps=1.0), constants(rms_norm_eps=2.0)) == ""
    assert difference(constants(norm_eps=1.0), constants(norm_eps=2.0)) == "norm_eps 2.0, not 1.0"


CHANGES = [
    ("llama", "rms_norm_eps", 1e-2),
    ("llama", "hidden_act", "gelu"),
    ("gemma2", "attn_logit_softcapping", 7.0),
]


@pytest.mark.parametrize(("family", "name", "value"), CHANGES)
def test_the_same_weights_with_another_constant_are_another_model(
    models: Models, tmp_path: Path, family: str, name: str, value: Any
) -> None:
    model = models(family)
    config = copy.deepcopy(model.config)
    setattr(config, name, value)
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    with tqai.patched(model, **SEALING), tqai.patched(other, **SEALING):
        cache = filled(model, tqai.new_cache(model), make_ids(1, 120))
        tqai.save_cache(cache, tmp_path / "prompt")
        with pytest.raises(ValueError, match=f"{name} {value}, not .*read the prompt again"):
            tqai.load_cache(tmp_path / "prompt", other)
        with pytest.raises(ValueError, match=f"{name} {value}, not .*read the text again"):
            read_on(other, cache)
        read_on(model, tqai.load_cache(tmp_path / "prompt", model))
