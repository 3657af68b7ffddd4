"""``tqai.patch`` and what goes with it, for mlx-lm's models."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from pathlib import Path

import pytest
from small_mlx import (
    FAMILIES,
    compiled_alone,
    error,
    make_model,
    make_prompt_cache,
    mx,
    plain_cache,
    read,
    tokens,
)

# isort: split
import mlx.nn as nn
import tqai
from mlx_lm.models import base, llama
from mlx_lm.models.cache import KVCache
from tqai.mlx.attention import functions

TEXT = 400


@pytest.mark.parametrize("family", FAMILIES)
def test_all_in_the_window_is_as_uncompressed(family: str) -> None:
    model = make_model(family)
    text = tokens(TEXT)
    expected = read(model, plain_cache(model), text, [130, 70, 170])
    cache = tqai.patch(model, residual_window=1024)
    given = read(model, cache, text, [130, 70, 170])
    if any(layer.max_size for layer in cache):
        assert error(given, expected) < 1e-6  # a rotating cache adds up in another order
    else:
        assert mx.array_equal(given, expected)
    report = cache.memory_report()
    assert report["tokens"] == TEXT and report["packed_tokens"] == 0


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, mx.float32) for family in FAMILIES), ("qwen3", mx.float16), ("llama", mx.bfloat16)],
    ids=str,
)
def test_sealed_tokens_are_read_within_a_bound(family: str, dtype: object) -> None:
    model = make_model(family, dtype)
    text = tokens(TEXT)
    expected = read(model, plain_cache(model), text, [130, 70, 170])
    errors = []
    for bits in (8, 4, 2):
        cache = tqai.patch(model, bits_k=bits, bits_v=bits, residual_window=32)
        errors.append(error(read(model, cache, text, [130, 70, 170]), expected))
        report = cache.memory_report()
        assert report["packed_tokens"] >= 256 and report["total_bytes"] == sum(
            layer.nbytes for layer in cache
        )
    assert errors[0] < 0.06 and errors[0] < errors[1] < errors[2] < 0.6


def test_rows_are_read_together() -> None:
    model = make_model("llama")
    text = tokens(300, rows=3)
    together = read(model, tqai.patch(model), text, [250])
    for row in range(3):
        alone = read(model, tqai.new_cache(model), text[row : row + 1], [250])
        assert error(together[row : row + 1], alone) < 1e-5


def test_it_is_put_on_and_taken_off() -> None:
    model = make_model("llama")
    text = tokens(50)
    expected = read(model, plain_cache(model), text, [40])
    original = base.scaled_dot_product_attention
    assert not tqai.is_patched(model)
    cache = tqai.patch(model, preset="small")
    assert tqai.is_patched(model) and not tqai.is_patched(make_model("llama"))
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention is not original
    assert type(make_prompt_cache(model)) is type(cache)
    settings = make_prompt_cache(model).memory_report()["settings"]
    assert (settings["bits_k"], settings["codec"]) == (2, "trellis")  # no bases here
    tqai.unpatch(model)
    assert not tqai.is_patched(model) and "make_cache" not in vars(model)
    assert llama.scaled_dot_product_attention is base.scaled_dot_product_attention is original
    assert type(make_prompt_cache(model)[0]) is KVCache
    assert mx.array_equal(read(model, make_prompt_cache(model), text, [40]), expected)
    with pytest.raises(ValueError, match="not patched"):
        tqai.unpatch(model)


def test_attention_stays_while_another_model_is_patched() -> None:
    one, other = make_model("llama"), make_model("qwen2")
    original = base.scaled_dot_product_attention
    tqai.patch(one)
    tqai.patch(other)
    tqai.unpatch(one)
    assert base.scaled_dot_product_attention is not original
    tqai.unpatch(other)
    assert base.scaled_dot_product_attention is original


def test_patched_gives_settings_back() -> None:
    model = make_model("llama")
    tqai.patch(model, bits_k=3)
    with tqai.patched(model, bits_k=5) as cache:
        assert cache.settings.bits_k == 5
    assert tqai.new_cache(model).settings.bits_k == 3
    tqai.unpatch(model)
    with pytest.raises(RuntimeError, match="inside"), tqai.patched(model):
        raise RuntimeError("inside")
    assert not tqai.is_patched(model)


def test_a_cache_goes_on_after_unpatch() -> None:
    """Dequantised then: mlx-lm's own attention reads arrays."""
    model = make_model("llama")
    text = tokens(300)
    cache = tqai.patch(model)
    read(model, cache, text[:, :280], [280])
    forked = copy.deepcopy(cache)
    packed = read(model, cache, text[:, 280:], [5])
    tqai.unpatch(model)
    assert error(read(model, forked, text[:, 280:], [5]), packed) < 0.02


def test_layers_have_their_own_settings() -> None:
    model = make_model("llama", num_hidden_layers=3)
    cache = tqai.patch(model, bits_k={0: 8, -1: 2}, skip_layers=[1])
    assert type(cache[1]) is KVCache
    assert [cache[layer].settings.bits_k for layer in (0, 2)] == [8, 2]
    text = tokens(300)
    tqai.unpatch(model)
    expected = read(model, plain_cache(model), text, [280])
    tqai.patch(model)
    assert error(read(model, cache, text, [280]), expected) < 0.6
    report = cache.memory_report()
    assert report["layers"][1]["packed_tokens"] == 0 < report["layers"][0]["packed_tokens"]


def test_sliding_layers_share_masks_with_exact_ones() -> None:
    """Models make one mask for all layers of a kind, of the first one's cache."""
    model = make_model("gemma3", num_hidden_layers=6, sliding_window_pattern=3)
    text = tokens(TEXT)
    expected = read(model, plain_cache(model), text, [130, 70, 170])
    errors = []
    for skipped in ([], [0], [1], [3], [2], [0, 1, 3, 4], [2, 5]):
        cache = tqai.patch(model, bits_k=8, bits_v=8, residual_window=32, skip_layers=skipped)
        errors.append(error(read(model, cache, text, [130, 70, 170]), expected))
    assert max(errors) < 1.1 * errors[0] < 0.1


@pytest.mark.parametrize(
    ("options", "kind", "what"),
    [
        ({"bits_k": 9}, ValueError, "bits_k=9: expected an integer from 1 to 8"),
        ({"bitsk": 4}, TypeError, "did you mean 'bits_k'"),
        ({"skip_layers": [2]}, ValueError, "the model's cache has 2 layers"),
        ({"bits_v": [4]}, ValueError, "bits_v has 1 entries"),
        ({"backend": "torch-ops"}, NotImplementedError, "backend='torch-ops' is for transformers"),
        ({"codec": "adaptive"}, NotImplementedError, "codec='adaptive' is for transformers models"),
        ({"exact_prefill": False}, NotImplementedError, "prefill_step_size=64"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict, kind: type, what: str) -> None:
    model = make_model("llama")
    with pytest.raises(kind, match=what):
        tqai.patch(model, **options)
    assert not tqai.is_patched(model)


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(ValueError, match="neither make_cache"):
        tqai.patch(nn.Linear(2, 2))


def test_a_size_that_would_not_be_kept_is_refused() -> None:
    model = make_model("qwen2")
    with tqai.patched(model), pytest.raises(NotImplementedError, match="max_kv_size=64"):
        make_prompt_cache(model, max_kv_size=64)
    assert make_prompt_cache(model, max_kv_size=64)[0].max_size == 64


def test_kv_bits_are_refused() -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match="kv_bits=4"):
        tqai.patch(model)[0].to_quantized(bits=4)


def test_modules_that_are_imported_later_call_ours() -> None:
    """And tqai alone imports neither torch nor mlx, and mlx's seam needs no torch; in a process in
    which that is really so."""
    code = """
import sys
from pathlib import Path
import tqai
assert not tqai.is_patched(object()) and not {"torch", "mlx", "mlx_lm"} & set(sys.modules)
sys.modules["torch"] = None  # as where it is not installed
from small_mlx import make_model
model = make_model("llama")
tqai.patch(model)
from mlx_lm.models import qwen2, base
assert qwen2.scaled_dot_product_attention.__module__.startswith("tqai.mlx")
"""
    folder = str(Path(__file__).parents[1])
    path = f"import sys; sys.path[:0] = {[folder, *filter(None, sys.path)]!r}\n"
    subprocess.run([sys.executable, "-c", path + code], check=True)


def test_a_copy_is_patched_as_long_as_it_is_there() -> None:
    model = make_model("llama")
    tqai.patch(model, residual_window=16)
    twin = copy.deepcopy(model)
    for _ in range(2):
        cache = make_prompt_cache(twin)
        read(twin, cache, tokens(TEXT), [TEXT - 1, 1])
        assert functions.is_installed()
        assert cache.memory_report()["dequantised"] == []
        if tqai.is_patched(model):
            tqai.unpatch(model)
    del model
    gc.collect()
    assert tqai.is_patched(twin) and functions.is_installed()
    tqai.unpatch(twin)
    assert not functions.is_installed()
    assert type(make_prompt_cache(twin)[0]) is KVCache


@compiled_alone
def test_gradients_by_way_of_a_cache_are_an_error() -> None:
    model, text = make_model("llama"), tokens(20)

    def gradients(cache: object) -> object:
        mx.eval(model(tokens(300), cache=cache))

        def loss(model: nn.Module) -> mx.array:
            output = model(text, cache=cache)
            return nn.losses.cross_entropy(output[:, :-1], text[:, 1:]).mean()

        return nn.value_and_grad(model, loss)(model)[1]["model"]["layers"][0]["self_attn"]

    expected = gradients(plain_cache(model))
    for window in (16, 1024):  # some of it packed, and nothing
        cache = tqai.patch(model, bits_k=8, bits_v=8, residual_window=window)
        with pytest.raises(NotImplementedError, match="gradients do not flow"):
            gradients(cache)
    got = gradients(tqai.patch(model, bits_k=8, bits_v=8, residual_window=16, backend="mlx-ops"))
    for name in ("q_proj", "k_proj", "v_proj"):
        assert error(got[name]["weight"], expected[name]["weight"]) < 0.05


def test_a_model_that_is_gone_leaves_nothing_behind() -> None:
    original = base.scaled_dot_product_attention
    model = make_model("llama")
    tqai.patch(model)
    assert base.scaled_dot_product_attention is not original
    del model
    gc.collect()
    assert base.scaled_dot_product_attention is original
