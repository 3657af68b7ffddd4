from __future__ import annotations

from pathlib import Path

import pytest
import torch
import tqai
from caches import SEALING
from conftest import Models, make_ids, make_model
from tqai.transformers.model.devices import device_of, layer_device

CPU, META = torch.device("cpu"), torch.device("meta")


class Decoder(torch.nn.Module):
    """Layers of one weight each, on the devices given."""

    def __init__(self, *devices: torch.device) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(2, 2, bias=False, device=device) for device in devices
        )


def test_weights_that_are_nowhere_do_not_count() -> None:
    assert device_of(Decoder(META, CPU)) == CPU
    assert device_of(Decoder(META, META)) == CPU
    assert device_of(torch.nn.Module()) == CPU


def test_each_layer_has_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(CPU, META, CPU)
    assert [layer_device(decoder, index) for index in range(3)] == [CPU, CPU, CPU]
    # Another device with weights in it is not to be had here: the first layer's stands for it.
    wanted = torch.device("cuda", 1)
    names = [("layers.0.weight", wanted), ("layers.10.weight", CPU), ("layers.1.weight", CPU)]

    class Weight:
        def __init__(self, device: torch.device, size: int = 4) -> None:
            self.device, self.numel = device, lambda: size

    weights = [(name, Weight(device)) for name, device in names]
    weights.insert(0, ("layers.0.gain", Weight(CPU, 1)))  # a small one that was left behind
    monkeypatch.setattr(decoder, "named_parameters", lambda: iter(weights))
    assert [layer_device(decoder, index) for index in (0, 1, 10)] == [wanted, CPU, CPU]


def test_an_offloaded_layer_is_where_it_is_run() -> None:
    """Another device is not to be had here; nothing is run."""
    hooks = pytest.importorskip("accelerate.hooks")
    decoder = Decoder(CPU, META, META)
    hook = hooks.AlignDevicesHook(execution_device=torch.device("cuda", 1), offload=True)
    decoder.layers[1]._hf_hook = hook
    decoder.layers[2]._hf_hook = hooks.SequentialHook(hooks.ModelHook(), hook)
    devices = [layer_device(decoder, index) for index in range(3)]
    assert devices == [CPU, torch.device("cuda", 1), torch.device("cuda", 1)]


@pytest.mark.parametrize("backend", ["auto", "torch-ops"])
def test_a_model_on_the_disk(backend: str, models: Models, tmp_path: Path) -> None:
    """accelerate reads each layer's weights when it is run."""
    accelerate = pytest.importorskip("accelerate")
    model, offloaded = make_model("llama"), make_model("llama")
    offloaded.load_state_dict(model.state_dict())
    accelerate.disk_offload(offloaded, tmp_path / "weights", execution_device=CPU)
    assert all(parameter.device == META for parameter in offloaded.parameters())
    ids, outputs = make_ids(2, 300), []
    for each in (model, offloaded):
        cache = tqai.patch(each, **SEALING, backend=backend)
        outputs.append(each.generate(ids, past_key_values=cache, max_new_tokens=20))
    assert torch.equal(*outputs)
    report = cache.memory_report()
    assert report["packed_tokens"] > 0 and report["rotary"] == {"half_split": 2}
    tqai.save_cache(cache, tmp_path / "cache")
    assert tqai.load_cache(tmp_path / "cache", offloaded).get_seq_length() == 319


def test_the_default_device_makes_no_difference(models: Models, tmp_path: Path) -> None:
    """As for those who have ``torch.set_default_device("cuda")`` and a model on the CPU."""
    model, ids, one = models(), make_ids(2, 200), make_ids(1, 1)

    def logits() -> torch.Tensor:
        cache = tqai.patch(model, **SEALING)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            cache.reorder_cache(torch.tensor([1, 0], device="cpu"))
            cache.batch_select_indices(torch.tensor([0], device="cpu"))
            tqai.save_cache(cache, tmp_path / "cache.safetensors")
            cache = tqai.load_cache(tmp_path / "cache.safetensors", model)
            result = model(one, past_key_values=cache).logits
        tqai.unpatch(model)
        return result

    expected = logits()
    with META:  # what is made there by itself cannot be used here
        assert torch.equal(logits(), expected)
