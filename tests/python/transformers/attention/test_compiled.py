"""``torch.compile`` of patched models: whole graphs, the same tokens."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import tqai
from caches import SEALING
from conftest import TRANSFORMERS_4, Models, make_ids, make_model
from torch._dynamo.utils import counters
from tqai import _core
from tqai.transformers.attention.original import PATCHED_NAMES, patched_name
from tqai.transformers.cache.layer import TqaiLayer


def _looks_names_up() -> bool:
    """Whether Dynamo traces what transformers does with the name of an attention."""
    name = patched_name("sdpa")
    table = {PATCHED_NAMES["sdpa"]: 1.0}
    try:
        traced = torch.compile(lambda x: x * table[name], backend="eager", fullgraph=True)
        return traced(torch.ones(1)).item() == 1.0
    except torch._dynamo.exc.Unsupported:
        return False


pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(TRANSFORMERS_4, reason="with transformers 4 graphs break"),
    pytest.mark.skipif(
        not TRANSFORMERS_4 and torch.__version__ < "2.13" and not _looks_names_up(),
        reason=f"with torch {torch.__version__} graphs break",
    ),
]
PROMPT = 100


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    """Compiles a model's forward, until the test is over."""
    models: list[Any] = []

    def compile_forward(model: Any, **options: Any) -> Any:
        options = {"backend": "eager", "fullgraph": True, **options}
        model.forward = torch.compile(model.forward, **options)
        models.append(model)
        return model

    yield compile_forward
    for model in models:
        vars(model).pop("forward", None)


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def tokens(model: Any, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 1000, **options}
    return model.generate(make_ids(2, PROMPT), pad_token_id=0, **options)


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("llama", "aot_eager"),
        ("gemma2", "eager"),
        ("mistral", "eager"),
        ("diffllama", "aot_eager"),
    ],
)
def test_a_step_is_one_graph_for_any_length(
    models: Models, compiled: Callable[..., Any], family: str, backend: str
) -> None:
    model = models(family)
    tqai.patch(model, **SEALING)
    expected = tokens(model)
    compiled(model, backend=backend)
    for _ in range(2):
        assert torch.equal(tokens(model), expected)
    assert graphs() == 2  # of the prompt, and of any token


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_attention_reads_codes_once_there_are_some(
    models: Models,
    compiled: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    model = models("llama")
    tqai.patch(model, residual_window=100, sink_tokens=2)
    expected = tokens(model, max_new_tokens=90)
    gathered: list[int] = []
    gather = TqaiLayer.gather

    def counted(layer: TqaiLayer, first: int, length: int) -> Any:
        gathered.append(length)
        return gather(layer, first, length)

    monkeypatch.setattr(TqaiLayer, "gather", counted)
    assert torch.equal(tokens(compiled(model, backend=backend), max_new_tokens=90), expected)
    assert max(gathered) < 170
    assert graphs() <= 4


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {}],
)
def test_features_of_generate(
    models: Models, compiled: Callable[..., Any], options: dict[str, Any]
) -> None:
    model = models("llama")
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :40] = 0
    cache = tqai.patch(model, **SEALING)
    expected = tokens(model, attention_mask=mask, past_key_values=cache, **options)
    again = tqai.new_cache(model)
    got = tokens(compiled(model), attention_mask=mask, past_key_values=again, **options)
    assert torch.equal(got, expected)
    assert [layer.padding for layer in again.layers] == [layer.padding for layer in cache.layers]
    ours, theirs = again.memory_report(), cache.memory_report()
    assert ours["packed_tokens"] == theirs["packed_tokens"] > 0


@pytest.mark.parametrize("skip", [[0]])
def test_layers_that_are_not_compressed(
    models: Models, compiled: Callable[..., Any], skip: list[int]
) -> None:
    model = models("mistral_wide")
    tqai.patch(model, skip_layers=skip, **SEALING)
    expected = tokens(model)
    assert torch.equal(tokens(compiled(model)), expected)
    assert graphs() <= 3


def test_errors_reach_the_caller_and_leave_the_cache(
    compiled: Callable[..., Any],
) -> None:
    model, other = make_model("llama"), make_model("llama", seed=2)
    cache = tqai.patch(model, **SEALING)
    tqai.patch(other)
    ids = make_ids(1, PROMPT)
    compiled(model), compiled(other)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="other weights"):
            other(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="NaN"):
            model(
                inputs_embeds=torch.full((1, 1, 64), float("nan")),
                past_key_values=cache,
            )
        assert [layer.get_seq_length() for layer in cache.layers] == [PROMPT] * 2
        assert model(ids[:, :1], past_key_values=cache).logits.isfinite().all()
        model.lm_head.weight.mul_(1.1)
        model.model.norm.weight.mul_(1.1)
        with pytest.raises(ValueError, match="have changed"):
            model(ids[:, :1], past_key_values=cache)
    tqai.unpatch(model), tqai.unpatch(other)


def test_caches_go_when_they_are_not_used(models: Models, compiled: Callable[..., Any]) -> None:
    model = models("llama")
    tqai.patch(model, **SEALING)
    tokens(compiled(model))
    gc.collect()
    gc.disable()
    try:
        before = _core.allocated_bytes()
        tokens(model)
        assert _core.allocated_bytes() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_only_running_backwards_through_the_past_raises(
    models: Models, compiled: Callable[..., Any], backend: str
) -> None:
    model = models("llama")
    tqai.patch(model, **SEALING)
    compiled(model, backend=backend)
    cache = tqai.new_cache(model)
    model(make_ids(1, PROMPT), past_key_values=cache).logits.sum().backward()
    loss = model(make_ids(1, 1), past_key_values=cache).logits.sum()
    with pytest.raises(RuntimeError, match="not differentiable"):
        loss.backward()
    model.zero_grad()
