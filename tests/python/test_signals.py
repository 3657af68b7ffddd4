"""What an application's signal handler raises comes out, wherever it happened to run."""

from __future__ import annotations

import functools
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tqai.exchange.folder_shelf import FolderShelf
from tqai.exchange.shelf import ShelfError
from tqai.signals import is_of_a_handler


class Overdue(TimeoutError):
    """What a handler raises that sets a time limit; an OSError, as its base is."""


def raise_it(*_: Any) -> None:
    raise Overdue("the time is up")


class Limit:
    def on_signal(self, *_: Any) -> None:
        raise_it()

    def __call__(self, *_: Any) -> None:
        raise_it()


Handlers = Callable[[Any], None]


@pytest.fixture
def handled() -> Iterator[Handlers]:
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler) and None
    signal.signal(signal.SIGINT, before)


def interrupt(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "handler",
    [raise_it, Limit().on_signal, Limit(), functools.partial(raise_it, 1)],
    ids=["function", "method", "object", "partial"],
)
def test_a_handlers_error_is_told_from_others(handled: Handlers, handler: Any) -> None:
    handled(handler)
    with pytest.raises(Overdue) as raised:
        interrupt()
    assert is_of_a_handler(raised.value)
    with pytest.raises(OSError) as other:
        open("/nowhere/at/all")
    assert not is_of_a_handler(other.value)


def test_a_shelf_is_not_what_failed(
    handled: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled(raise_it)
    shelf = FolderShelf(tmp_path, 1 << 20)
    monkeypatch.setattr(Path, "read_bytes", interrupt)
    with pytest.raises(Overdue):
        shelf.fetch(["ab"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(Path, "read_bytes", raise_it)  # by the system, as far as can be told
    with pytest.raises(ShelfError):
        shelf.fetch(["ab"])


def test_a_prefix_store_does_not_go_on_without(
    handled: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    import tqai
    from conftest import make_ids, make_model
    from tqai.transformers.prefixes import chains

    model = make_model("llama")
    tqai.patch(model)
    tqai.PrefixStore(str(tmp_path)).attach(model)
    handled(raise_it)
    monkeypatch.setattr(chains, "facts_of", interrupt)
    with warnings.catch_warnings(), pytest.raises(Overdue):
        warnings.simplefilter("error")
        model.generate(make_ids(1, 200), max_new_tokens=2, do_sample=False)


def test_what_is_found_out_about_a_model_is_not_the_worse_for_it(
    handled: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any of the passes in which a model is tried, or learnt from."""
    pytest.importorskip("transformers")
    import tqai
    from conftest import make_model
    from transformers.models.llama.modeling_llama import LlamaAttention

    handled(raise_it)
    forward, calls = LlamaAttention.forward, [0]

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] -= 1
        if calls[0] == 0:
            interrupt()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", counted)
    cut = 0
    for at in (1, 2, 3, 4, 7, 10):
        calls[0] = at
        model = make_model("llama")
        try:
            tqai.patch(model, codec="adaptive")
        except Overdue:
            cut += 1
            assert not tqai.is_patched(model)
    assert cut == 6
    calls[0] = 0
    cache = tqai.patch(make_model("llama"), codec="adaptive")
    assert cache.memory_report()["codecs"] == {"adaptive": 2}
    assert cache.memory_report()["rotary"] == {"half_split": 2}


@pytest.mark.parametrize("patched", [False, True])
def test_a_patch_that_was_cut_short_leaves_the_model_as_it_was(
    handled: Handlers, monkeypatch: pytest.MonkeyPatch, patched: bool
) -> None:
    pytest.importorskip("transformers")
    import tqai
    from conftest import make_model
    from tqai.transformers.attention import original

    handled(raise_it)
    model = make_model("gpt_oss", attn_implementation="eager")
    monkeypatch.setattr(original, "_formulas", {})
    if patched:
        tqai.patch(model, bits_k=8)
    original._formulas.clear()
    probe, times = original._probe, iter([True])

    def once(*args: Any) -> Any:
        if next(times, False):
            interrupt()
        return probe(*args)

    monkeypatch.setattr(original, "_probe", once)
    with pytest.raises(Overdue):
        tqai.patch(model)
    assert tqai.is_patched(model) == patched
    assert type(model.config._attn_implementation).__name__ == ("PatchedName" if patched else "str")
    if patched:
        assert tqai.new_cache(model).settings.bits_k == 8
    tqai.patch(model)
    assert original._formulas and None not in original._formulas.values()
