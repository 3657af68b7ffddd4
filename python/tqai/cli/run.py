"""``tqai run``: a model answers from the shell, its cache compressed."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqai.cli.kept_prompt import keep, recall
from tqai.cli.options import add_settings, add_verb, settings_of, use_threads
from tqai.cli.output import megabytes, percent, print_json
from tqai.settings import DTYPES

if TYPE_CHECKING:
    import torch

    from tqai.transformers.cache.cache import TqaiCache


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "run",
        "A model answers a prompt, or goes on with a text, and its cache is compressed. Without a "
        "prompt and a file, what is piped in is the prompt; at a terminal a conversation begins.",
        run,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, .gguf file or hub id")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT")
    parser.set_defaults(may_come_late="prompt")
    parser.add_argument("--file", type=Path, metavar="FILE", help="a text to put before the prompt")
    parser.add_argument(
        "--raw", action="store_true", help="without the model's chat template: goes on with a text"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help="keep the prompt here once it is read; next time, go on from as much as is the same",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="where it computes, as torch names it (default: cpu)"
    )
    writing = parser.add_argument_group("writing")
    for option, kind, metavar, text in (
        ("--max-new-tokens", int, "N", "at most (default: 512)"),
        ("--temperature", float, "T", "0: always the likeliest token (default: as the model says)"),
        ("--top-p", float, "P", "choose among the likeliest that have this share together"),
        ("--top-k", int, "N", "choose among so many of the likeliest"),
        ("--sampling-seed", int, "N", "of the choices, for the same answer again"),
    ):
        writing.add_argument(option, type=kind, metavar=metavar, help=text)
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    first, more = _texts(options)
    sampling = _sampling(options)
    if more and options.json:
        raise ValueError("--json needs a prompt or --file: a conversation is not one result")
    kept = options.cache
    if kept is not None and (kept.is_dir() or not kept.parent.is_dir()):
        what = "that is a folder" if kept.is_dir() else f"there is no folder {kept.parent}"
        raise ValueError(f"--cache {kept}: {what}; expected the name of a file")
    import torch

    import tqai
    from tqai.transformers.loading import load

    use_threads(options)
    model, tokenizer = load(options.model, options.dtype, options.device)
    if options.sampling_seed is not None:
        torch.manual_seed(options.sampling_seed)
    tqai.patch(model, **settings_of(options))
    talk = _Conversation(model, tokenizer, options.raw, sampling, options.cache, options.json)
    if not more:
        result = talk.answer(first)
        print_json(result) if options.json else _say(_summary(result))
        return
    _say("Ctrl-D ends the conversation, Ctrl-C an answer.")
    while (line := _ask()) is not None:
        if line.strip():
            try:
                _check_letters(line)
            except ValueError as error:
                _say(str(error))
                continue
            text, first = first + line, ""
            try:
                result = talk.answer(text)
            except KeyboardInterrupt:
                print(flush=True)
                talk.forget_answer()
            else:
                _say(_summary(result))


def _texts(options: argparse.Namespace) -> tuple[str, bool]:
    """The first prompt, or what to put before it, and whether a conversation is wanted."""
    try:
        text = "" if options.file is None else options.file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file {options.file}: expected a text in UTF-8, {error}") from None
    prompt = options.prompt
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    if prompt is None and options.file is None and not at_terminal:
        prompt = "" if sys.stdin is None else sys.stdin.read()
    # A file alone is a prompt where nobody sits, and where the model only goes on with a text.
    if prompt is None and at_terminal and not (options.raw and text):
        return (text + "\n\n" if text else text), True
    whole = f"{text}\n\n{prompt}" if text and prompt else text or prompt or ""
    if not whole.strip():
        raise ValueError("the prompt is empty")
    _check_letters(whole)
    return whole, False


def _check_letters(text: str) -> None:
    """Raises ValueError for bytes that were no UTF-8, which Python keeps as half characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is no text in UTF-8: {error}") from None


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``generate`` that were given."""
    count = 512 if options.max_new_tokens is None else options.max_new_tokens
    if count < 1:
        raise ValueError(f"--max-new-tokens {count}: expected at least 1")
    chosen: dict[str, Any] = {"max_new_tokens": count}
    given = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k")}
    if given["temperature"] is not None and not 0 <= given["temperature"] < math.inf:
        raise ValueError(f"--temperature {given['temperature']}: expected at least 0")
    if given["top_p"] is not None and not 0 < given["top_p"] <= 1:
        raise ValueError(f"--top-p {given['top_p']}: expected a share, above 0 and up to 1")
    if given["top_k"] is not None and given["top_k"] < 1:
        raise ValueError(f"--top-k {given['top_k']}: expected at least 1")
    if given["temperature"] == 0:
        if given["top_p"] is not None or given["top_k"] is not None:
            raise ValueError("--top-p and --top-k choose nothing at --temperature 0")
        return {**chosen, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    given = {name: value for name, value in given.items() if value is not None}
    return {**chosen, **given, "do_sample": True} if given else chosen


class _Conversation:
    """Questions and answers over one cache, each read once."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        raw: bool,
        sampling: dict[str, Any],
        kept: Path | None,
        quiet: bool,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._template = bool(tokenizer.chat_template) and not raw
        self._sampling = sampling
        self._kept = kept
        self._quiet = quiet
        self._said: list[dict[str, str]] = []
        self._text = ""
        self._read: list[int] = []
        """Tokens that the cache has read."""
        self._cache: TqaiCache | None = None

    def answer(self, text: str) -> dict[str, Any]:
        """Reads what is new, and writes an answer to stdout as it comes, unless quiet."""
        import torch
        from transformers import TextStreamer

        from tqai.transformers.model.names import generate_name

        ids = self._ids(text)
        self._check_length(len(ids))
        reused = self._reuse(ids)
        start = time.perf_counter()
        self._read_prompt(ids, reused)
        prefill = time.perf_counter() - start
        if self._kept is not None:
            if reused < len(ids) - 1:
                keep(self._kept, self._cache, self._read)
                _say(f"kept: {len(self._read)} tokens in {self._kept}")
            self._kept = None

        clock = _Clock()
        prompt = torch.tensor([ids], device=self._model.device)
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        out = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=None if self._quiet else streamer,
            stopping_criteria=[clock],
            **{generate_name(): self._cache},
            **self._sampling,
        )
        tokens = out[0, len(ids) :].tolist()
        written = self._tokenizer.decode(tokens, skip_special_tokens=True)
        self._said.append({"role": "assistant", "content": written})
        self._text += written
        self._read = out[0].tolist()[: self._cache.get_seq_length()]
        report = self._cache.memory_report()
        return {
            "text": written,
            "tokens": tokens,
            "prompt_tokens": len(ids),
            "reused_tokens": reused,
            "prefill_seconds": prefill,
            "tokens_per_second": clock.rate(),
            "cache_bytes": report["total_bytes"],
            "uncompressed_bytes": report["uncompressed_bytes"],
            "packed_tokens": report["packed_tokens"],
            "settings": report["settings"],
        }

    def forget_answer(self) -> None:
        """After an interruption: what was asked and written is not said. What the cache has read
        of the prompt stays."""
        asked = self._said.pop() if self._said else {"content": ""}
        self._text = self._text.removesuffix(asked["content"])
        cache, self._cache = self._cache, None
        if cache is not None and self._read:
            try:
                cache.crop(len(self._read))
            except (RuntimeError, NotImplementedError):  # it cannot go back
                pass
            else:
                self._cache = cache
        if self._cache is None:
            self._read = []

    def _ids(self, text: str) -> list[int]:
        """Everything said so far, and `text`."""
        self._said.append({"role": "user", "content": text})
        self._text += text
        if not self._template:
            return self._tokenizer(self._text, verbose=False).input_ids
        whole = self._tokenizer.apply_chat_template(
            self._said, tokenize=False, add_generation_prompt=True
        )
        # A template has the special tokens of its own.
        return self._tokenizer(whole, add_special_tokens=False, verbose=False).input_ids

    def _check_length(self, tokens: int) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        new = self._sampling["max_new_tokens"]
        if tokens == 0:
            raise ValueError("the prompt is empty")
        if limit is not None and tokens + new > limit:
            raise ValueError(
                f"a prompt of {tokens} tokens and up to {new} new ones: the model was made for "
                f"{limit}; give a shorter text or a lower --max-new-tokens"
            )

    def _reuse(self, ids: list[int]) -> int:
        """How many of the tokens the cache has read already; it has read nothing else then."""
        import tqai

        if self._cache is None and self._kept is not None:
            found = recall(self._kept, self._model, ids)
            if isinstance(found, str):
                _say(f"reading the prompt: {found}")
            else:
                self._cache, common = found
                _say(f"from {self._kept}: {common} of {len(ids)} tokens")
                self._read = ids[:common]
                return common
        same = 0
        while same < min(len(self._read), len(ids) - 1) and self._read[same] == ids[same]:
            same += 1
        try:
            if self._cache is not None and 0 < same < len(self._read):
                self._cache.crop(same)
        except (RuntimeError, NotImplementedError):  # it cannot go back
            same = 0
        if self._cache is None or same == 0:
            self._cache, same = tqai.new_cache(self._model), 0
        self._read = ids[:same]
        return same

    def _read_prompt(self, ids: list[int], start: int) -> None:
        """All but the last token, which is the first that ``generate`` feeds."""
        import torch

        from tqai.transformers.model.names import cache_argument

        new = torch.tensor([ids[start:-1]], device=self._model.device)
        if new.shape[1] > 0:
            with torch.no_grad(), _layers_counted(self._model, new.shape[1]):
                cache = cache_argument(self._model, self._cache)
                self._model(new, use_cache=True, logits_to_keep=1, **cache)
        self._read = ids[:-1]


class _Clock:
    """A stopping criterion that never stops, but notes the time of each token."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        import torch

        self._times.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    def rate(self) -> float | None:
        """Tokens a second after the first; None of one alone."""
        if len(self._times) < 2:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])


@contextmanager
def _layers_counted(model: Any, tokens: int) -> Iterator[None]:
    """A progress bar over the layers of a pass that takes longer than a second."""
    from tqdm import tqdm

    layers = {
        index: module
        for module in model.modules()
        if isinstance(index := getattr(module, "layer_idx", None), int)
    }
    with tqdm(
        total=len(layers), desc=f"reading {tokens} tokens", unit="layer", delay=1, leave=False
    ) as bar:

        def step(*_: Any) -> None:
            bar.update()

        hooks = [module.register_forward_hook(step) for module in layers.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _ask() -> str | None:
    """A line from the terminal; None at its end."""
    try:
        return input("> ")
    except EOFError:
        return None


def _say(text: str) -> None:
    """On stderr, as stdout is the answer's."""
    print(text, file=sys.stderr, flush=True)


def _summary(result: dict[str, Any]) -> str:
    rate = result["tokens_per_second"]
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    size, whole = result["cache_bytes"], result["uncompressed_bytes"]
    note = percent(size / whole) if result["packed_tokens"] else "all of it in the exact window"
    new = result["prompt_tokens"] - result["reused_tokens"]
    return (
        f"[{new} tokens read in {result['prefill_seconds']:.1f} s, {len(result['tokens'])} "
        f"written{speed}; cache {megabytes(size)}, uncompressed {megabytes(whole)} "
        f"({note})]"
    )
