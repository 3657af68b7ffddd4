"""A patched model among what others do to models: names of attention, copies, other processes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
import transformers
from caches import SEALING, filled
from conftest import TRANSFORMERS_4, make_ids, make_model
from tqai.transformers.attention import functions as attention
from tqai.transformers.attention.original import PatchedName


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Gets an entry for each attention over packed bytes."""
    calls: list[Any] = []
    real = attention._attend_packed

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(attention, "_attend_packed", counted)
    return calls


def is_kernels(model: Any) -> bool:
    return type(model.config._attn_implementation) is PatchedName


# The attention's name.


def test_attention_that_is_chosen_later_gets_the_kernel_too(
    greedy: dict[str, Any], kernel_calls: list[Any]
) -> None:
    model = make_model()
    tqai.patch(model, **SEALING)
    ids = make_ids(tokens=200)
    expected = model.generate(ids, **greedy)
    for choose in (
        lambda: model.set_attn_implementation("eager"),
        lambda: model.set_attn_implementation("sdpa"),
        lambda: setattr(model.config, "_attn_implementation", "eager"),
    ):
        kernel_calls.clear()
        choose()
        assert torch.equal(model.generate(ids, **greedy), expected)
        assert kernel_calls and is_kernels(model)
    tqai.unpatch(model)
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == "eager"


def test_attention_that_tqai_does_not_stand_before_is_refused_later_too() -> None:
    model = make_model()
    tqai.patch(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(NotImplementedError, match="'flex_attention'.*'sdpa' and 'eager'"):
        model(make_ids())
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model(make_ids())


def test_configs_are_used_and_saved_as_before(tmp_path: Path) -> None:
    model = make_model(attn_implementation="eager")
    model.save_pretrained(tmp_path / "plain")
    tqai.patch(model)
    model.config.output_attentions = True
    assert model(make_ids(), output_attentions=True).attentions is not None
    model.save_pretrained(tmp_path / "attentions")
    model.config.output_attentions = False
    model.save_pretrained(tmp_path / "patched")
    plain, patched = (
        (tmp_path / name / "config.json").read_text() for name in ("plain", "patched")
    )
    assert patched == plain and "tqai" not in model.config.to_json_string(use_diff=False)
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert type(config._attn_implementation) is str and config._attn_implementation == "eager"


def gpt2(**options: Any) -> Any:
    fields = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "vocab_size": 128}
    config = transformers.GPT2Config(**fields, attn_implementation="eager", **options)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.08)
    return model


def test_a_formula_that_goes_by_the_name_stays(greedy: dict[str, Any]) -> None:
    """GPT-2 leaves the interface for a function of its own where the name is "eager"."""
    model = gpt2(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True)
    ids = make_ids(tokens=200)
    expected = model.generate(ids, output_logits=True, return_dict_in_generate=True, **greedy)
    cache = tqai.patch(model, residual_window=512)
    got = model.generate(ids, output_logits=True, return_dict_in_generate=True, **greedy)
    assert all(map(torch.equal, got.logits, expected.logits))
    cache = tqai.patch(model, preset="quality", **SEALING)
    model.generate(ids, past_key_values=cache, **greedy)
    assert cache.memory_report()["packed_tokens"] == 128 + 64


EACH_LAYER = [{"bits_k": (8, 4, 4, 4)}, {"skip_layers": [3]}, {"bits_v": {3: 8}}]


@pytest.mark.skipif(TRANSFORMERS_4, reason="no early exit through the decoder's config")
@pytest.mark.parametrize(
    "own", [{"bits_k": (8, 4, 4, 4)}, {"skip_layers": [3]}, {"bits_v": {3: 8}}]
)
def test_early_exit_with_settings_for_each_layer(own: dict[str, Any], greedy: Any) -> None:
    model, ids = make_model(num_hidden_layers=4), make_ids(tokens=60)
    try:
        expected = model.generate(ids, assistant_early_exit=2, **greedy)
    except TypeError as error:
        pytest.skip(f"transformers {transformers.__version__} cannot, without tqai: {error}")
    tqai.patch(model, **own)
    assert torch.equal(model.generate(ids, assistant_early_exit=2, **greedy), expected)
    assert model.config.num_hidden_layers == 4


# Copies, files and other processes.


def saved(model: Any) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "copied",
    [
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.load(io.BytesIO(saved(model)), weights_only=False),
        copy.deepcopy,
    ],
)
@pytest.mark.parametrize("inner", [False, True])
def test_a_copied_model_is_patched_as_the_first(
    copied: Any, inner: bool, kernel_calls: list[Any]
) -> None:
    model = make_model()
    model = model.model if inner else model
    cache = filled(model, tqai.patch(model, bits_k=5, **SEALING), make_ids(tokens=200))
    twin = copied(model)
    assert tqai.new_cache(twin).settings == cache.settings
    results = []
    for one in (model, twin):
        with torch.no_grad():
            filled(one, cached := tqai.new_cache(one), make_ids(tokens=200))
            results.append(one(make_ids(tokens=1), past_key_values=cached)[0])
    assert torch.equal(*results) and len(kernel_calls) == 4
    tqai.unpatch(twin)
    assert not is_kernels(twin) and is_kernels(model)
    with torch.no_grad():
        assert type(twin(make_ids()).past_key_values) is transformers.DynamicCache
        assert type(model(make_ids()).past_key_values) is tqai.TqaiCache


def test_a_patched_model_goes_into_another_process(tmp_path: Path, greedy: dict[str, Any]) -> None:
    model, ids = make_model(), make_ids(tokens=200)
    tqai.patch(model, **SEALING)
    expected = model.generate(ids, **greedy)
    torch.save((model, ids, greedy), tmp_path / "model")
    code = f"""
import torch
model, ids, greedy = torch.load({str(tmp_path / "model")!r}, weights_only=False)
got = model.generate(ids, return_dict_in_generate=True, **greedy)
assert got.past_key_values.memory_report()["packed_tokens"]
print(got.sequences.tolist())
import tqai
tqai.unpatch(model)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(expected.tolist())


def test_a_patched_model_that_is_let_go_is_gone_at_once(greedy: dict[str, Any]) -> None:
    enabled = gc.isenabled()
    gc.disable()  # memory of a device is wanted before the collector comes
    try:
        model = make_model()
        tqai.patch(model, **SEALING)
        model.generate(make_ids(tokens=200), **greedy)
        weight = weakref.ref(model.model.embed_tokens.weight)
        del model
        assert weight() is None
    finally:
        if enabled:
            gc.enable()


def test_a_shallow_copy_stays_usable_when_its_model_is_unpatched(greedy: dict[str, Any]) -> None:
    model, ids = make_model(), make_ids(tokens=40)
    expected = model.generate(ids, **greedy)
    tqai.patch(model, **SEALING)
    other = copy.copy(model)
    tqai.unpatch(model)
    assert not tqai.is_patched(other)
    assert torch.equal(other.generate(ids, **greedy), expected)
    tqai.patch(other, residual_window=100)
    assert torch.equal(other.generate(ids, **greedy), expected)


# Several threads.


def in_threads(*work: Callable[[], Any]) -> list[BaseException]:
    """What they raise that are called side by side, switched between as often as can be."""
    raised: list[BaseException] = []

    def run(one: Callable[[], Any]) -> None:
        try:
            one()
        except BaseException as error:
            raised.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(one,)) for one in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    return raised


def test_threads_patch_models_of_their_own(greedy: dict[str, Any]) -> None:
    def work(model: Any) -> None:
        for _ in range(15):
            with tqai.patched(model, **SEALING):
                model.generate(make_ids(tokens=60), **greedy)

    models = [make_model() for _ in range(6)]
    assert in_threads(*(partial(work, model) for model in models)) == []
    assert not any(map(tqai.is_patched, models))


def test_a_model_is_copied_while_another_is_patched() -> None:
    patched, other = make_model(), make_model()
    tqai.patch(patched)

    def copies() -> None:
        for _ in range(40):
            assert tqai.is_patched(copy.deepcopy(patched))

    def patches() -> None:
        for _ in range(40):
            tqai.patch(other)
            tqai.unpatch(other)

    assert in_threads(copies, patches) == []


# What other libraries make of models.


def test_transforms_of_torch_func_are_left_alone() -> None:
    model, ids = make_model(), make_ids(2, 30)
    weights = {name: each.detach() for name, each in model.named_parameters()}

    def loss(weights: Any, row: Any) -> Any:
        output = torch.func.functional_call(model, weights, (row[None],))
        return output.logits.square().mean()

    each_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    expected = torch.func.grad(loss)(weights, ids[0])
    tqai.patch(model)
    got = torch.func.grad(loss)(weights, ids[0])
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert each_row(weights, ids)["lm_head.weight"].shape[0] == 2


def test_heads_that_are_split_over_processes_are_refused() -> None:
    model = make_model()
    model._tp_size = 2
    with pytest.raises(NotImplementedError, match="split over 2 processes"):
        tqai.patch(model)


def test_weights_that_fsdp_has_sharded(tmp_path: Path, greedy: dict[str, Any]) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard") or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no fully_shard on the CPU")
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import tqai
from conftest import make_ids, make_model
from torch.distributed.fsdp import fully_shard
file = "file://{tmp_path}/rendezvous"
torch.distributed.init_process_group("gloo", init_method=file, rank=0, world_size=1)
greedy, ids, expected = {greedy!r}, make_ids(tokens=200), None
for patch_first in (None, True, False):
    model = make_model()
    if patch_first is not False:
        tqai.patch(model, residual_window=16)
    if patch_first is not None:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    if patch_first is False:
        tqai.patch(model, residual_window=16)
    got = model.generate(ids, **greedy).tolist()
    assert expected in (None, got), patch_first
    expected = got
tqai.unpatch(model)
try:
    tqai.patch(model, codec="adaptive")
except NotImplementedError as error:
    assert "use codec='scalar'" in str(error)
else:
    raise AssertionError("bases were learnt of shards")
torch.distributed.destroy_process_group()
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("done"), done.stderr[-2000:]


# A model and the model inside it.


@pytest.mark.parametrize("first_inner", [False, True])
@pytest.mark.parametrize("unpatch_inner", [False, True])
def test_a_model_and_its_decoder_have_one_patch(
    first_inner: bool, unpatch_inner: bool, greedy: dict[str, Any]
) -> None:
    model = make_model()
    both = [model.model, model] if first_inner else [model, model.model]
    tqai.patch(both[0], bits_k=8)
    tqai.patch(both[1], bits_k=3)
    assert len(model.model._forward_pre_hooks) == 1
    for one in both:
        assert tqai.new_cache(one).settings.bits_k == 3
    result = model.generate(make_ids(), return_dict_in_generate=True, **greedy)
    assert result.past_key_values.settings.bits_k == 3
    tqai.unpatch(model.model if unpatch_inner else model)
    for one in both:
        with pytest.raises(ValueError, match="not patched"):
            tqai.unpatch(one)
    assert not model.model._forward_pre_hooks
    result = model.generate(make_ids(), return_dict_in_generate=True, **greedy)
    assert type(result.past_key_values) is transformers.DynamicCache


def test_settings_of_the_inner_model_replace_those_of_the_outer(greedy: dict[str, Any]) -> None:
    model = make_model()
    tqai.patch(model, bits_k=8)
    tqai.unpatch(model.model)
    tqai.patch(model.model, bits_k=3)
    with torch.no_grad():
        assert model(make_ids()).past_key_values.settings.bits_k == 3
