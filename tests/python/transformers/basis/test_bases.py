"""Caches whose keys are in bases that were learnt from their model."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import tqai
from caches import SEALING, assert_equal, filled, traces
from conftest import Models, make_ids, make_model
from tqai.transformers.basis import bases
from tqai.transformers.model.geometry import geometry_of

ADAPTIVE: Any = {"codec": "adaptive", **SEALING}
SMALL: Any = {"bits_k": 2, **ADAPTIVE}


def structured(model: Any) -> Any:
    """`model`, whose keys and queries lie mostly in a few directions, as those of trained ones."""
    for name, weight in model.named_parameters():
        if name.endswith(("k_proj.weight", "q_proj.weight")):
            pairs = torch.arange(16) % 8  # each turned by its own frequency
            weight.data.unflatten(0, (-1, 16)).mul_(torch.exp(-0.6 * pairs)[:, None])
    return model


def ids_of(cache: Any) -> list[int | None]:
    return [None if layer.basis is None else layer.basis.id for layer in cache.layers]


def key_errors(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Mean squared errors of scores of the keys that are packed, by layer."""
    exact = filled(model, tqai.patch(model, residual_window=1000), ids)
    cache = filled(model, tqai.patch(model, residual_window=0, **options), ids)
    errors = []
    for ours, theirs in zip(cache.layers, exact.layers, strict=True):
        assert ours.is_packed()
        missed = theirs.keys[:] @ (ours.keys[:] - theirs.keys[:]).mT
        errors.append((missed - missed.mean(-1, keepdim=True)).square().mean())
    tqai.unpatch(model)
    return torch.stack(errors)


def test_keys_with_a_structure_are_held_better() -> None:
    model = structured(make_model())
    ids = make_ids(1, 300)
    basis = key_errors(model, ids, codec="adaptive", bits_k=2)
    assert (basis < 0.6 * key_errors(model, ids, bits_k=2)).all()


def test_bases_are_for_texts_as_long_as_the_model_reads() -> None:
    models = []
    for longest in (256, 256, 16384):
        model = structured(make_model(max_position_embeddings=longest))
        if models:
            model.load_state_dict(models[0].state_dict())
        models.append(model)
    ids = [ids_of(tqai.patch(model, **ADAPTIVE)) for model in models]
    assert ids[0] == ids[1]
    assert all(near != far for near, far in zip(ids[0], ids[2], strict=True))


def test_bases_of_sliding_layers_are_for_their_windows() -> None:
    models = [make_model("gemma2", max_position_embeddings=longest) for longest in (8192, 65536)]
    models[1].load_state_dict(models[0].state_dict())
    sliding = [kind == "sliding_attention" for kind in models[0].config.layer_types]
    assert {*sliding} == {True, False}
    near, far = (ids_of(tqai.patch(model, **ADAPTIVE)) for model in models)
    assert [a == b for a, b in zip(near, far, strict=True)] == sliding


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_oss"])
def test_all_layers_get_a_basis(models: Models, family: str) -> None:
    model = models(family)
    cache = tqai.patch(model, **ADAPTIVE)
    assert cache.memory_report()["codecs"] == {"adaptive": 2}
    for layer in cache.layers:
        assert (layer.basis.bits, layer.basis.kv_heads) == (4, 2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_oss"])
def test_nothing_changes_while_all_is_in_the_window(
    models: Models, family: str, greedy: dict[str, Any]
) -> None:
    model = models(family)
    expected = model.generate(make_ids(2), **greedy)
    tqai.patch(model, codec="adaptive")
    assert torch.equal(model.generate(make_ids(2), **greedy), expected)


def test_attention_reads_keys_in_a_basis(models: Models) -> None:
    model = models("llama")
    cache = filled(model, tqai.patch(model, **ADAPTIVE), make_ids(2, 200))
    exact = copy.deepcopy(cache)
    exact.use_exact_arithmetic()
    with torch.no_grad():
        ours, theirs = (
            model(make_ids(2, 1), past_key_values=each).logits for each in (cache, exact)
        )
    assert cache.memory_report()["packed_tokens"] > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


def test_bits_are_each_layer_s(models: Models) -> None:
    cache = tqai.patch(models("llama"), **ADAPTIVE, bits_k={1: 3})
    assert [layer.basis.bits for layer in cache.layers] == [4, 3]


def test_reports_count_the_bases(models: Models) -> None:
    model = models("llama")
    cache = tqai.patch(model, **ADAPTIVE)
    size = sum(layer.basis.nbytes for layer in cache.layers)
    filled(model, cache, make_ids(1, 200))
    report = cache.memory_report()
    assert report["basis_bytes"] == size == sum(each["basis_bytes"] for each in report["layers"])
    assert report["total_bytes"] == sum(
        report[name] for name in ("packed_bytes", "exact_bytes", "overhead_bytes")
    )
    assert f"bases of {size} bytes" in repr(cache)
    scalar = tqai.patch(model, **SEALING)
    assert scalar.memory_report()["codecs"] == {"scalar": 2}
    assert scalar.memory_report()["basis_bytes"] == 0
    assert "bases" not in repr(scalar)


def test_they_are_learnt_once_for_the_same_weights(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(seed=2)
    first = tqai.patch(model, **ADAPTIVE)
    monkeypatch.setattr(bases, "learn_moments", None)  # would raise
    tqai.unpatch(model)
    for again in (tqai.patch(model, **ADAPTIVE), tqai.new_cache(model)):
        assert all(a.basis is b.basis for a, b in zip(first.layers, again.layers, strict=True))


def test_the_same_weights_and_seed_have_the_same() -> None:
    first, second = (tqai.patch(make_model(seed=2), **ADAPTIVE) for _ in range(2))
    assert ids_of(first) == ids_of(second)
    other = tqai.patch(make_model(seed=2), **ADAPTIVE, seed=5)
    assert not set(ids_of(first)) & set(ids_of(other))
    assert tqai.TqaiCache(make_model(seed=2), **ADAPTIVE, seed=2**64 - 1).layers[0].basis


def test_other_weights_have_others_and_get_their_own_back() -> None:
    model = make_model(seed=2)
    before = ids_of(tqai.patch(model, **ADAPTIVE))
    weight = model.model.layers[0].self_attn.k_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(torch.linspace(0.1, 2, weight.shape[1]))
    changed = filled(model, tqai.new_cache(model), make_ids(1, 200))
    assert ids_of(changed)[0] not in (None, before[0])
    with torch.no_grad():
        weight.copy_(kept)
    assert ids_of(tqai.new_cache(model)) == before


def test_a_cache_of_before_a_change_keeps_its_bases() -> None:
    model = make_model(seed=2)
    cache = filled(model, tqai.patch(model, **ADAPTIVE), make_ids(1, 200))
    before = ids_of(cache)
    keys = cache.layers[0].keys.clone()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    tqai.new_cache(model)
    assert ids_of(cache) == before
    assert torch.equal(cache.layers[0].keys, keys)


def test_an_empty_cache_takes_the_bases_of_the_weights_that_it_is_used_with() -> None:
    model = make_model(seed=2)
    cache = tqai.patch(model, **ADAPTIVE)
    before = ids_of(cache)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(torch.linspace(0.1, 2, 64))
    filled(model, cache, make_ids(1, 200))
    assert ids_of(cache) == ids_of(tqai.new_cache(model)) != before
    cache.reset()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.neg_()
    filled(model, cache, make_ids(1, 200))
    assert ids_of(cache) == ids_of(tqai.new_cache(model))


def test_no_more_than_a_few_are_kept(models: Models) -> None:
    model = models("llama")
    for seed in range(bases.KEPT + 2):
        tqai.patch(model, **ADAPTIVE, seed=seed)
    assert len(bases._learnt[geometry_of(model).weights()]) == bases.KEPT


def test_copies_share_them(models: Models) -> None:
    model = models("llama")
    for tokens in (0, 200):
        cache = tqai.patch(model, **ADAPTIVE)
        if tokens:
            filled(model, cache, make_ids(1, tokens))
        for copied in (copy.copy(cache), copy.deepcopy(cache)):
            assert copied.layers[0].basis is cache.layers[0].basis
        back = pickle.loads(pickle.dumps(cache))
        assert ids_of(back) == ids_of(cache)
        back.reset()
        assert_equal(
            filled(model, back, make_ids(1, 99)),
            filled(model, tqai.new_cache(model), make_ids(1, 99)),
        )


def test_bytes_that_bring_them_share_them_too(models: Models, tmp_path: Path) -> None:
    model = models("llama")
    cache = filled(model, tqai.patch(model, **ADAPTIVE), make_ids(1, 200))
    tqai.save_cache(cache, tmp_path / "with", basis=True)
    tqai.save_cache(cache, tmp_path / "named")
    others = [
        tqai.load_cache(tmp_path / "with", model),
        tqai.load_cache(tmp_path / "named", model),
        pickle.loads(pickle.dumps(cache)),
    ]
    for other in others:
        for own, given in zip(other.layers, cache.layers, strict=True):
            assert own.core.key_basis is given.core.key_basis


def test_rows_and_crops_go_on(models: Models) -> None:
    model = models("llama")
    cache = filled(model, tqai.patch(model, **ADAPTIVE), make_ids(2, 200))
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    cache.crop(150)
    other = filled(model, tqai.new_cache(model), make_ids(2, 200))
    other.reorder_cache(torch.tensor([1, 1, 0]))
    other.crop(150)
    assert_equal(filled(model, cache, make_ids(3, 90)), filled(model, other, make_ids(3, 90)))


def test_skipped_layers_need_none(models: Models) -> None:
    cache = tqai.patch(models("llama"), **ADAPTIVE, skip_layers=[0])
    assert cache.memory_report()["codecs"] == {"adaptive": 1}


def test_nothing_is_done_to_the_model(models: Models) -> None:
    model = make_model(seed=4).train()
    before, state = traces(model), torch.random.get_rng_state()
    calls: list[str] = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append("hook"))
    before = traces(model)
    with torch.autocast("cpu", torch.bfloat16):
        cache = tqai.TqaiCache(model, codec="adaptive")
    assert traces(model) == before
    assert model.training and model.model.layers[0].training and not calls
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())
    assert ids_of(cache) == ids_of(tqai.TqaiCache(make_model(seed=4), codec="adaptive"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_leaves_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    model = make_model(seed=6)
    before, state = traces(model), torch.random.get_rng_state()

    def fails(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("tqai.transformers.basis.learn._Listener._add_queries", fails)
        with pytest.raises(error):
            tqai.patch(model, codec="adaptive")
    assert traces(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not tqai.is_patched(model)
    assert tqai.patch(model, codec="adaptive").memory_report()["codecs"] == {"adaptive": 2}


def test_progress_is_shown_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bases, "_DELAY", 1e9)  # a busy machine takes longer than a second
    tqai.patch(make_model(seed=7), codec="adaptive")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(bases, "_DELAY", 1e-9)
    tqai.patch(make_model(seed=8), codec="adaptive")
    out, err = capsys.readouterr()
    assert not out and "Learning key bases" in err


@pytest.mark.skipif(
    torch.__version__ < "2.11", reason="with torch 2.6 compiled models round otherwise"
)
def test_a_compiled_pass_makes_caches_with_them(models: Models) -> None:
    model = make_model(seed=9)
    tqai.patch(model, **ADAPTIVE)
    ids = make_ids(1, 120)
    expected = filled(model, tqai.new_cache(model), ids)
    compiled = torch.compile(model, backend="eager")
    got = tqai.new_cache(model)
    with torch.no_grad():
        compiled(ids, past_key_values=got)
    assert ids_of(got) == ids_of(expected)
    assert_equal(got, expected)
    with torch.no_grad():
        made = compiled(ids, use_cache=True).past_key_values
    assert ids_of(made) == ids_of(expected)


@pytest.mark.parametrize("name", ["turbo", "Adaptive", None])
def test_unknown_codecs_are_refused(models: Models, name: Any) -> None:
    allowed = "'scalar', 'trellis', 'adaptive'"
    with pytest.raises(ValueError, match=f"codec={name!r}: expected one of {allowed}"):
        tqai.patch(models("llama"), codec=name)


def test_weights_that_are_nowhere_are_refused() -> None:
    model = make_model()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(NotImplementedError, match="layers.1.mlp.gate_proj.weight.*not in memory"):
        tqai.patch(model, codec="adaptive")
    assert not tqai.is_patched(model)


AUTO: list[Any] = [{"codec": "auto"}, {"preset": "quality"}, {"preset": "small"}]


@pytest.mark.parametrize("options", AUTO)
def test_auto_is_adaptive_where_bases_can_be_learnt(models: Models, options: Any) -> None:
    model = models("llama")
    for cache in (
        tqai.patch(model, **options),
        tqai.new_cache(model),
        tqai.TqaiCache(model, **options),
    ):
        report = cache.memory_report()
        assert report["codecs"] == {"adaptive": 2}
        assert report["settings"]["codec"] == "adaptive"


@pytest.mark.parametrize("options", AUTO)
def test_auto_is_trellis_elsewhere(
    models: Models, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models("falcon")
    by_hand = tqai.TqaiCache(model, **options)
    patched = tqai.patch(model, **options)
    monkeypatch.setattr(bases, "learn_moments", None)  # would raise: it is not tried again
    for cache in (by_hand, patched, tqai.new_cache(model)):
        report = cache.memory_report()
        assert report["codecs"] == {"scalar": 2} and report["value_codes"] == {"trellis": 2}
        assert report["settings"]["codec"] == "trellis"


def test_auto_learns_nothing_of_weights_that_are_nowhere() -> None:
    model = make_model()
    model.model.layers[1].mlp.to("meta")
    assert tqai.patch(model, preset="small").settings.codec == "trellis"


def test_a_codec_beside_a_preset_takes_precedence(models: Models) -> None:
    cache = tqai.patch(models("llama"), preset="small", codec="scalar")
    assert (cache.settings.codec, cache.settings.bits_k) == ("scalar", 2)


def test_attention_that_is_not_seen_is_refused(models: Models) -> None:
    with pytest.raises(NotImplementedError, match="no layer of Falcon.*its attention is not seen"):
        tqai.patch(models("falcon"), codec="adaptive")


def test_what_takes_no_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(seed=5)

    def forward(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no ids")

    monkeypatch.setattr(type(model.model), "forward", forward)
    with pytest.raises(NotImplementedError, match=r"LlamaModel does not take \(RuntimeError"):
        tqai.patch(model, codec="adaptive")


def test_queries_that_are_no_numbers_leave_a_layer_scalar() -> None:
    model = make_model(seed=5)
    model.model.layers[1].self_attn.q_proj.weight.data.fill_(torch.inf)
    cache = tqai.patch(model, **ADAPTIVE)
    assert cache.layers[0].basis is not None
    assert cache.layers[1].basis is None
    codecs = cache.memory_report()["codecs"]
    assert [name for name in codecs if name.startswith("scalar: ")]


IN_ANOTHER_PROCESS = """
import sys, torch, tqai
from transformers import AutoModelForCausalLM
folder, *files = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tqai.patch(model)
ids = torch.arange(3, 120).remainder(100).add(3)[None]
for file in files:
    cache = tqai.load_cache(file, model)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False,
                         eos_token_id=999, pad_token_id=0)
    print(out[0, ids.shape[1]:].tolist(), cache.memory_report()["codecs"])
"""


def test_another_process_goes_on_with_the_same_tokens(tmp_path: Path) -> None:
    folder = toy.folder(tmp_path / "model")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = tqai.patch(model, **SMALL)
    ids = torch.arange(3, 120).remainder(100).add(3)[None]
    filled(model, cache, ids[:, :-1])
    files = [str(tmp_path / name) for name in ("named", "carried")]
    for file, carried in zip(files, (False, True), strict=True):
        tqai.save_cache(cache, file, basis=carried)
    generated = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=999,
        pad_token_id=0,
    )
    expected = generated[0, ids.shape[1] :].tolist()
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(folder), *files]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [f"{expected} {{'adaptive': 2}}"] * 2
