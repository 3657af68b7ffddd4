from __future__ import annotations

import copy
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
from caches import assert_equal, filled
from conftest import FAMILIES, Models, make_ids, make_model
from damages import CORRUPTIONS, damage
from redis_server import Server, skip_without_redis
from tqai import PrefixStore
from tqai.exchange import envelope
from tqai.exchange.envelope import NotUsable
from tqai.transformers.prefixes import chains
from tqai.transformers.prefixes import store as prefix_store

SMALL = {"residual_window": 16, "sink_tokens": 2}
TOKENS = 16 + 2 + 3 * 64 + 10
"""Of prompts whose first three blocks can be stored."""
HELD = 2 + 3 * 64
NEVER = {"eos_token_id": 129, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 8}


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*prefix store.*")
        yield


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def generate(model: Any, ids: Any, **options: Any) -> Any:
    options.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **{**NEVER, **options})


def in_process(model: Any, ids: Any, tokens: int = HELD) -> Any:
    """A cache that has read `ids` itself, of which it holds the first `tokens`, all as codes."""
    cache = filled(model, tqai.new_cache(model), ids)
    cache.crop(tokens - cache.get_seq_length())
    return cache


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "falcon", "diffllama"])
def test_what_is_loaded_is_what_a_cache_of_this_process_holds(
    models: Models, url: str, family: str
) -> None:
    model, ids = models(family), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    store = PrefixStore(url)
    assert store.load(model, ids).is_empty()
    cache = filled(model, tqai.new_cache(model), ids)
    assert store.save(cache, ids) == 3
    loaded = PrefixStore(url).load(model, ids)
    assert loaded.get_seq_length() == HELD
    assert_equal(loaded, in_process(model, ids))
    for layer, own in zip(loaded.layers, in_process(model, ids).layers, strict=True):
        if layer.core is not None:
            assert layer.core.serialize() == own.core.serialize()
    assert store.save(cache, ids) == 0


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt_oss"])
def test_generate_reads_only_the_rest_and_says_the_same(
    models: Models, url: str, family: str
) -> None:
    model, ids = models(family), make_ids(1, TOKENS)
    tqai.patch(model, bits_k=8, bits_v=8, **SMALL)
    expected = generate(model, ids)
    store = PrefixStore(url)
    store.attach(model)
    read: list[int] = []
    decoder = model.get_decoder()
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((*args, kwargs.get("input_ids"))[0].shape[1]),
        with_kwargs=True,
    )
    try:
        assert torch.equal(generate(model, ids), expected)
        assert read[0] == TOKENS
        read.clear()
        assert torch.equal(generate(model, ids), expected)
    finally:
        hook.remove()
    assert read[0] == TOKENS - HELD
    assert store.report() == {
        "prompts": 2,
        "hits": 1,
        "loaded_tokens": HELD,
        "stored_blocks": 3,
        "unusable_entries": 0,
        "failures": 0,
    }


def test_prompts_share_what_they_begin_with(models: Models, url: str) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    store = PrefixStore(url)
    store.attach(model)
    generate(model, ids)
    other = ids.clone()
    other[0, 2 + 64 + 5 :] = make_ids(1, TOKENS, seed=9)[0, 2 + 64 + 5 :]
    generate(model, other)
    assert store.report()["loaded_tokens"] == 2 + 64
    assert store.report()["stored_blocks"] == 3 + 2
    another = ids.clone()
    another[0, 0] += 1
    assert store.load(model, another).is_empty()


def test_what_was_written_is_a_prefix_too(models: Models, url: str) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    store = PrefixStore(url)
    store.attach(model)
    answer = generate(model, ids, max_new_tokens=70)
    question = torch.cat([answer, make_ids(1, 20, seed=3)], 1)
    assert store.load(model, question).get_seq_length() == HELD + 64
    generate(model, question)
    assert store.report()["loaded_tokens"] == HELD + 64 + HELD + 64


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
        {"output_scores": True, "return_dict_in_generate": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_of_generating(models: Models, url: str, options: dict[str, Any]) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, bits_k=8, bits_v=8, **SMALL)

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        result = generate(model, ids, **options)
        return getattr(result, "sequences", result)

    expected = run()
    store = PrefixStore(url)
    store.attach(model)
    assert torch.equal(run(), expected)
    assert torch.equal(run(), expected)
    rows = max(len(expected), options.get("num_beams", 1))
    # Over a part of the prompt it gives other tokens, also with transformers' own cache.
    loaded = 0 if "prompt_lookup_num_tokens" in options else rows * HELD
    assert store.report()["loaded_tokens"] == loaded
    assert store.report()["stored_blocks"] >= 3


def test_rows_of_different_lengths_share_a_prefix(models: Models, url: str) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, bits_k=8, bits_v=8, **SMALL)
    store = PrefixStore(url)
    store.attach(model)
    generate(model, ids)
    short = 21
    batch = torch.cat(
        [ids, torch.cat([torch.zeros(1, short, dtype=torch.long), ids[:, :-short]], 1)]
    )
    mask = torch.ones_like(batch)
    mask[1, :short] = 0
    with_store = generate(model, batch, attention_mask=mask)
    # Both rows hold as many tokens, padding included: so many as the second one's two blocks.
    assert store.report()["hits"] == 1
    assert store.report()["loaded_tokens"] == (2 + 128 + short) + (2 + 128)
    store.detach(model)
    assert torch.equal(generate(model, batch, attention_mask=mask), with_store)
    loaded = store.load(model, batch, mask)
    assert loaded.layers[0].padding == [0, short]
    one = store.load(model, ids)
    keys = loaded.layers[0].keys
    assert torch.equal(keys[1, :, short : short + 130], one.layers[0].keys[0, :, :130])


def test_a_row_without_a_prefix_leaves_the_batch_to_be_read(models: Models, url: str) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    store = PrefixStore(url)
    store.attach(model)
    generate(model, ids)
    generate(model, torch.cat([ids, make_ids(1, TOKENS, seed=5)]))
    assert store.report()["hits"] == 0
    assert store.report()["stored_blocks"] == 6
    generate(model, torch.cat([ids, make_ids(1, TOKENS, seed=5)]))
    assert store.report()["loaded_tokens"] == 2 * HELD


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight": lambda model: model.model.layers[0].mlp.up_proj.weight.data.mul_(1.001),
    "bits": lambda model: tqai.patch(model, bits_k=3, **SMALL),
    "values' bits of one layer": lambda model: tqai.patch(model, bits_v={1: 3}, **SMALL),
    "the seed": lambda model: tqai.patch(model, seed=5, **SMALL),
    "the window": lambda model: tqai.patch(model, residual_window=17, sink_tokens=2),
    "sinks": lambda model: tqai.patch(model, residual_window=16, sink_tokens=3),
    "the codec": lambda model: tqai.patch(model, codec="trellis", **SMALL),
    "centring": lambda model: tqai.patch(model, centering="none", **SMALL),
    "how prompts are read": lambda model: tqai.patch(model, exact_prefill=False, **SMALL),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_or_setting_finds_nothing(url: str, change: str) -> None:
    model, ids = make_model(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    store = PrefixStore(url)
    store.save(filled(model, tqai.new_cache(model), ids), ids)
    assert not store.load(model, ids).is_empty()
    CHANGES[change](model)
    assert store.load(model, ids).is_empty()
    assert store.report()["unusable_entries"] == 0


def test_a_constant_of_the_configuration_is_another_model(url: str) -> None:
    ids = make_ids(1, TOKENS)
    for eps in (1e-5, 1e-6):
        model = make_model(rms_norm_eps=eps)
        tqai.patch(model, **SMALL)
        store = PrefixStore(url)
        assert store.load(model, ids).is_empty()
        store.save(filled(model, tqai.new_cache(model), ids), ids)


@pytest.mark.parametrize("codec", ["trellis", "adaptive"])
def test_codecs(url: str, codec: str) -> None:
    model, ids = make_model(), make_ids(1, TOKENS)
    tqai.patch(model, codec=codec, **SMALL)
    store = PrefixStore(url)
    store.save(filled(model, tqai.new_cache(model), ids), ids)
    assert_equal(store.load(model, ids), in_process(model, ids))


def test_torch_operations_share_entries_with_the_kernels(url: str) -> None:
    model, ids = make_model(), make_ids(1, TOKENS)
    tqai.patch(model, backend="torch-ops", **SMALL)
    store = PrefixStore(url)
    store.save(filled(model, tqai.new_cache(model), ids), ids)
    held = store.load(model, ids).layers[1].core.serialize()
    tqai.patch(model, **SMALL)
    assert store.load(model, ids).layers[1].core.serialize() == held


def test_bounded_and_the_start_of_a_text_leaves_last(models: Models, url: str) -> None:
    model, ids = models(), make_ids(1, 16 + 2 + 6 * 64)
    tqai.patch(model, **SMALL)
    unbounded = PrefixStore(url + "-whole")
    cache = filled(model, tqai.new_cache(model), ids)
    assert unbounded.save(cache, ids) == 6
    most = unbounded.used_bytes() * 6 // 5
    store = PrefixStore(url, max_bytes=most)
    assert store.save(cache, ids) == 6
    other = make_ids(1, 16 + 2 + 3 * 64, seed=1)
    assert store.save(filled(model, tqai.new_cache(model), other), other) == 3
    assert store.used_bytes() <= most
    assert store.load(model, other).get_seq_length() == 2 + 3 * 64
    assert 2 <= store.load(model, ids).get_seq_length() // 64 < 6


@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_a_store_that_is_smaller_than_a_text_holds_its_beginning(
    models: Models, url: str, tmp_path: Path, kind: str
) -> None:
    model, ids = models(), make_ids(1, 16 + 2 + 6 * 64)
    tqai.patch(model, **SMALL)
    cache = filled(model, tqai.new_cache(model), ids)
    whole = PrefixStore(url + "-whole")
    whole.save(cache, ids)
    server = Server(tmp_path)
    if kind == "redis":
        skip_without_redis()
        server.start()
        url = server.url
    try:
        store = PrefixStore(url, max_bytes=whole.used_bytes() * 2 // 3)
        with pytest.warns(UserWarning, match="only its first .* are kept; give the store more"):
            kept = store.save(cache, ids)
        assert 2 <= kept < 6
        for _ in range(3):
            assert store.used_bytes() <= store.max_bytes
            assert store.load(model, ids).get_seq_length() == 2 + 64 * kept
            assert store.save(cache, ids) == 0  # and nothing more is said
    finally:
        server.kill()


def test_a_text_that_is_stored_does_not_push_its_own_beginning_out(
    models: Models, url: str
) -> None:
    model, ids = models(), make_ids(1, 16 + 2 + 6 * 64)
    tqai.patch(model, **SMALL)
    cache = filled(model, tqai.new_cache(model), ids)
    whole = PrefixStore(url + "-whole")
    whole.save(cache, ids)
    store = PrefixStore(url, max_bytes=whole.used_bytes() * 6 // 5)
    beginning = copy.deepcopy(cache)
    beginning.crop(2 + 64 * 2 + 16)
    assert store.save(beginning, ids[:, : 2 + 64 * 2 + 16]) == 2
    other = make_ids(1, 16 + 2 + 3 * 64, seed=1)
    assert store.save(filled(model, tqai.new_cache(model), other), other) == 3
    assert store.save(cache, ids) == 4  # the other one leaves, which was used later
    assert store.load(model, ids).get_seq_length() == 2 + 6 * 64


def test_what_generate_gives_of_each_token_is_given_of_all(models: Models, url: str) -> None:
    model, ids = models(attn_implementation="eager"), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    store = PrefixStore(url)
    store.attach(model)
    options = {
        "output_hidden_states": True,
        "output_attentions": True,
        "return_dict_in_generate": True,
    }
    for hits in (0, 0, 1):
        if hits:
            generate(model, ids)
        assert store.report()["hits"] == hits
        out = generate(model, ids, **options)
        assert [each.shape[1] for each in out.hidden_states[0]] == [TOKENS] * 3
        assert [tuple(each.shape[2:]) for each in out.attentions[0]] == [(TOKENS, TOKENS)] * 2


def test_rows_with_adapters_of_their_own_are_not_served(url: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(), lora, adapter_name="a")
    model.add_adapter("b", lora)
    base, ids = model.eval().get_base_model(), make_ids(1, TOKENS)
    tqai.patch(base, bits_k=8, bits_v=8, **SMALL)

    def answer(adapter: str) -> Any:
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=[adapter], **NEVER
        )

    alone = answer("b")
    store = PrefixStore(url)
    store.attach(base)
    with pytest.warns(UserWarning, match="adapters of their own .*does nothing for this call"):
        answer("a")
    assert torch.equal(answer("b"), alone)
    assert store.report()["stored_blocks"] == store.report()["hits"] == 0
    for hits in (0, 1):
        generate(base, ids)
        assert store.report()["hits"] == hits


def test_an_entry_is_of_the_autocast_that_it_was_read_under(models: Models, url: str) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, bits_k=8, bits_v=8, **SMALL)
    store = PrefixStore(url)
    store.attach(model)
    plain = generate(model, ids)
    for hits in (0, 1):
        with torch.autocast("cpu", torch.bfloat16):
            generate(model, ids)
        assert store.report()["hits"] == hits
    assert torch.equal(generate(model, ids), plain) and store.report()["hits"] == 2
    with torch.autocast("cpu", torch.bfloat16):
        cache = filled(model, tqai.new_cache(model), ids)
    assert store.save(cache, ids) == 0  # it is there, of autocast
    assert store.load(model, ids).layers[0].dtypes == (torch.float32, torch.float32)


def entries(url: str) -> list[Path]:
    return sorted(Path(url).glob("*/*.tqai"))


def test_any_damaged_entry_is_a_miss_with_one_warning(models: Models, url: str) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, bits_k=8, bits_v=8, **SMALL)
    expected = generate(model, ids)
    PrefixStore(url).save(filled(model, tqai.new_cache(model), ids), ids)
    whole = {path: path.read_bytes() for path in entries(url)}
    assert len(whole) == 4
    chance = random.Random(0)
    for path, data in whole.items():
        for damaged in (
            data[: len(data) // 2],
            b"",
            bytes([*data[:-1], data[-1] ^ 1]),
            next(other for other in whole.values() if other != data),
            chance.randbytes(len(data)),
            data[:8] + b"\x09" + data[9:],  # of another version
        ):
            for each, was in whole.items():
                each.write_bytes(was)
            path.write_bytes(damaged)
            store = PrefixStore(url)
            store.attach(model)
            with pytest.warns(UserWarning, match="an entry of the prefix store .* is not used"):
                assert torch.equal(generate(model, ids), expected)
            assert store.report()["unusable_entries"] == 1
            # It was stored anew.
            assert torch.equal(generate(model, ids), expected)
            assert store.report()["loaded_tokens"] >= HELD
            store.detach(model)


def test_nothing_that_was_damaged_is_ever_used(models: Models, url: str) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    cache = filled(model, tqai.new_cache(model), ids)
    PrefixStore(url).save(cache, ids)
    facts, chance = chains.facts_of(cache), random.Random(3)
    whole = [(path.stem, path.read_bytes()) for path in entries(url)]
    for _ in range(CORRUPTIONS):
        name, data = chance.choice(whole)
        damaged = damage(data, chance)
        if damaged[: len(data)] == data:
            continue
        kind = "centres" if b'"kind":"centres"' in data else "block"
        with pytest.raises(NotUsable):
            envelope.opened(damaged, kind, {**facts, "name": name})


def test_centres_that_have_left_are_a_miss_and_come_back(models: Models, url: str) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    cache = filled(model, tqai.new_cache(model), ids)
    store = PrefixStore(url)
    store.save(cache, ids)
    [centres] = [path for path in entries(url) if b'"kind":"centres"' in path.read_bytes()]
    centres.unlink()
    assert store.load(model, ids).is_empty()
    assert store.report()["unusable_entries"] == 0


def test_a_store_that_fails_is_said_once_and_left_alone_for_a_while(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    expected = generate(model, ids)
    (tmp_path / "file").write_text("in the way")
    store = PrefixStore(str(tmp_path / "file"))
    store.attach(model)
    with pytest.warns(UserWarning, match="the prefix store failed") as said:
        assert torch.equal(generate(model, ids), expected)
        assert torch.equal(generate(model, ids), expected)
    assert len([w for w in said if "prefix store" in str(w.message)]) == 1
    assert store.report()["failures"] == 1
    (tmp_path / "file").unlink()
    monkeypatch.setattr(prefix_store, "_PAUSE", 0.0)
    store._paused_until["load"] = store._paused_until["store"] = 0.0
    generate(model, ids)
    generate(model, ids)
    assert store.report()["hits"] == 1


def test_a_folder_that_takes_nothing_is_read_from(models: Models, url: str) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    PrefixStore(url).save(filled(model, tqai.new_cache(model), ids), ids)
    (Path(url) / "lock").unlink()
    (Path(url) / "lock").mkdir()  # in the way of writers, also where they are root
    store = PrefixStore(url)
    store.attach(model)
    longer = torch.cat([ids, make_ids(1, 90, seed=4)], 1)
    with pytest.warns(UserWarning, match="nothing is stored") as said:
        for _ in range(2):
            generate(model, longer)
    assert len([w for w in said if "prefix store" in str(w.message)]) == 1
    assert store.report()["hits"] == 2 and store.report()["failures"] == 1


def test_a_full_disk_is_said_once_and_what_is_there_is_read(
    models: Models, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    PrefixStore(url).save(filled(model, tqai.new_cache(model), ids), ids)
    held = {path: path.read_bytes() for path in entries(url)}
    store = PrefixStore(url)
    store.attach(model)
    longer = torch.cat([ids, make_ids(1, 90, seed=4)], 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.warns(UserWarning, match="nothing is stored") as said:
            expected = generate(model, longer)
            assert torch.equal(generate(model, longer), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len([w for w in said if "prefix store" in str(w.message)]) == 1
    assert {path: path.read_bytes() for path in entries(url)} == held
    assert not list(Path(url).rglob("*.part"))
    monkeypatch.setattr(prefix_store, "_PAUSE", 0.0)
    store._paused_until["store"] = 0.0
    generate(model, longer)
    assert store.report()["stored_blocks"] >= 1


def test_models_share_a_store(url: str) -> None:
    ids = make_ids(1, TOKENS)
    pair = [make_model(), make_model(seed=2), make_model("gemma2")]
    stores = []
    for model in pair:
        tqai.patch(model, bits_k=8, bits_v=8, **SMALL)
        expected = generate(model, ids)
        stores.append(PrefixStore(url))
        stores[-1].attach(model)
        for _ in range(2):
            assert torch.equal(generate(model, ids), expected)
    assert [store.report()["loaded_tokens"] for store in stores] == 3 * [HELD]


def test_chat_templates_in_a_padded_batch(models: Models, url: str) -> None:
    """Turns of conversations of different lengths, as templates begin them: all alike."""
    model, start = models(), make_ids(1, 2 + 64 + 30)
    tqai.patch(model, bits_k=8, bits_v=8, **SMALL)
    store = PrefixStore(url)
    store.attach(model)
    turns = [torch.cat([start, make_ids(1, n, seed=n)], 1) for n in (40, 75)]
    for turn in turns:
        generate(model, turn)
    assert store.report()["loaded_tokens"] == 2 + 64
    padded = [
        torch.cat([torch.zeros(1, 171 - turn.shape[1], dtype=torch.long), turn], 1)
        for turn in turns
    ]
    batch = torch.cat(padded)
    mask = torch.ones_like(batch)
    mask[0, :35] = 0
    generate(model, batch, attention_mask=mask)
    assert store.report()["hits"] == 2
    loaded = store.load(model, batch, mask)
    assert loaded.layers[0].padding == [35, 0]


def test_an_address_is_shown_without_its_password() -> None:
    pytest.importorskip("redis")
    assert "secret" not in repr(PrefixStore("redis://me:secret@localhost:1/0"))


def test_calls_that_a_store_cannot_serve_go_on_without(models: Models, url: str) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    store = PrefixStore(url)
    store.attach(model)
    generate(model, ids)
    expected = generate(model, ids, past_key_values=tqai.new_cache(model))
    embeds = model.get_input_embeddings()(ids)
    model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **NEVER)
    generate(model, ids, use_cache=False)
    middle = torch.ones_like(ids)
    middle[0, 5] = 0
    generate(model, ids, attention_mask=middle)
    padded = ids.clone()
    padded[0, :3] = 0  # for padding, as generate sees it
    model.generate(padded, **NEVER)
    assert store.report()["prompts"] == 1
    with pytest.warns(UserWarning, match="generate.. was given position_ids"):
        generate(model, ids, position_ids=torch.arange(TOKENS)[None] + 3)
    assert store.report()["prompts"] == 1
    assert expected.shape == (1, TOKENS + 8)


def test_errors_of_generate_are_its_own(models: Models, url: str) -> None:
    model = models()
    tqai.patch(model)
    PrefixStore(url).attach(model)
    with pytest.raises(ValueError, match="unknown_option"):
        with pytest.warns(UserWarning, match="unknown_option"):
            generate(model, make_ids(), unknown_option=1)


def test_what_cannot_be_served_is_refused_when_it_is_attached(models: Models, url: str) -> None:
    store = PrefixStore(url)
    with pytest.raises(ValueError, match="not patched"):
        store.attach(models())
    tqai.patch(models(), skip_layers=[0])
    with pytest.raises(NotImplementedError, match="layer 0 is a DynamicLayer"):
        store.attach(models())
    with pytest.raises(ValueError, match="no prefix store is attached"):
        store.detach(models())
    for wrong in ({"url": 3}, {"url": url, "max_bytes": 0}, {"url": "http://host"}):
        with pytest.raises(ValueError):
            PrefixStore(**wrong)


def test_unpatch_detaches_and_a_copied_model_keeps_the_store(url: str) -> None:
    model, ids = make_model(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    store = PrefixStore(url)
    store.attach(model)
    generate(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        generate(other, ids)
    assert store.report()["hits"] == 1  # the pickled one's store counts by itself
    tqai.unpatch(model)
    assert "generate" not in vars(model)
    model.generate(ids, attention_mask=torch.ones_like(ids), **NEVER)


def test_patching_again_keeps_the_store_and_goes_by_the_new_settings(
    models: Models, url: str
) -> None:
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    store = PrefixStore(url)
    store.attach(model)
    generate(model, ids)
    tqai.patch(model, bits_v=4, **SMALL)
    generate(model, ids)
    generate(model, ids)
    assert store.report()["hits"] == 1
    assert store.report()["stored_blocks"] == 6


def test_weights_that_change_between_reading_and_storing_store_nothing(url: str) -> None:
    model, ids = make_model(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    cache = filled(model, tqai.new_cache(model), ids)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    store = PrefixStore(url)
    assert store.save(cache, ids) == 0
    assert store.load(model, ids).is_empty()


OTHER_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch, tqai
from conftest import make_ids, make_model
model, ids = make_model(), make_ids(1, int(sys.argv[3]))
tqai.patch(model, bits_k=8, bits_v=8, residual_window=16, sink_tokens=2)
store = tqai.PrefixStore(sys.argv[2])
store.attach(model)
out = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=129, pad_token_id=0,
                     do_sample=False, max_new_tokens=8)
print(json.dumps([store.report(), out.tolist()]))
"""


@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_processes_share_a_store(tmp_path: Path, kind: str) -> None:
    server = Server(tmp_path)
    url = str(tmp_path / "store")
    if kind == "redis":
        skip_without_redis()
        server.start()
        url = server.url
    model, ids = make_model(), make_ids(1, TOKENS)
    tqai.patch(model, bits_k=8, bits_v=8, **SMALL)
    store = PrefixStore(url)
    store.attach(model)
    expected = generate(model, ids)
    try:
        command = [sys.executable, "-c", OTHER_PROCESS, str(Path(__file__).parents[2]), url]
        done = subprocess.run(
            [*command, str(TOKENS)], check=True, capture_output=True, text=True, env=os.environ
        )
    finally:
        server.kill()
    report, out = json.loads(done.stdout.splitlines()[-1])
    assert report["hits"] == 1 and report["loaded_tokens"] == HELD
    assert out == expected.tolist()


def test_processes_that_store_the_same_prompt_at_once(url: str) -> None:
    command = [sys.executable, "-c", OTHER_PROCESS, str(Path(__file__).parents[2]), url]
    writers = [
        subprocess.Popen([*command, str(TOKENS)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [json.loads(writer.communicate()[0].splitlines()[-1]) for writer in writers]
    assert said[0][1] == said[1][1]
    assert all(report["failures"] == 0 for report, _ in said)
    model, ids = make_model(), make_ids(1, TOKENS)
    tqai.patch(model, bits_k=8, bits_v=8, **SMALL)
    assert_equal(PrefixStore(url).load(model, ids), in_process(model, ids))


def test_a_server_killed_in_mid_transfer_is_a_miss_and_keeps_what_it_had(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_redis()
    server = Server(tmp_path)
    server.start("--appendonly", "yes", "--appendfsync", "always")
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, bits_k=8, bits_v=8, **SMALL)
    monkeypatch.setattr(prefix_store, "_PAUSE", 0.0)
    expected = generate(model, ids)
    store = PrefixStore(server.url)
    store.attach(model)
    try:
        generate(model, ids)
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)  # it answers no more, and is killed meanwhile
        killer = threading.Timer(0.3, server.process.kill)
        killer.start()
        with pytest.warns(UserWarning, match="the prefix store failed") as said:
            assert torch.equal(generate(model, ids), expected)
        assert len([w for w in said if "prefix store" in str(w.message)]) == 1
        killer.join()
        server.kill()
        server.start("--appendonly", "yes")
        assert torch.equal(generate(model, ids), expected)
        assert store.report()["hits"] == 1
    finally:
        server.kill()


def test_a_server_killed_in_between_is_a_miss_and_is_found_again(
    tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_redis()
    server = Server(tmp_path)
    server.start()
    model, ids = models(), make_ids(1, TOKENS)
    tqai.patch(model, **SMALL)
    monkeypatch.setattr(prefix_store, "_PAUSE", 0.0)
    store = PrefixStore(server.url)
    store.attach(model)
    expected = generate(model, ids)
    server.kill()
    try:
        with pytest.warns(UserWarning, match="the prefix store failed") as said:
            assert torch.equal(generate(model, ids), expected)
            assert torch.equal(generate(model, ids), expected)
        assert len([w for w in said if "prefix store" in str(w.message)]) == 1
        server.start()
        generate(model, ids)
        generate(model, ids)
        assert store.report()["hits"] == 1
    finally:
        server.kill()
