"""Which weights a cache has read its text with: in memory, in pickles, in files."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
import transformers
from caches import SEALING, assert_equal, filled
from conftest import make_ids, make_model
from tqai.transformers.model.geometry import decoder_of, geometry_of
from tqai.transformers.weights.identity import watch_of

SCALED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


def identity(model: Any) -> str:
    return geometry_of(model).identity


def patched(model: Any) -> Any:
    """A cache of `model` that has read a text."""
    return filled(model, tqai.patch(model, **SEALING), make_ids(1, 100))


def projection(model: Any) -> Any:
    return decoder_of(model).layers[0].self_attn.k_proj


# Changes.


def load_other_weights(model: Any) -> None:
    model.load_state_dict(make_model(seed=7).state_dict())


def load_and_assign(model: Any) -> None:
    model.load_state_dict(make_model(seed=7).state_dict(), assign=True)


def take_a_step(model: Any) -> None:
    optimiser = torch.optim.SGD(model.parameters(), 1.0)
    ids = make_ids(1, 30)
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimiser.step()
    model.eval()


def edit_a_row(model: Any) -> None:
    with torch.no_grad():
        projection(model).weight[1] += 1


def edit_an_embedding(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[70, 3] = 5


def replace_a_parameter(model: Any) -> None:
    weight = projection(model).weight.detach().clone()
    weight[1, 1] += 1
    projection(model).weight = torch.nn.Parameter(weight)


def replace_its_memory(model: Any) -> None:
    weight = projection(model).weight.detach().clone()
    weight[1, 1] += 1
    projection(model).weight.data = weight


def replace_a_module(model: Any) -> None:
    old = projection(model)
    decoder_of(model).layers[0].self_attn.k_proj = torch.nn.Linear(
        old.in_features, old.out_features, bias=False
    )


def round_to_half(model: Any) -> None:
    model.half().float()


def fill_by_data(model: Any) -> None:
    """What PyTorch keeps no record of."""
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)


def decay_by_data(model: Any) -> None:
    projection(model).weight.data.mul_(0.99)


def turn_otherwise(model: Any) -> None:
    """Which is in no saved weight, but in what the keys have gone through."""
    decoder_of(model).rotary_emb.inv_freq.mul_(0.5)


CHANGES = [
    fill_by_data,
    decay_by_data,
    load_other_weights,
    load_and_assign,
    take_a_step,
    edit_a_row,
    edit_an_embedding,
    replace_a_parameter,
    replace_its_memory,
    replace_a_module,
    round_to_half,
    turn_otherwise,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_cache_does_not_outlive_its_weights(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    model = make_model()
    cache = patched(model)
    tqai.save_cache(cache, tmp_path / "f")
    change(model)
    with pytest.raises(ValueError, match=r"have changed since .*tqai.new_cache\(model\)"):
        filled(model, cache, make_ids(1, 1))
    with pytest.raises(ValueError, match="with other weights|another rotary embedding"):
        tqai.load_cache(tmp_path / "f", model)
    # It is well as soon as it is empty, and so are others.
    cache.reset()
    filled(model, cache, make_ids(1, 100))
    filled(model, cache, make_ids(1, 1))
    tqai.save_cache(cache, tmp_path / "f")
    tqai.load_cache(tmp_path / "f", model)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_cache_that_was_not_saved_before(change: Callable[[Any], None], tmp_path: Path) -> None:
    model = make_model()
    cache = patched(model)
    change(model)
    with pytest.raises(ValueError, match=r"have changed since .*tqai.new_cache\(model\)"):
        filled(model, cache, make_ids(1, 1))
    with pytest.raises(ValueError, match="have changed; a file says which weights"):
        tqai.save_cache(cache, tmp_path / "f")
    assert not list(tmp_path.iterdir())


def test_files_notice_what_pytorch_does_not_record(tmp_path: Path) -> None:
    model = make_model()
    tqai.save_cache(patched(model), tmp_path / "f")
    projection(model).weight.data[3] += 1
    with pytest.raises(ValueError, match=r"other weights \(layers.0.self_attn.k_proj.weight\)"):
        tqai.load_cache(tmp_path / "f", model)


def test_files_say_what_differs(tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    tqai.save_cache(patched(model), tmp_path / "f")
    edit_a_row(other)
    edit_an_embedding(other)
    tqai.patch(other)
    with pytest.raises(ValueError, match=r"other weights \(embed_tokens.weight and 1 more\)"):
        tqai.load_cache(tmp_path / "f", other)


def test_a_model_that_is_trained_before_its_cache_is_used() -> None:
    model = make_model()
    cache = tqai.patch(model, **SEALING)
    take_a_step(model)
    filled(model, filled(model, cache, make_ids(1, 50)), make_ids(1, 1))


# What is no change.


def nothing(model: Any) -> None:
    pass


def freeze(model: Any) -> None:
    model.requires_grad_(False)


def gradients(model: Any) -> None:
    ids = make_ids(1, 30)
    model(ids, labels=ids, use_cache=False).loss.backward()


def to_where_it_is(model: Any) -> None:
    model.to("cpu", torch.float32)


def compile_in_place(model: Any) -> None:
    model.compile(backend="eager")


def train_and_eval(model: Any) -> None:
    model.train()
    model.eval()


@pytest.mark.parametrize(
    "touch",
    [nothing, freeze, gradients, to_where_it_is, train_and_eval, compile_in_place],
    ids=lambda touch: touch.__name__,
)
def test_a_cache_goes_on_after_what_changes_no_weight(
    touch: Callable[[Any], None], tmp_path: Path
) -> None:
    model = make_model()
    cache = patched(model)
    state = watch_of(decoder_of(model)).now()
    touch(model)
    assert watch_of(decoder_of(model)).now() is state
    filled(model, cache, make_ids(1, 1))
    tqai.save_cache(cache, tmp_path / "f")
    filled(model, tqai.load_cache(tmp_path / "f", model), make_ids(1, 1))


def test_weights_that_were_saved_are_known_again(tmp_path: Path) -> None:
    """After the same numbers are loaded once more, the bytes tell that they are the same."""
    model = make_model()
    cache = patched(model)
    tqai.save_cache(cache, tmp_path / "f")
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    filled(model, cache, make_ids(1, 1))
    load_other_weights(model)
    with pytest.raises(ValueError, match="have changed"):
        filled(model, cache, make_ids(1, 1))
    model.load_state_dict(make_model().state_dict())
    filled(model, cache, make_ids(1, 1))


def test_a_move_to_another_device_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device with weights is not to be had here; meta stands for it, without a cache."""
    model = make_model()
    watch = watch_of(model)
    state = watch.now()
    moved = copy.deepcopy(model).to("meta")
    for parameter, other in zip(model.parameters(), moved.parameters(), strict=True):
        assert parameter.shape == other.shape
    leaves = state.held.leaves
    elsewhere = [leaf._replace(address=1, device=torch.device("cuda", 0)) for leaf in leaves]
    assert all(a.is_still(b) for a, b in zip(leaves, elsewhere, strict=True))
    written = [leaf._replace(version=leaf.version + 1) for leaf in elsewhere]
    assert not any(a.is_still(b) for a, b in zip(leaves, written, strict=True))


def test_weights_that_accelerate_takes_to_the_cpu_s_memory_are_the_same() -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_submodules

    model = make_model()
    cache = patched(model)
    accelerate.cpu_offload(model, torch.device("cpu"))
    for _ in range(2):
        filled(model, cache, make_ids(1, 1))
    edited = decoder_of(model).layers[0].self_attn.k_proj._hf_hook.weights_map["weight"]
    remove_hook_from_submodules(model)
    filled(model, cache, make_ids(1, 1))
    accelerate.cpu_offload(model, torch.device("cpu"))
    filled(model, cache, make_ids(1, 1))
    with torch.no_grad():
        edited[3] += 1
    with pytest.raises(ValueError, match="have changed"):
        filled(model, cache, make_ids(1, 1))


def test_copies_of_a_model_share_its_caches() -> None:
    model = make_model()
    cache = patched(model)
    twin = copy.deepcopy(model)
    filled(twin, cache, make_ids(1, 1))
    filled(model, cache, make_ids(1, 1))
    edit_a_row(twin)
    with pytest.raises(ValueError, match="another LlamaForCausalLM.*with other weights"):
        filled(twin, cache, make_ids(1, 1))
    filled(model, cache, make_ids(1, 1))


def test_copies_of_a_cache_are_of_the_same_model(tmp_path: Path) -> None:
    model = make_model()
    empty = copy.deepcopy(tqai.patch(model, **SEALING))
    tqai.save_cache(empty, tmp_path / "f")
    cache = copy.deepcopy(filled(model, empty, make_ids(1, 100)))
    tqai.save_cache(cache, tmp_path / "f")
    edit_a_row(model)
    with pytest.raises(ValueError, match="have changed since"):
        filled(model, cache, make_ids(1, 1))


def test_a_pickle_knows_its_weights() -> None:
    model = make_model()
    cache = patched(model)
    data = pickle.dumps(cache)
    filled(model, pickle.loads(data), make_ids(1, 1))
    edit_a_row(model)
    with pytest.raises(ValueError, match="other weights"):
        filled(model, pickle.loads(data), make_ids(1, 1))
    model = make_model()
    cache = patched(model)
    edit_a_row(model)
    with pytest.raises(ValueError, match="have changed"):
        pickle.dumps(cache)
    del model
    with pytest.raises(ValueError, match="have gone with its model"):
        pickle.dumps(cache)


def test_a_cache_keeps_no_model_alive(tmp_path: Path) -> None:
    model = make_model()
    cache = patched(model)
    weight = weakref.ref(projection(model).weight)
    tqai.unpatch(model)
    del model
    gc.collect()
    assert weight() is None
    with pytest.raises(ValueError, match="gone with its model"):
        tqai.save_cache(cache, tmp_path / "f")


def test_threads_may_ask_while_adapters_are_switched_and_files_saved(tmp_path: Path) -> None:
    model = make_model()
    cache = patched(model)
    errors: list[BaseException] = []
    watch = watch_of(decoder_of(model))
    states = set()

    def ask(name: str) -> None:
        try:
            for _ in range(20):
                states.add(watch.now())
                tqai.save_cache(cache, tmp_path / name)
                projection(model).register_buffer("made", torch.zeros(1), persistent=False)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(str(at),)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(states) == 1


def test_weights_that_were_loaded_in_inference_mode(tmp_path: Path) -> None:
    """PyTorch counts no writes to such; replaced ones are noticed."""
    with torch.inference_mode():
        model = make_model()
    assert projection(model).weight.is_inference()
    cache = patched(model)
    filled(model, cache, make_ids(1, 1))
    tqai.save_cache(cache, tmp_path / "f")
    filled(model, tqai.load_cache(tmp_path / "f", model), make_ids(1, 1))
    replace_a_parameter(model)
    with pytest.raises(ValueError, match="have changed"):
        filled(model, cache, make_ids(1, 1))


def test_an_encoder_counts_where_it_is_known(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=128, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.T5ForConditionalGeneration(config).eval()

    def read(cache: Any, tokens: int) -> Any:
        with torch.no_grad():
            ids = make_ids(1, tokens)
            model(input_ids=make_ids(1, 60), decoder_input_ids=ids, past_key_values=cache)
        return cache

    cache = read(tqai.patch(model, **SEALING), 90)
    tqai.save_cache(cache, tmp_path / "f")
    tqai.load_cache(tmp_path / "f", model)
    with torch.no_grad():
        model.lm_head.weight += 0 if model.config.tie_word_embeddings else 1
        model.encoder.block[1].layer[0].SelfAttention.q.weight[3] += 1
    with pytest.raises(ValueError, match="have changed"):
        read(cache, 1)
    with pytest.raises(ValueError, match=r"\(encoder.block.1.layer.0.SelfAttention.q.weight\)"):
        tqai.load_cache(tmp_path / "f", model)


def test_the_output_head_does_not_count(tmp_path: Path) -> None:
    model = make_model()
    cache = patched(model)
    tqai.save_cache(cache, tmp_path / "f")
    with torch.no_grad():
        model.lm_head.weight += 1
    filled(model, cache, make_ids(1, 1))
    tqai.load_cache(tmp_path / "f", model)


def test_a_decoder_takes_files_of_the_model_around_it(tmp_path: Path) -> None:
    model = make_model()
    tqai.save_cache(patched(model), tmp_path / "f")
    decoder = make_model().model
    tqai.patch(decoder, **SEALING)
    assert tqai.load_cache(tmp_path / "f", decoder).get_seq_length() == 100


# Identities.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_weights_have_one_identity(dtype: torch.dtype) -> None:
    assert identity(make_model(dtype=dtype)) == identity(make_model(dtype=dtype))
    assert identity(make_model(dtype=dtype)) != identity(make_model(seed=2, dtype=dtype))


def test_another_dtype_is_another_identity() -> None:
    model = make_model()
    before = identity(model)
    assert identity(model.to(torch.bfloat16)) != before


def test_layout_and_ties_do_not_count() -> None:
    model, other = make_model(tie_word_embeddings=True), make_model(tie_word_embeddings=True)
    weight = projection(other).weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    first = decoder_of(model).layers
    first[0].mlp = first[1].mlp
    second = decoder_of(other).layers
    second[0].mlp = copy.deepcopy(second[1].mlp)
    assert identity(other) == identity(model)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_have_the_same_identity(where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, offloaded, other = make_model(), make_model(), make_model()
    edit_a_row(other)
    cpu = torch.device("cpu")
    for each in (offloaded, other):
        if where == "cpu":
            accelerate.cpu_offload(each, cpu)
        else:
            accelerate.disk_offload(each, tmp_path / str(id(each)), execution_device=cpu)
    assert all(parameter.device.type == "meta" for parameter in offloaded.parameters())
    assert identity(offloaded) == identity(model) != identity(other)
    caches = [patched(each) for each in (model, offloaded)]
    for cache, reader in zip(caches, (offloaded, model), strict=True):
        tqai.save_cache(cache, tmp_path / "f")
        filled(reader, tqai.load_cache(tmp_path / "f", reader), make_ids(1, 1))
        tqai.patch(other)
        with pytest.raises(ValueError, match=r"\(layers.0.self_attn.k_proj.weight\)"):
            tqai.load_cache(tmp_path / "f", other)
    filled(offloaded, caches[1], make_ids(1, 1))


def test_weights_out_of_reach_are_said_to_be(tmp_path: Path) -> None:
    model, other = make_model(), make_model(seed=2)
    tqai.save_cache(patched(model), tmp_path / "f")
    tqai.patch(other)
    other.to("meta")
    with pytest.warns(UserWarning, match="20 of 20 weights .*out of reach"):
        filled_file = tqai.load_cache(tmp_path / "f", other)
    assert filled_file.get_seq_length() == 100


@pytest.mark.parametrize(
    "parameter",
    [
        torch.tensor(1.0),
        torch.empty(0, 4),
        torch.ones(4, 4, dtype=torch.int8),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(2, 3, 4, 5, dtype=torch.bool),
        torch.ones(5, dtype=torch.float8_e4m3fn),
    ],
    ids=["0-dim", "empty", "int8", "complex", "conjugate", "bool", "float8"],
)
def test_odd_parameters(parameter: torch.Tensor, tmp_path: Path) -> None:
    models = make_model(), make_model()
    for model in models:
        odd = torch.nn.Parameter(parameter.clone(), requires_grad=False)
        decoder_of(model).register_parameter("odd", odd)
    tqai.save_cache(patched(models[0]), tmp_path / "f")
    tqai.patch(models[1])
    tqai.load_cache(tmp_path / "f", models[1])
    if parameter.numel() > 0:
        bytes_of = models[1].model.odd.data.reshape(-1).resolve_conj().view(torch.uint8)
        bytes_of[-1] ^= 1
        if not parameter.is_conj():
            with pytest.raises(ValueError, match=r"other weights \(odd\)"):
                tqai.load_cache(tmp_path / "f", models[1])


def test_saved_buffers_count_and_others_do_not(tmp_path: Path) -> None:
    model = make_model()
    decoder_of(model).register_buffer("kept", torch.zeros(3))
    decoder_of(model).register_buffer("made", torch.zeros(3), persistent=False)
    cache = patched(model)
    decoder_of(model).made += 1
    decoder_of(model).register_buffer("made", torch.ones(5), persistent=False)
    filled(model, cache, make_ids(1, 1))
    decoder_of(model).kept += 1
    with pytest.raises(ValueError, match="have changed"):
        filled(model, cache, make_ids(1, 1))
    cache = patched(model)
    decoder_of(model).kept = torch.zeros(3)
    with pytest.raises(ValueError, match="have changed"):
        filled(model, cache, make_ids(1, 1))


def test_frequencies_that_grow_with_the_text_are_no_change() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = make_model(rope_parameters=rope, max_position_embeddings=64)
    cache = patched(model)  # past the 64 tokens that it was made for
    filled(model, cache, make_ids(1, 50))
    assert cache.get_seq_length() == 150
    filled(model, tqai.new_cache(model), make_ids(1, 20))  # back to short ones


def test_weights_that_leave_memory_are_no_longer_known_to_be_the_same() -> None:
    model = make_model()
    cache = patched(model)
    model.to("meta")
    with pytest.raises(ValueError, match="have changed since .* in no memory now"):
        filled(model, cache, make_ids(1, 1))


def test_a_model_and_its_cache_go_to_another_process_together() -> None:
    model = make_model()
    message = model, patched(model)
    # As multiprocessing sends them: the tensors of the model go into shared memory on the way.
    sent = ForkingPickler.dumps(message)
    assert model.lm_head.weight.is_shared()
    filled(model, message[1], make_ids(1, 1))
    other, cache = pickle.loads(sent)
    filled(other, cache, make_ids(1, 1))
    assert_equal(cache, message[1])


def test_a_rotary_module_that_was_replaced_is_tried_out_again() -> None:
    model, scaled = make_model(), make_model(rope_parameters=SCALED)
    tqai.patch(model, **SEALING)
    model.model.rotary_emb = scaled.model.rotary_emb
    cache = filled(model, tqai.new_cache(model), make_ids(1, 100))
    own = tuple(scaled.model.rotary_emb.inv_freq.tolist())
    assert {layer.rope.inv_freq for layer in cache.layers} == {own}
    assert tqai.new_cache(model).geometry.ropes[0].inv_freq == own
