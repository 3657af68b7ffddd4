"""Keys are centred by the positions that the model turned them by."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
import transformers as hf
from tqai.transformers.model.geometry import decoder_of, geometry_of
from tqai.transformers.model.positions import TurnWatch, rotary_modules
from transformers.cache_utils import DynamicCache

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
SECTIONS = [8, 12, 12]  # of a head of 64
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": SECTIONS}
SETTINGS = {"bits_k": 4, "bits_v": 8, "residual_window": 16, "sink_tokens": 2}


def biased(model: Any) -> Any:
    """`model` with strong key biases, as Qwen2's."""
    torch.manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "k_proj", None) is not None and module.k_proj.bias is not None:
                module.k_proj.bias.normal_(0, 20)
    return model.eval()


def text_model(**config: Any) -> Any:
    torch.manual_seed(3)
    return biased(hf.Qwen2ForCausalLM(hf.Qwen2Config(**{**SHAPE, **config})))


def mrope_model(kind: str) -> Any:
    """The text model of a vision-language model."""
    torch.manual_seed(3)
    config_type = getattr(hf, f"{kind}TextConfig")
    config = config_type(**SHAPE, head_dim=64, rope_scaling=MROPE, attention_bias=True)
    from importlib import import_module

    module = import_module(config_type.__module__.replace("configuration", "modeling"))
    return biased(getattr(module, f"{kind}TextModel")(config))


def image_in_a_text() -> torch.Tensor:
    """[3, 1, 400]: 100 tokens of text, an image of 10 by 10, text."""
    text, image, rest = torch.arange(100), torch.arange(100), 110 + torch.arange(200)
    grid = torch.stack([0 * image, image // 10, image % 10]) + 100
    return torch.cat([text.expand(3, 100), grid, rest.expand(3, 200)], 1)[:, None]


def error_of(model: Any, cache: Any, plain: Any) -> float:
    """Of the keys, of what they vary by; the largest of all layers."""
    errors = []
    for got, expected in zip(cache.layers, plain.layers, strict=True):
        keys = got.keys + 0
        spread = (expected.keys - expected.keys.mean(2, keepdim=True)).square().mean()
        errors.append(float((keys - expected.keys).square().mean() / spread))
    return max(errors)


def read(model: Any, cache: Any, positions: torch.Tensor | None, tokens: int, **more: Any) -> Any:
    ids = torch.randint(3, 120, (1, tokens), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        decoder_of(model)(
            input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **more
        )
    return cache


def both(model: Any, positions: torch.Tensor, **settings: Any) -> tuple[Any, Any]:
    """A compressed cache and a plain one that have read tokens at these positions."""
    plain = DynamicCache(config=model.config.get_text_config())
    tqai.patch(model, **{**SETTINGS, **settings})
    cache = tqai.new_cache(model)
    for each in (cache, plain):
        for start in (0, 250):
            part = positions[..., start : start + 250]
            read(model, each, part, part.shape[-1])
    for layer in cache.layers:
        layer.core.seal()
    assert cache.memory_report()["packed_tokens"] > 256
    return cache, plain


def noise(model: Any) -> float:
    """What the codes alone cost, of ordinary text."""
    return error_of(model, *both(model, torch.arange(400)[None]))


def test_sections_are_found_whatever_the_default_device_is() -> None:
    model = mrope_model("Qwen2_5_VL")
    expected = geometry_of(model).ropes
    assert expected[0].sections
    with torch.device("meta"):
        assert geometry_of(model, afresh=True).ropes == expected


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
@pytest.mark.parametrize("rows", [3, 4])
def test_images_cost_no_more_than_text(kind: str, rows: int) -> None:
    model = mrope_model(kind)
    rope = geometry_of(model).ropes[0]
    assert rope is not None and rope.section_count == 3
    in_turn = rope.sections[:6] == (0, 1, 2, 0, 1, 2)
    assert in_turn == (kind == "Qwen3VL")
    assert in_turn or [rope.sections.count(section) for section in range(3)] == SECTIONS
    usual = error_of(model, *both(model, torch.arange(400).expand(3, 1, 400)))
    positions = image_in_a_text()
    if rows == 4:  # the first is that of the text
        positions = torch.cat([torch.arange(400).expand(1, 1, 400), positions])
    cache, plain = both(model, positions)
    assert error_of(model, cache, plain) < 1.5 * usual
    assert cache.memory_report()["centering"] == {"rope": 4}


@pytest.mark.parametrize("backend", ["auto", "torch-ops"])
def test_jumps_cost_no_more_than_text(backend: str) -> None:
    model = text_model()
    usual = noise(model)
    there = torch.arange(250)
    for jump in (-180, 1000):
        positions = torch.cat([there, there[:150] + 250 + jump])[None]
        assert error_of(model, *both(model, positions, backend=backend)) < 1.5 * usual


def test_pads_between_turns_take_no_position() -> None:
    model = text_model()
    usual = noise(model)
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[0, :100] = mask[0, 250:320] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain = DynamicCache(config=model.config)
    tqai.patch(model, **SETTINGS)
    cache = tqai.new_cache(model)
    ids = torch.randint(3, 120, (2, 400), generator=torch.Generator().manual_seed(5))
    for each in (cache, plain):
        for start, end in ((0, 250), (250, 400)):
            with torch.no_grad():
                model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=each,
                )
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        seen = mask.bool()[:, None, :, None]
        difference = ((ours.keys + 0) - theirs.keys).square() * seen
        spread = (theirs.keys - theirs.keys.mean(2, keepdim=True)).square() * seen
        assert difference.sum() / spread.sum() < 1.5 * usual


def test_stepwise_prefill_and_files_keep_positions(tmp_path: Path) -> None:
    model = mrope_model("Qwen2_5_VL")
    usual = error_of(model, *both(model, torch.arange(400).expand(3, 1, 400)))
    cache, plain = both(model, image_in_a_text(), exact_prefill=False)
    # What later layers get differs by what the codes cost in the first.
    first = error_of(model, *(_first_layer(each) for each in (cache, plain)))
    assert first < 1.5 * usual
    tqai.save_cache(cache, tmp_path / "cache")
    back = tqai.load_cache(tmp_path / "cache", model)
    for each in (cache, back, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(each.layers[0].keys + 0, cache.layers[0].keys + 0)


def _first_layer(cache: Any) -> Any:
    return type("One", (), {"layers": cache.layers[:1]})


def test_a_text_beyond_the_original_length_has_its_own_frequencies(tmp_path: Path) -> None:
    scaling = {"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 128}
    factors = {"short_factor": [1.0] * 32, "long_factor": [1.0 + f / 8 for f in range(32)]}
    config = {"rope_scaling": {**scaling, **factors, "rope_theta": 1e4}}
    model = text_model(**config, original_max_position_embeddings=128)
    short = geometry_of(model).ropes[0]
    assert short is not None and short.changes
    cache, plain = both(model, torch.arange(400)[None])
    assert cache.layers[0].rope.inv_freq != short.inv_freq
    assert error_of(model, cache, plain) < 1.5 * noise(text_model())
    tqai.save_cache(cache, tmp_path / "cache")
    back = tqai.load_cache(tmp_path / "cache", model)
    assert back.layers[0].rope == cache.layers[0].rope


def test_two_threads_do_not_mix() -> None:
    model = text_model()
    usual = noise(model)
    tqai.patch(model, **SETTINGS)
    errors: list[float] = []

    def run(start: int) -> None:
        cache, plain = tqai.new_cache(model), DynamicCache(config=model.config)
        for at in range(0, 400, 50):
            for each in (cache, plain):
                # Each pass stands further back than the last, in each thread elsewhere.
                read(model, each, torch.arange(50)[None] + start - 7 * at, 50)
        errors.append(error_of(model, cache, plain))

    threads = [threading.Thread(target=run, args=(3000 + 91 * i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2 and max(errors) < 1.5 * usual


def _hooks(model: Any) -> int:
    return sum(
        isinstance(hook, TurnWatch)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )


def test_unpatch_takes_the_hooks_off() -> None:
    model = text_model()
    count = len(list(rotary_modules(decoder_of(model))))
    assert count > 0 and _hooks(model) == 0
    tqai.patch(model)
    tqai.patch(model, **SETTINGS)
    assert _hooks(model) == count
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (twin, loaded):
        assert _hooks(other) == count
        cache, plain = both(other, torch.cat([torch.arange(250), torch.arange(40, 190)])[None])
        assert error_of(other, cache, plain) < 1.5 * noise(other)
    tqai.unpatch(model)
    assert _hooks(model) == 0 and not any(
        module._forward_pre_hooks_with_kwargs for module in model.modules()
    )
    assert _hooks(twin) == count


def test_positions_of_another_pass_are_not_taken() -> None:
    model = text_model()
    tqai.patch(model, **SETTINGS)
    cache = read(model, tqai.new_cache(model), torch.arange(500, 550)[None], 50)
    keys = torch.randn(1, 2, 50, 64)
    cache.update(keys, keys, 0)  # of a pass that no hook has seen
    assert cache.layers[0].turned is None
