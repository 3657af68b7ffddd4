"""Models whose weights are quantised: patched, their caches saved and loaded, told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
from caches import SEALING, assert_equal, filled
from conftest import make_ids, make_model
from tqai.transformers.model.geometry import decoder_of, geometry_of

WIDE = {"hidden_size": 128, "intermediate_size": 128}


def torchao(name: str, **options: Any) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model, getattr(quantization, name)(**options))
        return model

    return quantise


def quanto(bits: int) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        library = pytest.importorskip("optimum.quanto")
        library.quantize(model, weights=getattr(library, f"qint{bits}"))
        library.freeze(model)
        return model

    return quantise


def dynamic(model: Any) -> Any:
    engine = torch.backends.quantized.supported_engines
    if "fbgemm" not in engine and "qnnpack" not in engine:
        pytest.skip("this PyTorch has no engine for dynamic quantisation")
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


KINDS = {
    "int8": torchao("Int8WeightOnlyConfig"),
    "int8, activations too": torchao("Int8DynamicActivationInt8WeightConfig"),
    "intx": torchao("IntxWeightOnlyConfig"),
    "intx, activations too": torchao("Int8DynamicActivationIntxWeightConfig"),
    "float8": torchao("Float8WeightOnlyConfig"),
    "quanto int8": quanto(8),
    "quanto int4": quanto(4),
    "torch dynamic": dynamic,
}


@pytest.fixture(params=KINDS)
def quantise(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return KINDS[request.param]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_generate_save_and_load(
    quantise: Callable[[Any], Any], greedy: dict[str, Any], tmp_path: Path
) -> None:
    model = quantise(make_model(**WIDE))
    ids = make_ids(1, 150)
    plain = model.generate(ids, **greedy)
    tqai.patch(model, residual_window=1000)
    assert torch.equal(model.generate(ids, **greedy), plain)

    cache = tqai.patch(model, **SEALING)
    read = model.generate(ids, past_key_values=cache, **greedy)
    assert cache.memory_report()["packed_tokens"] > 0
    tqai.save_cache(cache, tmp_path / "f")
    again = quantise(make_model(**WIDE))
    tqai.patch(again)
    loaded = tqai.load_cache(tmp_path / "f", again)
    assert_equal(loaded, cache)
    longer = torch.cat([read, make_ids(1, 5, seed=3)], 1)
    expected = model.generate(longer, past_key_values=cache, **greedy)
    assert torch.equal(again.generate(longer, past_key_values=loaded, **greedy), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_weights_are_told_apart(quantise: Callable[[Any], Any], tmp_path: Path) -> None:
    plain, changed = make_model(**WIDE), make_model(**WIDE)
    with torch.no_grad():
        decoder_of(changed).layers[1].self_attn.k_proj.weight[5] += 1
    model, other = quantise(make_model(**WIDE)), quantise(changed)
    identities = [geometry_of(each).identity for each in (model, other, plain)]
    assert len(set(identities)) == 3
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(1, 100))
    tqai.save_cache(cache, tmp_path / "f")
    tqai.patch(other)
    with pytest.raises(ValueError, match=r"other weights \(layers.1.self_attn.k_proj"):
        tqai.load_cache(tmp_path / "f", other)
    # Quantised in place, the same model is another one.
    before = filled(plain, tqai.patch(plain, **SEALING), make_ids(1, 100))
    if quantise(plain) is plain:
        with pytest.raises(ValueError, match="have changed since"):
            filled(plain, before, make_ids(1, 1))


def test_a_quantised_weight_that_is_written_to() -> None:
    model = KINDS["int8"](make_model(**WIDE))
    cache = filled(model, tqai.patch(model, **SEALING), make_ids(1, 100))
    filled(model, cache, make_ids(1, 1))
    with torch.no_grad():
        decoder_of(model).layers[1].self_attn.k_proj.weight.qdata[3] += 1
    with pytest.raises(ValueError, match="have changed since"):
        filled(model, cache, make_ids(1, 1))


def test_bases_are_learnt_from_them(quantise: Callable[[Any], Any]) -> None:
    model = quantise(make_model(**WIDE))
    cache = tqai.patch(model, codec="adaptive", **SEALING)
    assert cache.memory_report()["codecs"] == {"adaptive": 2}
    filled(model, cache, make_ids(1, 200))
    again = filled(model, tqai.new_cache(model), make_ids(1, 200))
    assert cache.memory_report()["packed_tokens"] > 0
    assert_equal(again, cache)
