"""What is said of a model from its configuration alone, against what the model then does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tqai
import transformers
from conftest import FAMILIES, SMALL, make_ids, make_model
from tqai.settings import Settings
from tqai.transformers.attention import functions as attention
from tqai.transformers.attention_paths import attention_paths
from tqai.transformers.model.names import cache_argument
from tqai.transformers.model.other_layers import HYBRIDS


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_model_does(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    said = attention_paths(model.config, Settings(skip_layers=[0]))
    assert torch.equal(torch.random.get_rng_state(), before)

    kernels: set[int] = set()
    attend = attention._attend_packed

    def note(query: Any, update: Any, arguments: Any) -> Any:
        kernels.add(update.layer.index)
        return attend(query, update, arguments)

    monkeypatch.setattr(attention, "_attend_packed", note)
    cache = tqai.patch(model, residual_window=0, sink_tokens=0, skip_layers=[0])
    with torch.no_grad():
        for count in (64, 1):
            model(make_ids(1, count), **cache_argument(model, cache))
    assert said == ["exact", "kernel" if 1 in kernels else "dequantised"]


def test_a_large_model_takes_no_memory() -> None:
    """Were its weights made, this would take 2 TB."""
    config = transformers.MixtralConfig(
        hidden_size=16384, num_attention_heads=128, num_local_experts=64, num_hidden_layers=3
    )
    assert attention_paths(config, Settings()) == ["kernel"] * 3


@pytest.mark.skipif(not HYBRIDS, reason="this transformers has a cache of its own for them")
def test_recurrent_layers() -> None:
    config = transformers.Lfm2Config(
        **{**SMALL, "num_hidden_layers": 3}, layer_types=["conv", "full_attention", "conv"]
    )
    assert attention_paths(config, Settings()) == ["recurrent", "kernel", "recurrent"]


def test_a_model_that_cannot_be_tried() -> None:
    class Broken(transformers.LlamaConfig):
        model_type = "broken"

    with pytest.raises(RuntimeError, match="Broken: Unrecognized configuration class"):
        attention_paths(Broken(**SMALL), Settings())
    mamba = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="no causal attention layers"):
        attention_paths(mamba, Settings())
