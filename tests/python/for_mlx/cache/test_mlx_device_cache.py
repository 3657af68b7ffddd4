"""Compressed caches where mlx does not compute on the CPU: the device store through the whole seam.

Tests have no other device, so backend="mlx-ops" takes its place. With TQAI_TEST_BACKEND=mlx-ops all
tests of mlx go this way.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from small_mlx import (
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
import tqai
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache, trim_prompt_cache
from tqai import _core
from tqai.mlx.cache import store
from tqai.settings import Settings
from tqai.stores.for_mlx import MlxStore
from tqai.stores.for_mlx.operations import MlxOperations

SEALING = {"residual_window": 32}
DEVICE: dict[str, Any] = {**SEALING, "backend": "mlx-ops"}


def greedy(model: Any, prompt: Any, count: int = 20, **options: Any) -> list[int]:
    return [int(token) for token, _ in generate_step(prompt, model, max_tokens=count, **options)]


def cores(cache: Any) -> set[type]:
    return {type(layer.core) for layer in cache}


@compiled_alone
def test_the_default_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, native in ((mx.cpu, True), (mx.gpu, False)):
        monkeypatch.setattr(mx, "default_device", lambda kind=kind: mx.Device(kind))
        assert store.is_native("auto") == native and not store.is_native("mlx-ops")
        assert MlxOperations().wide == (mx.float64 if native else mx.float32)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "float16"),
        ("qwen2", "bfloat16"),
        ("gemma2", "float32"),
        ("gemma3", "bfloat16"),
        ("gpt_oss", "float32"),
    ],
)
def test_logits_are_those_of_the_compiled_cache(family: str, dtype: str) -> None:
    changes = {"query_pre_attn_scalar": 16} if family == "gemma2" else {}
    model = make_model(family, getattr(mx, dtype), **changes)
    text = tokens(370)
    caches, logits = [], []
    for settings in (SEALING, DEVICE):
        caches.append(tqai.patch(model, **settings))
        logits.append(read(model, caches[-1], text, [300, 64]))
    assert cores(caches[1]) == {MlxStore}
    reports = [cache.memory_report() for cache in caches]
    assert reports[1]["packed_bytes"] == reports[0]["packed_bytes"] > 0
    assert reports[1]["centering"] == reports[0]["centering"]
    assert reports[1]["dequantised"] == []
    assert error(logits[1], logits[0]) < 0.02  # the kernels' integer products


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generators(family: str) -> None:
    """Everything in the window: the tokens are the plain cache's."""
    model, draft = make_model(family), make_model("llama", num_hidden_layers=1)
    prompt = tokens(100)[0]
    expected = greedy(model, prompt)
    exact = {"residual_window": 1024, "backend": "mlx-ops"}
    cache = tqai.patch(model, **exact)
    assert greedy(model, prompt, prefill_step_size=64, prompt_cache=cache) == expected
    assert cores(cache) == {MlxStore}
    both = tqai.new_cache(model) + plain_cache(draft)
    steps = speculative_generate_step(
        prompt, model, draft, max_tokens=20, num_draft_tokens=3, prompt_cache=both
    )
    assert [int(token) for token, _, _ in steps] == expected


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_batches(family: str) -> None:
    """A row gets the tokens that it gets alone, and rows come and go."""
    model = make_model(family)
    tqai.patch(model, **DEVICE)
    prompts = [tokens(length)[0].tolist() for length in (250, 90, 170)]
    alone = [greedy(model, mx.array(prompt), 12) for prompt in prompts]
    generator = BatchGenerator(model, completion_batch_size=2, prefill_batch_size=2)
    ids = generator.insert(prompts, max_tokens=[12] * 3)
    given: dict[int, list[int]] = {each: [] for each in ids}
    while responses := generator.next_generated():
        for each in responses:
            given[each.uid].append(int(each.token))
    assert [given[each] for each in ids] == alone


@pytest.mark.parametrize("wrote", ["auto", "mlx-ops"])
@pytest.mark.parametrize("read_by", ["auto", "mlx-ops"])
def test_files_are_the_same(wrote: str, read_by: str, tmp_path: Path) -> None:
    model = make_model("gemma3")
    cache = tqai.patch(model, **SEALING, backend=wrote)
    read(model, cache, tokens(300), [300])
    # What is loaded goes by the settings that the file has.
    for layer in cache:
        layer.settings = Settings(**SEALING, backend=read_by)
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, cache)
    loaded = load_prompt_cache(path)
    native = store.is_native(read_by)
    assert cores(loaded) == {_core.KvCache if native else MlxStore}
    steps = [model(mx.array([[7]]), cache=each) for each in (cache, loaded)]
    assert error(steps[1], steps[0]) < (1e-5 if cores(cache) == cores(loaded) else 0.02)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_trim_and_copies(family: str) -> None:
    model = make_model(family)
    cache = tqai.patch(model, **DEVICE)
    read(model, cache, tokens(140), [140])
    twin = copy.deepcopy(cache)
    expected = model(mx.array([[5]]), cache=twin)
    more = read(model, cache, tokens(3), [3])
    assert trim_prompt_cache(cache, 3) == 3
    assert error(model(mx.array([[5]]), cache=cache), expected) < 1e-5
    assert trim_prompt_cache(cache, 1) == 1
    assert error(read(model, cache, tokens(3), [3]), more) < 1e-5


def test_what_has_left_a_sliding_window_is_freed() -> None:
    model = make_model("gemma3")
    cache = tqai.patch(model, **DEVICE)
    sizes = []
    for part in (400, 300, 70, 1):
        read(model, cache, tokens(part), [part])
        sizes.append(cache[0].nbytes)
    assert cache[0].shape.max_size == 150 and cache[1].shape.max_size is None
    assert max(sizes) - min(sizes) < cache[0].core.memory()["uncompressed_bytes"] / 4
    assert cache[0].core.first_token > 500


def test_a_decoding_step_is_put_off_whole() -> None:
    """mlx lets nothing be computed while it traces a function."""

    class TracedError(Exception):
        """The whole step was traced."""

    model = make_model("gpt_oss")
    cache = tqai.patch(model, **DEVICE)
    read(model, cache, tokens(300), [300])

    def step(token: Any) -> Any:
        model(token, cache=cache)
        raise TracedError

    with pytest.raises(TracedError):
        mx.compile(step)(mx.array([[7]]))


def test_what_is_no_number_is_found() -> None:
    """Of several tokens at once before they are held, of single ones when they are sealed."""
    model = make_model("llama")
    cache = tqai.patch(model, **DEVICE)
    read(model, cache, tokens(100), [100])
    layer = cache[0]
    keys = mx.ones((1, 2, 2, 16))
    layer.update_and_fetch(keys * float("nan"), keys)
    with pytest.raises(ValueError, match=r"layer 0: keys\[0, 0\] of token 100 holds NaN"):
        layer.flush()
    assert layer.offset == 100
    layer.update_and_fetch(keys[:, :, :1] * float("nan"), keys[:, :, :1])
    layer.update_and_fetch(mx.ones((1, 2, 70, 16)), mx.ones((1, 2, 70, 16)))
    with pytest.raises(ValueError, match=r"layer 0: keys\[0, 0\] of token 100 holds NaN"):
        layer.settle()


def test_the_other_framework_s_operations_are_refused() -> None:
    model = make_model("llama")
    with pytest.raises(NotImplementedError, match="'torch-ops' is for transformers.*'mlx-ops'"):
        tqai.patch(model, backend="torch-ops")
    keys = _core.KvCache(batch=1, kv_heads=2, head_dim=16, value_head_dim=16)
    assert isinstance(
        store.read(mx.array(bytearray(keys.serialize())), Settings(**DEVICE)), MlxStore
    )


def test_a_cache_is_read_dequantised_when_its_model_is_no_longer_patched() -> None:
    model = make_model("llama")
    text = tokens(90)
    expected = read(model, make_prompt_cache(model), text, [40])
    cache = tqai.patch(model, residual_window=1024, backend="mlx-ops")
    tqai.unpatch(model)
    assert error(read(model, cache, text, [40]), expected) < 1e-5
