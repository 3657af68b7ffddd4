"""``tqai run``: answers, conversations and kept prompts of a small model."""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from conftest import VOCABULARY
from tqai import container, new_cache, patch, save_cache
from tqai.cli import kept_prompt, main
from tqai.cli.run import _Conversation
from tqai.transformers.loading import load

LONG = "The quick brown fox jumps over the lazy dog. " * 8
GREEDY = ("--temperature", "0", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    never = VOCABULARY + 1
    return str(toy.folder(tmp_path_factory.mktemp("toy"), chat=True, eos_token_id=never))


@pytest.fixture(autouse=True)
def _nobody_at_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["run", *arguments, *GREEDY, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_answer(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    given = ("--residual-window", "32", "--preset", "small")
    read = result(capsys, folder, LONG, *given)
    # The template puts <user> before and <a> behind.
    assert read["prompt_tokens"] == len(f"<user>{LONG}<a>")
    assert len(read["tokens"]) == 6 and read["reused_tokens"] == 0
    assert read["settings"]["bits_k"] == 2 and read["settings"]["residual_window"] == 32
    assert read["packed_tokens"] >= 256
    assert read["cache_bytes"] < read["uncompressed_bytes"] / 2
    assert main(["run", folder, LONG, *given, *GREEDY]) == 0
    printed = capsys.readouterr()
    assert printed.out == read["text"] + "\n"
    assert f"[{read['prompt_tokens']} tokens read in" in printed.err
    assert "6 written" in printed.err and "tokens/s; cache" in printed.err


def test_where_the_prompt_comes_from(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    tmp_path: Path,
) -> None:
    file = tmp_path / "text"
    file.write_text(LONG)
    whole = result(capsys, folder, f"{LONG}\n\nWhy?")
    assert result(capsys, folder, "Why?", "--file", str(file))["tokens"] == whole["tokens"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{LONG}\n\nWhy?"))
    assert result(capsys, folder)["tokens"] == whole["tokens"]
    raw = result(capsys, folder, "--file", str(file), "--raw")
    assert raw["prompt_tokens"] == len(LONG)


def test_a_prompt_may_begin_with_a_dash(capsys: pytest.CaptureFixture[str], folder: str) -> None:
    plain = result(capsys, folder, "item")
    for place in (("--", folder, "- item"), (folder, *GREEDY, "--json", "--", "- item")):
        options = () if "--json" in place else (*GREEDY, "--json")
        assert main(["run", *options, *place]) == 0
        read = json.loads(capsys.readouterr().out)
        assert read["prompt_tokens"] == plain["prompt_tokens"] + len("- ")


def test_what_is_no_prompt(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    tmp_path: Path,
) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    for given in ((), ("",), ("--file", str(empty)), ("--file", str(empty), "--json")):
        assert main(["run", folder, *given]) == 2, given
        assert "the prompt is empty" in capsys.readouterr().err
    # What Python makes of bytes that are no UTF-8.
    assert main(["run", folder, "caf\udce9"]) == 2
    assert "the prompt is no text in UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)  # it was closed
    assert main(["run", folder]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    for temperature in ("nan", "inf", "-1"):
        assert main(["run", folder, "x", "--temperature", temperature]) == 2


def test_a_kept_prompt(
    capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path, monkeypatch: Any
) -> None:
    kept = tmp_path / "kept"
    once = (folder, LONG + "Who?", "--cache", str(kept), "--residual-window", "32")
    cold = result(capsys, *once)
    assert cold["reused_tokens"] == 0
    again = result(capsys, *once)
    assert again["tokens"] == cold["tokens"]
    assert again["reused_tokens"] == cold["prompt_tokens"] - 1
    other = (folder, LONG + "When?", *once[2:])
    warm = result(capsys, *other)
    assert warm["reused_tokens"] == len("<user>" + LONG + "Wh")

    def read_again(*arguments: str) -> str:
        assert main(["run", *arguments, *GREEDY]) == 0
        error = capsys.readouterr().err
        assert f"kept: {len('<user>' + LONG + 'When?<a>') - 1} tokens in {kept}" in error
        return error

    assert "kept with other settings" in read_again(*other, "--bits-v", "4")
    damaged = bytearray(kept.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    kept.write_bytes(damaged)
    assert "damaged" in read_again(*other)
    assert main(["run", folder, "Something else", *once[2:], *GREEDY]) == 0
    assert f"from {kept}: {len('<user>')} of" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [kept]


def test_what_is_no_kept_prompt_is_left(
    capsys: pytest.CaptureFixture[str], folder: str, tmp_path: Path
) -> None:
    model, _ = load(folder)
    cache = patch(model)
    with torch.no_grad():
        model(torch.ones(1, 300, dtype=torch.long), past_key_values=cache)
    saved, text, folder_there = tmp_path / "saved", tmp_path / "text", tmp_path / "folder"
    save_cache(cache, saved)
    text.write_text(LONG)
    folder_there.mkdir()
    for path in (saved, text):
        before = path.read_bytes()
        assert main(["run", folder, LONG, "--cache", str(path)]) == 2
        assert "not a prompt that tqai run has kept" in capsys.readouterr().err
        assert path.read_bytes() == before
    assert main(["run", folder, LONG, "--cache", str(folder_there)]) == 2


def test_tokens_are_those_of_the_cache_that_lies_there(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever else keeps a prompt in the same place, before or while this one is read.
    model, _ = load(folder)
    patch(model, residual_window=32)
    path = tmp_path / "kept"

    def read(first: int) -> tuple[Any, list[int]]:
        cache, tokens = new_cache(model), [first] * 300
        with torch.no_grad():
            model(torch.tensor([tokens]), past_key_values=cache)
        return cache, tokens

    one, other = read(5), read(6)
    kept_prompt.keep(path, *one)
    opened = container.opened

    def replaced_meanwhile(at: Path) -> Any:
        found = opened(at)
        kept_prompt.keep(path, *other)
        return found

    monkeypatch.setattr(container, "opened", replaced_meanwhile)
    found = kept_prompt.recall(path, model, [5] * 301)
    assert not isinstance(found, str) and found[1] == 300
    assert torch.equal(found[0].layers[0].keys, one[0].layers[0].keys)
    monkeypatch.undo()
    assert kept_prompt.recall(path, model, [5] * 301) == f"{path} holds another text"
    found = kept_prompt.recall(path, model, [6] * 301)
    assert not isinstance(found, str)
    assert torch.equal(found[0].layers[0].keys, other[0].layers[0].keys)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is typed, line by line."""
    typed: list[str] = []

    def line(prompt: str = "") -> str:
        if not typed:
            raise EOFError
        return typed.pop(0)

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(builtins, "input", line)
    yield typed


def test_a_conversation(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: str,
    lines: list[str],
    tmp_path: Path,
) -> None:
    lines += ["One?", "", "Tw\udcff", "Two?", "Three?"]
    asked: list[tuple[str, dict[str, Any]]] = []
    answer = _Conversation.answer

    def note(self: _Conversation, text: str) -> dict[str, Any]:
        if text == "Two?" and len(asked) == 1:
            asked.append((text, {}))
            answer(self, text)
            raise KeyboardInterrupt  # while it writes
        asked.append((text, answer(self, text)))
        return asked[-1][1]

    monkeypatch.setattr(_Conversation, "answer", note)
    file = tmp_path / "text"
    file.write_text(LONG)
    verb = ["run", folder, "--file", str(file), "--residual-window", "32", *GREEDY]
    assert main(verb) == 0
    printed = capsys.readouterr()
    assert "Ctrl-D ends the conversation" in printed.err
    assert [text for text, _ in asked] == [f"{LONG}\n\nOne?", "Two?", "Three?"]
    (_, first), _, (_, third) = asked
    assert first["reused_tokens"] == 0
    # What was said before is read once, but for the last token of an answer.
    said = len(f"<user>{LONG}\n\nOne?<a>") + len(first["tokens"])
    assert third["prompt_tokens"] > said
    assert third["reused_tokens"] >= len(f"<user>{LONG}\n\nOne?<a>") - 3


def test_an_interrupted_answer_is_not_said(folder: str, lines: list[str]) -> None:
    model, tokenizer = load(folder)
    patch(model, residual_window=32)
    sampling = {"max_new_tokens": 6, "do_sample": False}

    def talk() -> _Conversation:
        return _Conversation(model, tokenizer, False, sampling, None, True)

    plain, interrupted = talk(), talk()
    for one in (plain, interrupted):
        one.answer(LONG)
    generate = model.generate

    def stop(*args: Any, **kwargs: Any) -> None:
        generate(*args, **{**kwargs, "max_new_tokens": 3})
        raise KeyboardInterrupt

    model.generate = stop
    with pytest.raises(KeyboardInterrupt):
        interrupted.answer("Two?")
    interrupted.forget_answer()
    del model.generate
    expected = plain.answer("Three?")
    got = interrupted.answer("Three?")
    for name in ("prompt_tokens", "tokens"):
        assert got[name] == expected[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--max-new-tokens", "0"], "--max-new-tokens 0: expected at least 1"),
        (["x", "--temperature", "-1"], "--temperature -1.0: expected at least 0"),
        (["x", "--top-p", "2"], "--top-p 2.0: expected a share"),
        (["x", "--top-k", "0"], "--top-k 0: expected at least 1"),
        (["x", "--temperature", "0", "--top-k", "3"], "choose nothing at --temperature 0"),
        (["x" * 1000, "--max-new-tokens", "100"], "the model was made for 1024"),
        (["x", "--bits-k", "9"], "bits_k=9: expected an integer from 1 to 8"),
        (["x", "--file", "/nonexistent/text"], "No such file"),
        (["x", "--device", "gpu"], "device 'gpu' cannot be used here"),
        (["x", "--file", sys.executable], "expected a text in UTF-8"),
        (["x", "--cache", "/nonexistent/kept"], "there is no folder /nonexistent"),
        (["x", "--cache", os.path.dirname(__file__)], "that is a folder"),
        ([], "the prompt is empty"),
    ],
)
def test_user_errors(
    capsys: pytest.CaptureFixture[str], folder: str, arguments: list[str], message: str
) -> None:
    assert main(["run", folder, *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tqai: ")]
    assert len(error) == 1 and message in error[0]


def test_json_is_one_result(
    capsys: pytest.CaptureFixture[str], folder: str, lines: list[str]
) -> None:
    assert main(["run", folder, "--json"]) == 2
    assert "--json needs a prompt or --file" in capsys.readouterr().err


def test_options_may_stand_before_the_prompt(
    capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    options = ["--preset", "small", "--max-new-tokens", "2", "--json"]
    after, between = ["run", folder, "abc", *options], ["run", folder, *options, "abc"]
    texts = []
    for arguments in (after, between):
        assert main(arguments) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    with pytest.raises(SystemExit):
        main([*after, "abc"])


@pytest.mark.skipif(sys.platform == "win32", reason="sends the signal of Ctrl-C")
def test_ctrl_c_in_a_process(tmp_path: Path) -> None:
    # More than it writes by the time that the signal comes, however busy the machine is.
    never, tokens = VOCABULARY + 1, 1_000_000
    folder = toy.folder(tmp_path, chat=True, eos_token_id=never, max_position_embeddings=2 * tokens)
    command = [sys.executable, "-m", "tqai", "run", str(folder), LONG]
    command += ["--max-new-tokens", str(tokens)]
    with subprocess.Popen(
        [*command, "--temperature", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"},
        # What a shell starts in the background ignores the signal, and hands that on.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)  # it writes
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 130
        finally:
            process.kill()
        assert "Traceback" not in process.stderr.read()
