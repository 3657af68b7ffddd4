from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
from conftest import Models, make_ids, make_model
from tqai.transformers.model.find_rope import find_ropes
from tqai.transformers.model.geometry import decoder_of, geometry_of
from tqai.transformers.model.shadow import shadow_of


def state(model: Any) -> list[dict[str, Any]]:
    """All attributes of all modules, by identity."""
    return [
        {name: id(value) for name, value in vars(module).items() if name != "training"}
        | {"training": module.training}
        | {name: id(value) for name, value in module.named_parameters(recurse=False)}
        | {name: id(value) for name, value in module.named_buffers(recurse=False)}
        for module in model.modules()
    ]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "falcon", "gemma2"])
def test_a_shadow_computes_the_same_on_the_same_weights(family: str, models: Models) -> None:
    model, ids = models(family), make_ids()
    before = state(model)
    shadow = shadow_of(model)
    with torch.no_grad():
        assert torch.equal(shadow(ids).logits, model(ids).logits)
    assert type(shadow) is type(model) and shadow.model if hasattr(model, "model") else True
    for ours, theirs in zip(shadow.parameters(), model.parameters(), strict=True):
        assert ours is theirs
    assert not {id(module) for module in shadow.modules()} & {id(m) for m in model.modules()}
    assert state(model) == before


def test_patching_runs_no_hooks_and_changes_no_flags() -> None:
    model = make_model().train()
    model.model.layers[0].eval()
    called: list[Any] = []
    for module in model.modules():
        module.register_forward_hook(lambda *given: called.append(given))
        module.register_forward_pre_hook(lambda *given: called.append(given))
    for module in (model.model.layers[1], model.model.layers[1].self_attn):  # as libraries do
        module.forward = module.forward
    flags = [module.training for module in model.modules()]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    tqai.patch(model)
    assert torch.equal(torch.rand(1), expected)
    assert geometry_of(model).ropes[1] is not None
    assert [module.training for module in model.modules()] == flags and not called


@pytest.mark.parametrize("kind", ["disk", "cpu"])
@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("qwen3", {}), ("gemma2", {}), ("gpt_oss", {})]
)
def test_offloaded_weights_are_not_read(
    kind: str, family: str, options: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_model(family, **options)
    expected = geometry_of(model).ropes
    assert expected[0] is not None
    cpu = torch.device("cpu")
    if kind == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device=cpu)
    else:
        accelerate.cpu_offload(model, execution_device=cpu)
    reads: list[str] = []
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights is not None:
            read = type(weights).__getitem__
            monkeypatch.setattr(
                type(weights),
                "__getitem__",
                lambda self, name, read=read: reads.append(name) or read(self, name),
            )
            break
    decoder = decoder_of(model)
    assert find_ropes(decoder, model.config, len(expected)) == expected
    assert not reads
    with torch.no_grad():
        assert torch.isfinite(model(make_ids()).logits).all()
    assert reads


def test_what_lacks_memory_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()

    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as lacking:
        lacking.setattr(type(model.model), "forward", fails)
        with pytest.raises(torch.OutOfMemoryError):
            tqai.patch(model)
    assert tqai.patch(model).memory_report()["rotary"] == {"half_split": 2}
