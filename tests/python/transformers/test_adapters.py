"""Caches of models with adapters: which ones are on is part of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
from caches import SEALING, filled
from conftest import make_ids, make_model
from tqai.transformers.model.geometry import geometry_of

peft = pytest.importorskip("peft")


def lora(seed: int, **options: Any) -> Callable[[], Any]:
    torch.manual_seed(seed)
    settings = {"r": 4, "target_modules": ["q_proj", "k_proj", "embed_tokens"], **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)


def with_adapters(*names: str) -> Any:
    model = peft.get_peft_model(make_model(), lora(1), adapter_name=names[0])
    for seed, name in enumerate(names[1:]):
        model.add_adapter(name, lora(seed + 2))
    return model.eval()


def identity(model: Any) -> str:
    return geometry_of(model.get_base_model()).identity


def read(model: Any, cache: Any, tokens: int = 1) -> Any:
    return filled(model, cache, make_ids(1, tokens))


def switch(model: Any) -> None:
    model.set_adapter("b")


def merge(model: Any) -> None:
    model.merge_adapter()


def disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def scale(model: Any) -> None:
    model.get_base_model().model.layers[1].self_attn.k_proj.scale_layer(0.5)


def train(model: Any) -> None:
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.k_proj.lora_B["a"].weight[3, 1] += 1


def both(model: Any) -> None:
    model.base_model.set_adapter(["a", "b"])


def delete(model: Any) -> None:
    model.delete_adapter("a")
    model.set_adapter("b")


@pytest.mark.parametrize(
    "change", [switch, merge, disable, scale, train, both, delete], ids=lambda f: f.__name__
)
def test_a_cache_goes_with_the_adapters_that_are_on(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    model = with_adapters("a", "b")
    base = model.get_base_model()
    cache = read(model, tqai.patch(base, **SEALING), 100)
    unsaved = read(model, tqai.new_cache(base), 100)
    tqai.save_cache(cache, tmp_path / "f")
    change(model)
    for each in (cache, unsaved):
        with pytest.raises(ValueError, match="have changed since.*another adapter"):
            read(model, each)
    with pytest.raises(ValueError, match="with other adapters"):
        tqai.load_cache(tmp_path / "f", base)


def test_caches_of_adapters_that_are_switched_back_and_forth() -> None:
    """No weight is read for that: nothing was saved."""
    model = with_adapters("a", "b")
    base = model.get_base_model()
    tqai.patch(base, **SEALING)
    caches = {}
    for _ in range(2):
        for name in ("a", "b"):
            model.set_adapter(name)
            caches[name] = read(model, caches.get(name, tqai.new_cache(base)), 40)
        with model.disable_adapter():
            caches["none"] = read(model, caches.get("none", tqai.new_cache(base)), 40)
    for name, other in (("a", "b"), ("b", "none"), ("b", "a")):
        model.set_adapter(name)
        with pytest.raises(ValueError, match="have changed"):
            read(model, caches[other])


def test_adapters_that_are_not_on_do_not_count(tmp_path: Path) -> None:
    plain, model = make_model(), with_adapters("a")
    base = model.get_base_model()
    cache = read(model, tqai.patch(base, **SEALING), 100)
    tqai.save_cache(cache, tmp_path / "f")
    model.add_adapter("c", lora(9))
    read(model, cache)
    tqai.load_cache(tmp_path / "f", base)
    with torch.no_grad():
        base.model.layers[0].self_attn.k_proj.lora_B["c"].weight += 1
    read(model, cache)
    with model.disable_adapter():
        assert identity(model) == geometry_of(plain).identity


def test_an_adapter_s_name_does_not_count() -> None:
    assert identity(with_adapters("a")) == identity(with_adapters("x"))
    both_ways = with_adapters("a", "b"), with_adapters("x", "y")
    for model, name in zip(both_ways, ("b", "y"), strict=True):
        model.set_adapter(name)
    assert identity(both_ways[0]) == identity(both_ways[1]) != identity(with_adapters("a"))


def test_a_merged_adapter_is_the_model_that_it_makes() -> None:
    merged, unloaded = with_adapters("a"), with_adapters("a")
    merged.merge_adapter()
    assert identity(merged) == geometry_of(unloaded.merge_and_unload()).identity


def test_a_base_s_cache_is_good_under_an_adapter_that_is_off() -> None:
    model = make_model()
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(1, 100))
    wrapped = peft.get_peft_model(model, lora(1)).eval()
    with wrapped.disable_adapter():
        read(wrapped, cache)
    with pytest.raises(ValueError, match="have changed"):
        read(wrapped, cache)


def test_adapters_of_transformers_own(tmp_path: Path) -> None:
    model = make_model()
    try:
        model.add_adapter(lora(1), adapter_name="a")
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))
    model.add_adapter(lora(2), adapter_name="b")
    model.set_adapter("a")
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(1, 100))
    tqai.save_cache(cache, tmp_path / "f")
    model.set_adapter("b")
    with pytest.raises(ValueError, match="have changed"):
        read(model, cache)
    model.disable_adapters()
    with pytest.raises(ValueError, match="with other adapters"):
        tqai.load_cache(tmp_path / "f", model)
    model.enable_adapters()
    model.set_adapter("a")
    read(model, cache)
    read(model, tqai.load_cache(tmp_path / "f", model))


@pytest.mark.parametrize(
    "settings",
    [
        lora(1, use_dora=True, target_modules=["q_proj", "k_proj"]),
        lora(1, modules_to_save=["k_proj"], target_modules=["q_proj"]),
        lora(1, trainable_token_indices=[70, 71], target_modules=["q_proj"]),
        peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]),
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
        peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
    ],
    ids=["dora", "modules_to_save", "tokens", "ia3", "norms", "prompt", "vera"],
)
def test_every_kind_of_adapter(settings: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(make_model(), settings).eval()
    base = model.get_base_model()
    cache = read(model, tqai.patch(base, **SEALING), 100)
    tqai.save_cache(cache, tmp_path / "f")
    read(model, tqai.load_cache(tmp_path / "f", base))
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.requires_grad:
                parameter += 1
    with pytest.raises(ValueError, match="have changed"):
        read(model, cache)
    with pytest.raises(ValueError, match="other weights"):
        tqai.load_cache(tmp_path / "f", base)
    with model.disable_adapter():
        assert identity(model) == geometry_of(make_model()).identity


def test_each_adapter_has_bases_of_its_own() -> None:
    model = with_adapters("a", "b")
    base = model.get_base_model()

    def ids() -> list[int]:
        return [layer.basis.id for layer in tqai.patch(base, codec="adaptive").layers]

    first = ids()
    switch(model)
    assert not set(ids()) & set(first)
    model.set_adapter("a")
    assert ids() == first
