"""Continuous batching: each request gets the tokens that it gets alone."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import tqai
from conftest import Models, make_ids, make_model
from tqai import _core
from tqai.transformers.cache.cache import TqaiCache
from tqai.transformers.serving import paged
from transformers import CompileConfig, GenerationConfig

if not paged.serves_requests():
    pytest.skip("a paged cache of another interface", allow_module_level=True)

from transformers.generation.configuration_utils import ContinuousBatchingConfig

SEALING = {"residual_window": 16, "sink_tokens": 2}
NEW = 40
LENGTHS = (3, 17, 60, 64, 100, 130, 200, 5)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [make_ids(1, length, seed=length)[0].tolist() for length in lengths]


def config(**more: Any) -> GenerationConfig:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return GenerationConfig(**{**options, **more})


def batching(**more: Any) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{"num_blocks": 100, "page_size": 32, **more})


def alone(model: Any, prompt: list[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    return model.generate(ids, **options)[0, len(prompt) :].tolist()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[paged.PackedPagedCache]:
    """All paged caches that are made in the test."""
    caches: list[paged.PackedPagedCache] = []
    init = paged.PackedPagedCache.__init__

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        caches.append(self)

    monkeypatch.setattr(paged.PackedPagedCache, "__init__", note)
    return caches


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("qwen2", "sdpa"),
        ("mistral", "sdpa"),
        ("mistral_wide", "eager"),
        ("gemma2", "eager"),
        ("gpt_oss", "eager"),
    ],
)
def test_eight_requests_of_different_lengths_get_their_own_tokens(
    family: str, attention: str, made: list[paged.PackedPagedCache]
) -> None:
    model = make_model(family, attn_implementation=attention)
    tqai.patch(model, **SEALING)
    given = prompts()
    expected = [alone(model, prompt) for prompt in given]
    results = model.generate_batch(
        given, generation_config=config(), continuous_batching_config=batching()
    )
    assert [result.error for result in results.values()] == [None] * 8
    assert [result.generated_tokens for result in results.values()] == expected
    assert len(made) == 1 and made[0].cache_tensor.device.type == "meta"
    assert not made[0].tqai_requests.caches  # those that have ended hold nothing


def test_requests_join_and_leave(models: Models, made: list[paged.PackedPagedCache]) -> None:
    model = models()
    tqai.patch(model, **SEALING)
    given = prompts()
    expected = [alone(model, prompt) for prompt in given]
    manager = model.init_continuous_batching(
        generation_config=config(), continuous_batching_config=batching(max_requests_per_batch=4)
    )
    manager.start()
    try:
        endless = manager.add_request([3, 4, 5], max_new_tokens=1500)
        names = []
        for prompt in given:
            names.append(manager.add_request(prompt, max_new_tokens=NEW))
            time.sleep(0.02)
        results = {}
        end = time.time() + 60
        while len(results) < len(given) and time.time() < end:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                results[result.request_id] = result.generated_tokens
        assert endless in made[0].tqai_requests.caches
        manager.cancel_request(endless)
        while made[0].tqai_requests.caches and time.time() < end:
            time.sleep(0.01)
        assert not made[0].tqai_requests.caches
    finally:
        manager.stop(block=True, timeout=20)
        manager.destroy()
    assert [results[name] for name in names] == expected


def test_a_prompt_longer_than_a_pass_keeps_others_as_they_are(models: Models) -> None:
    model = models()
    tqai.patch(model, **SEALING)
    given = prompts((300, 40))
    expected = [alone(model, given[0]), alone(model, given[1])]
    results = model.generate_batch(
        given, generation_config=config(), continuous_batching_config=batching(max_batch_tokens=64)
    )
    tokens = [result.generated_tokens for result in results.values()]
    assert [len(each) for each in tokens] == [NEW, NEW] and tokens[1] == expected[1]


def test_several_answers_share_the_tiles_of_their_prompt(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models()
    tqai.patch(model, **SEALING)
    prompt = prompts((100,))[0]
    expected = alone(model, prompt)
    shared = []
    fork = paged.Requests.fork

    def note(self: Any, request: str, copies: list[str], tokens: int) -> None:
        before = _core.allocated_bytes()
        fork(self, request, copies, tokens)
        shared.append((len(copies), _core.allocated_bytes() - before, self.caches[request].nbytes))

    monkeypatch.setattr(paged.Requests, "fork", note)
    results = model.generate_batch(
        [prompt],
        generation_config=config(num_return_sequences=3, do_sample=True, top_k=1),
        continuous_batching_config=batching(),
    )
    assert [result.generated_tokens for result in results.values()] == [expected] * 3
    assert shared
    for copies, grown, held in shared:
        assert copies == 2 and grown < held / 2


def test_as_many_requests_fit_as_packed_bytes_do(
    models: Models, made: list[paged.PackedPagedCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the memory of two uncompressed requests, and no more than that is taken."""
    model = models()
    tqai.patch(model, bits_k=2, bits_v=2, **SEALING)
    given = prompts((200,) * 8)
    expected = [alone(model, prompt, 10) for prompt in given]
    at_once, held = [0], [0]
    end_pass = paged.Requests.end_pass

    def note(self: Any) -> None:
        end_pass(self)
        at_once.append(len(self.caches))
        held.append(self.nbytes())

    monkeypatch.setattr(paged.Requests, "end_pass", note)
    blocks = 2 * (200 + NEW) // 32
    results = model.generate_batch(
        given,
        generation_config=config(max_new_tokens=10),
        continuous_batching_config=batching(num_blocks=blocks),
    )
    assert [result.generated_tokens for result in results.values()] == expected
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    plain = blocks * 32 * model.config.num_hidden_layers * 2 * heads * dim * 4
    capacity = made[0].tqai_capacity
    assert plain <= capacity.budget < plain * 1.1
    assert max(at_once) >= 4
    # Counted with what waits for sealing, and without the library's own lists.
    assert max(held) < capacity.budget * 1.1
    assert capacity.used == 0 and made[0].num_blocks in (blocks, blocks + 1)


def test_requests_that_outgrow_the_memory_begin_anew(models: Models) -> None:
    """As with the plain cache: some are put back into the queue, and all of them end."""
    model = models()
    tqai.patch(model, **SEALING)
    given = prompts((60,) * 6)
    results = model.generate_batch(
        given,
        generation_config=config(max_new_tokens=100),
        continuous_batching_config=batching(num_blocks=8),
    )
    assert [result.error for result in results.values()] == [None] * 6
    assert [len(result.generated_tokens) for result in results.values()] == [100] * 6


def test_a_request_alone_may_take_all_there_is(models: Models) -> None:
    model = models()
    tqai.patch(model, **SEALING)
    [prompt] = prompts((200,))
    results = model.generate_batch(
        [prompt, prompt[:20]],
        generation_config=config(),
        continuous_batching_config=batching(num_blocks=5),
    )
    tokens = [result.generated_tokens for result in results.values()]
    assert tokens == [alone(model, prompt), alone(model, prompt[:20])]


def test_layers_that_stay_exact(models: Models) -> None:
    model = models()
    tqai.patch(model, skip_layers=[0], **SEALING)
    given = prompts((100, 7))
    expected = [alone(model, prompt) for prompt in given]
    results = model.generate_batch(
        given, generation_config=config(), continuous_batching_config=batching()
    )
    assert [result.generated_tokens for result in results.values()] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_async_batching": True}, "use_async_batching"),
        ({"cpu_offload_space": 1.0}, "cpu_offload_space"),
        ({"varlen_compile_config": CompileConfig(backend="eager")}, "varlen_compile_config"),
        ({"default_compile_level": 1}, "default_compile_level"),
    ],
)
def test_what_needs_the_plain_cache_is_refused(
    models: Models, options: dict[str, Any], message: str
) -> None:
    model = models()
    tqai.patch(model)
    manager = model.init_continuous_batching(
        generation_config=config(), continuous_batching_config=batching(**options)
    )
    with pytest.raises(NotImplementedError, match=message):
        manager.warmup()


def test_a_plain_paged_cache_in_a_patched_model_is_refused(models: Models) -> None:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    model = models()
    tqai.patch(model)
    plain = PagedAttentionCache.__new__(PagedAttentionCache)
    with pytest.raises(NotImplementedError, match=r"continuous batching.*tqai.unpatch\(model\)"):
        model(make_ids(), cache=plain)


def test_unpatched_the_model_has_its_own_again(models: Models) -> None:
    model = models()
    tqai.patch(model)
    tqai.unpatch(model)
    given = prompts((20, 7))
    results = model.generate_batch(
        given, generation_config=config(), continuous_batching_config=batching()
    )
    expected = [alone(model, prompt) for prompt in given]
    assert [result.generated_tokens for result in results.values()] == expected


def kept(model: Any, given: list[list[int]]) -> Any:
    """The manager that the model keeps when it has given the right answers."""
    expected = [alone(model, prompt) for prompt in given]
    results = model.generate_batch(
        given,
        generation_config=config(),
        continuous_batching_config=batching(),
        persistent_manager=True,
    )
    assert [result.generated_tokens for result in results.values()] == expected
    return model._cached_continuous_batching_manager


def test_a_manager_that_is_kept_is_used_again_until_the_patch_changes(
    made: list[paged.PackedPagedCache],
) -> None:
    model = make_model("llama")
    given = prompts((60, 100))
    plain = kept(model, given)
    tqai.patch(model, **SEALING)
    first = kept(model, given)
    assert first is not plain and first is kept(model, given)
    assert len(made) == 1
    tqai.patch(model, bits_k=3, **SEALING)
    other = kept(model, given)
    assert other is not first and len(made) == 2
    tqai.unpatch(model)
    assert not hasattr(model, "_cached_continuous_batching_manager")
    assert kept(model, given) is not other and len(made) == 2


def poison(model: Any, token: int) -> None:
    """Makes a token's keys NaN."""
    model.get_input_embeddings().weight.data[token] = float("nan")


@pytest.mark.parametrize("max_batch_tokens", [1024, 48])
def test_what_one_request_holds_is_no_error_of_the_others(
    made: list[paged.PackedPagedCache], max_batch_tokens: int
) -> None:
    model = make_model("llama")
    tqai.patch(model, **SEALING)
    given = prompts((17, 40, 30))
    expected = [alone(model, prompt) for prompt in given]
    bad = next(token for token in range(127, 2, -1) if token not in sum(given + expected, []))
    poison(model, bad)
    given.insert(1, [*given[0], bad, *given[0]])
    results = list(
        model.generate_batch(
            given,
            generation_config=config(),
            continuous_batching_config=batching(max_batch_tokens=max_batch_tokens),
        ).values()
    )
    assert "NaN" in str(results[1].error) and not results[1].generated_tokens
    del results[1]
    assert [result.error for result in results] == [None] * 3
    assert [result.generated_tokens for result in results] == expected
    assert not made[0].tqai_requests.caches and not made[0].tqai_requests.failed


def test_a_token_that_a_request_writes_can_end_it_alone() -> None:
    model = make_model("llama")
    tqai.patch(model, **SEALING)
    given = prompts((17, 40, 30, 60))
    expected = [alone(model, prompt) for prompt in given]
    seen = sum(given, [])
    row, at = next(
        (row, at)
        for row, tokens in enumerate(expected)
        for at, token in enumerate(tokens[:-1])
        if token not in seen and not any(token in other for other in expected if other != tokens)
    )
    poison(model, expected[row][at])
    results = list(
        model.generate_batch(
            given,
            generation_config=config(),
            continuous_batching_config=batching(return_logprobs=True),
        ).values()
    )
    assert "NaN" in str(results[row].error)
    assert results[row].generated_tokens[: at + 1] == expected[row][: at + 1]
    for other, result in enumerate(results):
        if other != row:
            assert result.generated_tokens == expected[other] and result.error is None
            assert len(result.logprobs) == NEW


def test_a_prompt_of_no_tokens_is_no_error_of_the_others(models: Models) -> None:
    model = models()
    tqai.patch(model, **SEALING)
    given = prompts((20, 7))
    expected = [alone(model, prompt) for prompt in given]
    results = model.generate_batch(
        [given[0], [], given[1]], generation_config=config(), continuous_batching_config=batching()
    )
    tokens = [result.generated_tokens for result in results.values()]
    assert [tokens[0], tokens[2]] == expected


def test_answers_to_a_prompt_that_cannot_be_cached_all_fail(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models()
    tqai.patch(model, **SEALING)
    update = TqaiCache.update

    def refuse(self: TqaiCache, keys: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if keys.shape[2] == 29:  # all but the last of a prompt that is answered several times
            raise ValueError("refused")
        return update(self, keys, *args, **kwargs)

    monkeypatch.setattr(TqaiCache, "update", refuse)
    results = model.generate_batch(
        prompts((30, 20)),
        generation_config=config(num_return_sequences=3, do_sample=True, top_k=1),
        continuous_batching_config=batching(),
    )
    assert {name: result.error for name, result in results.items()} == {
        **dict.fromkeys(["req_0", "req_0__child#0", "req_0__child#1"], "refused"),
        **dict.fromkeys(["req_1", "req_1__child#0", "req_1__child#1"]),
    }
