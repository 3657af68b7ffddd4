from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
import tqai
import transformers
from caches import traces
from conftest import SMALL, Models, make_ids, make_model
from tqai import _core
from tqai.transformers.attention.original import PatchedName
from tqai.transformers.model.names import generate_name
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "falcon"])
def test_unpatch_restores_everything(family: str, models: Models, greedy: dict[str, Any]) -> None:
    model = models(family)
    before = traces(model)
    expected = model.generate(make_ids(), **greedy)
    tqai.patch(model)
    assert traces(model) != before
    assert model.config.to_json_string(use_diff=False) == before["saved"]
    model.generate(make_ids(), **greedy)
    tqai.unpatch(model)
    assert traces(model) == before
    result = model.generate(make_ids(), return_dict_in_generate=True, **greedy)
    assert torch.equal(result.sequences, expected)
    assert type(result.past_key_values) is DynamicCache


@pytest.mark.parametrize("action", [tqai.unpatch, tqai.new_cache])
def test_an_unpatched_model_is_refused(action: Any, models: Models) -> None:
    model = models()
    with pytest.raises(ValueError, match="LlamaForCausalLM is not patched.*tqai.patch"):
        action(model)
    tqai.patch(model)
    tqai.unpatch(model)
    with pytest.raises(ValueError, match="not patched"):
        action(model)


def test_patching_again_replaces_the_settings(models: Models, greedy: dict[str, Any]) -> None:
    model = models()
    before = traces(model)
    first = tqai.patch(model, bits_k=8, residual_window=16)
    model.generate(make_ids(), past_key_values=first, **greedy)
    second = tqai.patch(model, bits_k=3)
    assert second is not first and second.get_seq_length() == 0
    assert tqai.new_cache(model).settings == second.settings != first.settings
    assert (second.settings.bits_k, second.settings.residual_window) == (3, 128)
    # The older cache goes on with its own settings.
    more = torch.cat([make_ids(), make_ids(seed=1)], 1)
    model.generate(more, past_key_values=first, **greedy)
    assert first.settings.bits_k == 8
    tqai.unpatch(model)
    assert traces(model) == before


@pytest.mark.parametrize(
    "bad", [{"bits_k": 9}, {"rotation": "none"}, {"skip_layers": [2]}, {"level": "mmx"}]
)
@pytest.mark.parametrize("patched", [False, True])
def test_bad_settings_change_nothing(bad: dict[str, Any], patched: bool, models: Models) -> None:
    model = models()
    if patched:
        tqai.patch(model, bits_k=5)
    before = traces(model)
    with pytest.raises(ValueError, match=next(iter(bad))):
        tqai.patch(model, **bad)
    assert traces(model) == before
    if patched:
        assert tqai.new_cache(model).settings.bits_k == 5


def test_a_level_that_cannot_run_changes_nothing(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models()
    before = traces(model)

    def fail() -> str:
        raise NotImplementedError("TQAI_LEVEL=neon")

    monkeypatch.setattr(_core, "default_level", fail)
    with pytest.raises(NotImplementedError, match="TQAI_LEVEL"):
        tqai.patch(model)
    assert traces(model) == before


def test_every_call_of_a_patched_model_gets_a_compressed_cache(
    models: Models, greedy: dict[str, Any]
) -> None:
    model = models()
    tqai.patch(model, bits_v=3)
    ids = make_ids()
    cache = model.generate(ids, return_dict_in_generate=True, **greedy).past_key_values
    assert type(cache) is tqai.TqaiCache and cache.settings.bits_v == 3
    with torch.no_grad():
        outputs = [model(ids), model(ids, use_cache=True), model.model(ids), model(ids, None)]
        assert {type(output.past_key_values) for output in outputs} == {tqai.TqaiCache}
        assert model(ids, use_cache=False).past_key_values is None
    assert len({id(output.past_key_values) for output in outputs}) == len(outputs)


def test_caches_that_the_user_chose_stay(models: Models, greedy: dict[str, Any]) -> None:
    model = models()
    tqai.patch(model)
    options = {"return_dict_in_generate": True, **greedy}
    own = DynamicCache(config=model.config)
    assert model.generate(make_ids(), past_key_values=own, **options).past_key_values is own
    static = model.generate(make_ids(), cache_implementation="static", **options).past_key_values
    assert isinstance(static, StaticCache)


def test_an_offloaded_cache_stays(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models()
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True  # making one takes an accelerator

    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        model_kwargs[generate_name()] = offloaded

    monkeypatch.setattr(type(model), "_prepare_cache_for_generation", prepare)
    tqai.patch(model)
    kwargs: dict[str, Any] = {}
    model._prepare_cache_for_generation(model.generation_config, kwargs)
    assert kwargs[generate_name()] is offloaded


def test_assisted_generation(greedy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models' caches go back over rejected tokens, also where a window has moved on."""
    model, assistant = make_model("mistral"), make_model("mistral", num_hidden_layers=1)
    ids = make_ids(tokens=60)
    expected = model.generate(ids, **greedy)
    recording = []
    activate = tqai.TqaiCache.activate_past_recording

    def record(cache: tqai.TqaiCache) -> None:
        recording.append(cache)
        activate(cache)

    monkeypatch.setattr(tqai.TqaiCache, "activate_past_recording", record)
    tqai.patch(model)
    tqai.patch(assistant)
    got = model.generate(ids, assistant_model=assistant, **greedy)
    assert torch.equal(got, expected)
    # Older versions never ask: there no layer forgets anything.
    if hasattr(DynamicSlidingWindowLayer, "activate_past_recording"):
        assert {len(cache.layers) for cache in recording} == {1, 2}
        assert all(layer.record_past for cache in recording for layer in cache.layers)


def test_a_base_model_can_be_patched() -> None:
    model = make_model().model
    tqai.patch(model)
    with torch.no_grad():
        assert type(model(make_ids()).past_key_values) is tqai.TqaiCache
    tqai.unpatch(model)
    with torch.no_grad():
        assert type(model(make_ids()).past_key_values) is DynamicCache


def test_training_is_left_alone() -> None:
    model = make_model(attention_dropout=0.1)
    ids = make_ids(2)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        output = model.train()(ids, labels=ids)
        assert not isinstance(output.past_key_values, tqai.TqaiCache)
        output.loss.backward()
        found = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        return found

    expected = gradients()
    tqai.patch(model)
    for got, plain in zip(gradients(), expected, strict=True):
        assert torch.equal(got, plain)


def test_gradients_of_a_forward_pass_in_eval_mode_are_right() -> None:
    model, ids = make_model(), make_ids()

    def gradient() -> torch.Tensor:
        model(ids, labels=ids).loss.backward()
        found = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
        model.zero_grad()
        return found

    expected = gradient()
    tqai.patch(model)
    assert torch.equal(gradient(), expected)


def test_gradients_through_a_filled_cache_raise(models: Models) -> None:
    model = models()
    cache = tqai.patch(model, residual_window=16)
    with torch.no_grad():
        model(make_ids(tokens=200), past_key_values=cache)
    loss = model(make_ids(tokens=1), past_key_values=cache).logits.sum()
    with pytest.raises(RuntimeError, match="not differentiable.*no_grad"):
        loss.backward()


def test_a_copied_model_is_patched_on_its_own(greedy: dict[str, Any]) -> None:
    model = make_model()
    cache = tqai.patch(model, bits_k=5)
    twin = copy.deepcopy(model)
    expected = model.generate(make_ids(), **greedy)
    tqai.unpatch(model)
    result = twin.generate(make_ids(), return_dict_in_generate=True, **greedy)
    assert torch.equal(result.sequences, expected)
    assert type(result.past_key_values) is tqai.TqaiCache
    assert tqai.new_cache(twin).settings.bits_k == 5
    other = make_model(seed=2)
    tqai.patch(other)
    with pytest.raises(ValueError, match="another LlamaForCausalLM"):
        other.generate(make_ids(), past_key_values=cache, **greedy)
    # The twin's weights are the model's: its caches are as good.
    assert torch.equal(twin.generate(make_ids(), past_key_values=cache, **greedy), expected)
    tqai.unpatch(twin)
    assert traces(twin) == traces(model)


def test_models_that_share_a_config_are_unpatched_one_by_one(greedy: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(**SMALL)
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    if first.config is not second.config:
        pytest.skip("this transformers copies configs")
    implementation = config._attn_implementation
    tqai.patch(first)
    tqai.patch(second)
    tqai.unpatch(first)
    assert type(config._attn_implementation) is PatchedName
    result = second.generate(make_ids(), return_dict_in_generate=True, **greedy)
    assert type(result.past_key_values) is tqai.TqaiCache
    first.generate(make_ids(), **greedy)
    tqai.unpatch(second)
    assert type(config._attn_implementation) is str
    assert config._attn_implementation == implementation


def unsupported(name: str, **fields: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**fields)
    return transformers.AutoModel.from_config(config).eval()


def test_models_without_attention_are_named() -> None:
    bert = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    cases = [
        (torch.nn.Linear(2, 2), "PreTrainedModel; got Linear"),
        (None, "got NoneType"),
        (unsupported("Mamba", num_hidden_layers=2, hidden_size=32), "MambaModel.*2 × MambaBlock"),
        (unsupported("Bert", **bert, intermediate_size=32), "BertModel.*2 × BertLayer"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            tqai.patch(model)


def test_models_of_another_make_are_named() -> None:
    langs = {"langs": ["en", "de"], "src_vocab_size": 32, "tgt_vocab_size": 32, "d_model": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    fsmt = transformers.FSMTModel(transformers.FSMTConfig(**langs, **layers, **heads)).eval()
    with pytest.raises(NotImplementedError, match="FSMTModel.*FSMTDecoder has no configuration"):
        tqai.patch(fsmt)
    reformer = transformers.ReformerConfig(
        is_decoder=True, axial_pos_embds=False, hidden_size=32, attn_layers=["local"]
    )
    with pytest.raises(NotImplementedError, match="ReformerModelWithLMHead"):
        tqai.patch(transformers.ReformerModelWithLMHead(reformer).eval())


def test_a_layer_that_cannot_be_compressed_may_be_skipped(greedy: dict[str, Any]) -> None:
    model = make_model("qwen3", head_dim=4)
    with pytest.raises(NotImplementedError, match=r"layer 0.*head_dim 4.*skip_layers=\[0\]"):
        tqai.patch(model)
    with pytest.raises(NotImplementedError, match="layer 1"):
        tqai.patch(model, skip_layers=[0])
    expected = model.generate(make_ids(), **greedy)
    tqai.patch(model, skip_layers=[0, 1])
    assert torch.equal(model.generate(make_ids(), **greedy), expected)


def test_an_attention_that_tqai_does_not_know_is_named() -> None:
    model = make_model()
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(NotImplementedError, match="'flex_attention'.*'sdpa' and 'eager'"):
        tqai.patch(model)
    assert model.config._attn_implementation == "flex_attention"


def test_importing_tqai_imports_no_torch() -> None:
    code = "import sys, tqai; tqai.patch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_exports() -> None:
    assert set(tqai.__all__) <= set(dir(tqai))
    for name in tqai.__all__:
        assert getattr(tqai, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        tqai.nothing  # noqa: B018


def test_layers_have_bits_of_their_own() -> None:
    model = make_model("llama")
    cache = tqai.patch(model, preset="quality", bits_k={0: 8}, residual_window=16)
    with torch.no_grad():
        model(make_ids(1, 200), past_key_values=cache)
    first, second = cache.memory_report()["layers"]
    # Bytes of a packed token: bits of keys and values, two FP16 norms a head.
    heads, dim = cache.layers[0].heads
    assert first["packed_bytes"] == first["packed_tokens"] * heads * ((8 + 4) * dim // 8 + 4)
    assert second["packed_bytes"] == second["packed_tokens"] * heads * ((4 + 4) * dim // 8 + 4)
    with pytest.raises(ValueError, match="bits_v has 1 entries"):
        tqai.patch(model, bits_v=[2])
    assert tqai.new_cache(model).settings.bits_v == 4
