"""Ctrl-C at any moment: what has ended stays, the rest is undone, and what follows is the same.

Each kind of work is done once as it is, which gives the states that a cache has between forward
passes, and then again and again with an interrupt at a random moment. ``TQAI_TEST_INTERRUPTS=300``
makes so many of them instead of a few; ``TQAI_TEST_SEED`` chooses others.
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import tqai
import transformers
from caches import SEALING
from conftest import SMALL, TRANSFORMERS_4, make_ids, make_model
from test_matrix import FAMILIES as MATRIX
from tqai.transformers.model.geometry import decoder_of
from tqai.transformers.model.names import cache_argument

Work = Callable[[Any, Any], None]
"""Takes a patched model and an empty cache of its."""

SEED = int(os.environ.get("TQAI_TEST_SEED", "0"))


class Interrupt:
    """Raises KeyboardInterrupt when so many functions have been entered or left; never for 0."""

    def __init__(self, moment: int = 0) -> None:
        self.moment = moment
        self.count = 0

    def __enter__(self) -> Interrupt:
        sys.setprofile(self._step)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)
        torch.set_grad_enabled(True)  # torch's own no_grad() may have been interrupted, too

    def _step(self, *_: Any) -> None:
        self.count += 1
        if self.count == self.moment:
            raise KeyboardInterrupt


def state_of(cache: Any) -> str:
    """A digest of all that the layers hold."""
    copied = copy.deepcopy(cache)
    copied.end_pass()  # what may be sealed is, whenever that would be done
    digest = hashlib.sha1()
    for part in copied._parts():
        for layer in part.layers:
            held: list[Any] = [getattr(layer, "keys", None), getattr(layer, "values", None)]
            for name in ("conv_states", "recurrent_states"):
                held += getattr(layer, name, {}).values()
            for tensor in held:
                if tensor is not None and tensor.any():  # recurrent states start as zeros
                    digest.update(tensor.contiguous().clone().view(torch.uint8).numpy().tobytes())
            digest.update(b"next layer")
    return digest.hexdigest()


def watched(model: Any, cache: Any) -> Iterator[dict[str, list[Any]]]:
    """The states of `cache` from now on, when a pass or another change has ended, with copies."""
    states: dict[str, list[Any]] = {}

    def keep(*_: Any) -> None:
        states.setdefault(state_of(cache), []).append(copy.deepcopy(cache))

    def kept(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = change(self, *args, **kwargs)
            if self is cache:
                keep()
            return result

        return call

    keep()
    hook = decoder_of(model).register_forward_hook(keep)
    with pytest.MonkeyPatch.context() as patches:
        for name in ("crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices"):
            patches.setattr(type(cache), name, kept(getattr(type(cache), name)))
        yield states
    hook.remove()


def passes(sizes: tuple[int, ...], batch: int = 2, padding: int = 0) -> Work:
    """Forward passes of so many tokens each."""
    ids = make_ids(batch, sum(sizes))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0

    def work(model: Any, cache: Any) -> None:
        at = 0
        for size in sizes:
            seen = at + size
            given = {"attention_mask": mask[:, :seen]} if padding else {}
            with torch.no_grad():
                model(ids[:, at:seen], **cache_argument(model, cache), **given)
            at = seen

    return work


def generates(tokens: int, batch: int = 1, **options: Any) -> Work:
    """A call of ``generate`` for 12 tokens."""
    ids = make_ids(batch, tokens)
    if "prompt_lookup_num_tokens" in options:
        ids = ids[:, : tokens // 2].repeat(1, 2)
    options = {"do_sample": False, "eos_token_id": 999, "pad_token_id": 0, **options}

    def work(model: Any, cache: Any) -> None:
        model.generate(ids, past_key_values=cache, max_new_tokens=12, **options)

    return work


def of_matrix(family: str, **options: Any) -> Any:
    name, fields = MATRIX[family]
    torch.manual_seed(1)
    config = getattr(transformers, name)(**{**SMALL, **fields, **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def bart() -> Any:
    torch.manual_seed(1)
    names = ("layers", "attention_heads", "ffn_dim")
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder")
             for name, size in zip(names, (2, 4, 96), strict=True)}  # fmt: skip
    config = transformers.BartConfig(
        vocab_size=128, d_model=64, max_position_embeddings=512, decoder_start_token_id=2, **sizes
    )
    return transformers.BartForConditionalGeneration(config).eval()


STEPS = (70, 1, 1, 1, 90, 5, 1, 60, *(1,) * 10)
KINDS: dict[str, tuple[Callable[[], Any], dict[str, Any], Work]] = {
    "passes": (make_model, {}, passes(STEPS)),
    "padding": (make_model, {}, passes((30, 60, 1, 1), padding=40)),
    "an exact layer": (lambda: make_model(num_hidden_layers=3), {"skip_layers": [1]},
                       passes(STEPS)),
    "torch operations": (make_model, {"backend": "torch-ops"}, passes(STEPS[:9])),
    "true prefill": (make_model, {"exact_prefill": False}, passes(STEPS[:9])),
    "a window in all layers": (lambda: make_model("mistral"), {}, passes(STEPS)),
    "a window in some layers": (lambda: make_model("gemma2"), {}, passes((150, *STEPS))),
    "a window in an exact layer": (lambda: make_model("gemma2"), {"skip_layers": [0]},
                                   passes((150, *STEPS))),
    "layers that share": (lambda: of_matrix("Gemma 3n"), {}, passes((150, *STEPS))),
    "generate": (make_model, {}, generates(80)),
    "chunks": (make_model, {}, generates(80, prefill_chunk_size=30)),
    "beams": (make_model, {}, generates(80, num_beams=3)),
    "guesses": (make_model, {}, generates(80, prompt_lookup_num_tokens=4)),
    "guesses, a window": (lambda: make_model("mistral"), {},
                          generates(80, prompt_lookup_num_tokens=4)),
    "an encoder": (bart, {}, generates(80)),
    "an encoder, beams": (bart, {}, generates(80, num_beams=2)),
    "recurrent states": (lambda: of_matrix("Qwen3-Next"), {}, passes(STEPS[:4])),
}  # fmt: skip
if TRANSFORMERS_4:
    del KINDS["recurrent states"]

TIMES = int(os.environ.get("TQAI_TEST_INTERRUPTS", str(3 * len(KINDS))))


def after(model: Any, cache: Any) -> torch.Tensor:
    """What the model says next."""
    layers = cache._parts()[0].layers  # some of which read others', and hold nothing
    rows = cache.memory_report()["tokens"] and next(
        layer.batch_size for layer in reversed(layers) if hasattr(layer, "batch_size")
    )
    ids = make_ids(rows or 1, 3, seed=9)
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    given = {name: ids}
    if model.config.is_encoder_decoder:
        given["input_ids"] = make_ids(rows or 1, 80)
    padding = getattr(layers[0], "padding", ())
    if any(padding):
        given["attention_mask"] = torch.ones(rows, cache.get_seq_length() + ids.shape[1]).long()
        for row, count in enumerate(padding):
            given["attention_mask"][row, :count] = 0
    with torch.no_grad():
        return model(**given, past_key_values=cache).logits


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_leaves_what_has_ended(kind: str) -> None:
    make, settings, work = KINDS[kind]
    model = make()
    cache = tqai.patch(model, **SEALING, **settings)
    watching = watched(model, cache)
    states = next(watching)
    work(model, cache)
    next(watching, None)
    assert len(states) > 3
    with Interrupt() as counted:
        work(model, tqai.new_cache(model))

    chosen = random.Random(f"{kind} {SEED}")
    names = list(KINDS)
    lost = 0
    for _ in range(TIMES // len(KINDS) + (names.index(kind) < TIMES % len(KINDS))):
        moment = chosen.randint(1, counted.count)
        cache = tqai.new_cache(model)
        try:
            with Interrupt(moment):
                work(model, cache)
        except KeyboardInterrupt:
            pass
        where = f"{kind}: interrupted at {moment} of {counted.count}"
        try:
            said = after(model, copy.deepcopy(cache))
        except RuntimeError as error:
            assert kind == "recurrent states" and "did not end" in str(error), where
            lost += 1
            continue
        state = state_of(cache)
        assert state in states, where
        # What a window has left, and only the copy still holds, makes no difference.
        ended = [after(model, copy.deepcopy(other)) for other in states[state]]
        assert any(torch.equal(said, other) for other in ended), where
        assert torch.equal(said, after(model, cache)), where
    if kind == "recurrent states" and TIMES >= 100:
        assert lost > 0
