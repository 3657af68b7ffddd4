"""Every model type of transformers that writes text, small and random, with and without tqai.

    python tests/python/sweep.py                 all types, a line for each
    python tests/python/sweep.py llama gemma3    these

transformers/test_sweep.py makes tests of them, and the tables in docs/transformers.md.

Of each type that ``tiny`` can build: with everything in the exact window the logits of
``generate`` are the plain cache's, bit for bit; with sealed tokens they are near them, and the
tokens are held as codes; beams, prompt lookup, ``crop`` and files work as with the plain cache. Or
tqai refuses it with an error of its own. Anything else is a failure.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import page
import tiny
import torch
import tqai
import transformers
from tqai.transformers.attention import functions as attention
from tqai.transformers.cache.cache import TqaiCache
from tqai.transformers.cache.layer import TqaiLayer
from tqai.transformers.model.names import cache_argument, generate_name

SHORT, LONG, NEW = 23, 220, 6
SEALING = {"residual_window": 16, "sink_tokens": 2}
GREEDY = {"do_sample": False, "max_new_tokens": NEW}
# Relative errors of the next logits, at 8 bits and at 4 for keys and values. Attention that does
# not scale its scores down, or scales them up again, is sharper, and carries more of an error on;
# attention to the few tokens that an index chooses jumps where an error changes the choice.
BOUNDS = {8: 0.03, 4: 0.2}
UNSCALED = r"muse_glimmer.*|t5gemma|gemma3n.*|gemma4.*|gpt_neo|.*t5|umt5|switch_transformers|udop"
INDEXED = r"axk2|deepseek_v32|dots3_note.*|glm_moe_dsa|hy_v4.*|qwen4_exp.*"
WIDER = 3
SECONDS = 120
"""Time for one type."""


@dataclass
class Outcome:
    """What came of one type."""

    kind: str
    name: str
    status: str = "failed"
    """"works", "refused", "unbuildable" or "failed"."""
    inputs: str = ""
    """"text", "image" or "sound"."""
    attention: str = ""
    """Over sealed tokens: "kernel", "dequantised", or both with the layers."""
    why: str = ""
    """What tqai or transformers said, or what is wrong."""
    errors: dict[int, float] = field(default_factory=dict)
    """Of the logits with sealed tokens, by bits."""
    features: dict[str, str] = field(default_factory=dict)
    """"=" or what was said."""

    seconds: float = 0.0

    def line(self) -> str:
        """As it is printed."""
        text = f"{self.kind:<28} {self.name:<48} {self.status:<11} {self.seconds:4.0f} s "
        if self.status == "works":
            errors = ", ".join(f"{bits} bits {error:.4f}" for bits, error in self.errors.items())
            text += f" {self.inputs:<5} {self.attention}; {errors}"
            odd = {name: said for name, said in self.features.items() if said != "="}
            return text + "".join(f"; {name}: {said}" for name, said in odd.items())
        return f"{text} {self.why}"


class Refused(Exception):
    """tqai said that it does not do something."""


class Wrong(Exception):
    """What must not be."""


def check(kind: str, name: str) -> Outcome:
    """Tries one type."""
    outcome = Outcome(kind, name)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        model = tiny.model_for(kind, name)
        short, outcome.inputs = _first_that_runs(model, SHORT)
        plain = _generate(model, short)
        if not _same(_generate(model, short), plain):
            raise ValueError("gives other logits each time")
        _first_that_runs(model, LONG, outcome.inputs)
    except Exception as error:
        return _with(outcome, "unbuildable", _said(error))
    try:
        _check_model(model, short, plain, outcome)
    except Refused as error:
        return _with(outcome, "refused", str(error))
    except Wrong as error:
        return _with(outcome, "failed", str(error))
    outcome.status = "works"
    return outcome


def _with(outcome: Outcome, status: str, why: str) -> Outcome:
    outcome.status, outcome.why = status, why
    return outcome


def _check_model(model: Any, short: dict[str, Any], plain: Any, outcome: Outcome) -> None:
    features = {"beams": _beams, "prompt lookup": _lookup}
    expected = {name: _or_error(feature, model, short) for name, feature in features.items()}
    long, _ = _first_that_runs(model, LONG, outcome.inputs)
    target = _generate(model, long, forced=True)
    goes_on = not isinstance(_or_error(_more, model, long, target, _cache(target)), Exception)

    with _watched() as seen:
        try:
            _tqai(tqai.patch, model, residual_window=4096)
        except Refused as error:
            _follow_advice(model, long, target, str(error))
            raise
        got = _tqai(_generate, model, short)
    if not any(cache.memory_report()["tokens"] for cache in seen.caches):
        raise Wrong("nothing is compressed, and nothing says so")
    if not _same(got, plain):
        raise Wrong(f"with everything in the window: {_difference(got, plain)}")
    for name, feature in features.items():
        if isinstance(expected[name], Exception):
            outcome.features[name] = "no"
            continue
        try:
            got = _tqai(feature, model, short)
        except Refused as error:
            outcome.features[name] = f"refused: {error}"
            continue
        if not torch.equal(got, expected[name]):
            raise Wrong(f"{name}, with everything in the window: other tokens")
        outcome.features[name] = "="

    wider = WIDER if re.fullmatch(f"{UNSCALED}|{INDEXED}", outcome.kind) else 1
    for bits, bound in BOUNDS.items():
        with _watched() as seen:
            _tqai(tqai.patch, model, bits_k=bits, bits_v=bits, **SEALING)
            got = _tqai(_generate, model, long, forced=True)
        if not any(cache.memory_report()["packed_tokens"] for cache in seen.caches):
            raise Wrong(f"{bits} bits: no token is sealed")
        outcome.errors[bits] = error = _error(got, target)
        if not error < bound * wider:
            raise Wrong(f"{bits} bits: the logits are {error:.3f} off")
        outcome.attention = seen.attention()
        if bits == 8 and goes_on and isinstance(_cache(got), tuple(_KINDS)):
            for name, attempt in (("crop", _try_crop), ("files", _try_file)):
                try:
                    attempt(model, long, got)
                    outcome.features[name] = "="
                except Refused as error:
                    outcome.features[name] = f"refused: {error}"


def _follow_advice(model: Any, long: dict[str, Any], target: Any, said: str) -> None:
    """Leaves out the layers that an error says to leave out: the rest must be as it was."""
    skipped: list[int] = []
    while (advice := re.search(r"skip_layers=\[(\d+)\]", said)) is not None:
        skipped.append(int(advice[1]))
        try:
            _tqai(tqai.patch, model, residual_window=4096, skip_layers=skipped)
        except Refused as error:
            said = str(error)
            continue
        got = _tqai(_generate, model, long, forced=True)
        if not _same(got, target):
            raise Wrong(f"with skip_layers={skipped}, as tqai says: {_difference(got, target)}")
        return


_KINDS = (tqai.TqaiCache, tqai.TqaiEncoderDecoderCache)


def _first_that_runs(model: Any, tokens: int, only: str = "") -> tuple[dict[str, Any], str]:
    """Inputs that the plain model takes, and what they are."""
    last: Exception | None = None
    for what, inputs in tiny.inputs_for(model, tokens):
        if only and what != only:
            continue
        try:
            _generate(model, inputs)
            return inputs, what
        except Exception as error:  # whatever the model's own code raises
            last = error
    assert last is not None
    raise last


@torch.no_grad()
def _generate(model: Any, inputs: dict[str, Any], forced: bool = False, **options: Any) -> Any:
    """The outcome of ``generate``. forced: it writes the same tokens whatever the logits are."""
    torch.manual_seed(0)
    wanted = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, **options}
    if forced:
        wanted["logits_processor"] = transformers.LogitsProcessorList([_force])
    return model.generate(**inputs, **wanted)


def _force(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    token = tiny.TEXT + ids.shape[1] * 7 % (tiny.VOCABULARY - tiny.TEXT)
    return torch.full_like(scores, -1e4).index_fill_(1, torch.tensor([token]), 0)


def _beams(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return _generate(model, inputs, num_beams=3, num_return_sequences=2).sequences


def _lookup(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """For one row, as transformers wants it; the text holds something to look up."""
    one = {
        name: value[:1] if isinstance(value, torch.Tensor) and value.shape[0] == 2 else value
        for name, value in inputs.items()
    }
    return _generate(model, one, prompt_lookup_num_tokens=3, output_logits=False).sequences


def _more(model: Any, inputs: dict[str, Any], result: Any, cache: Any) -> torch.Tensor:
    """Logits [batch, vocabulary] after two more tokens, over a cache that has read the others.

    They are read one by one: some models with sliding windows see other tokens in blocks.
    """
    more = torch.cat([result.sequences, tiny.ids_of(2, 2, seed=9)], 1)
    start = more.shape[1] - _to_read(result.sequences, cache) - 2
    logits = None
    for end in range(start + 1, more.shape[1] + 1):
        if (
            model.config.is_encoder_decoder
        ):  # ``generate`` does not count what such a cache has read
            given = {**inputs, "decoder_input_ids": more[:, end - 1 : end]}
            with torch.no_grad():
                logits = model(**given, **cache_argument(model, cache)).logits[:, -1]
            continue
        mask = inputs["attention_mask"]
        longer = torch.ones(2, end - mask.shape[1], dtype=mask.dtype)
        given = {"input_ids": more[:, :end], "attention_mask": torch.cat([mask, longer], 1)}
        options = {generate_name(): cache, "max_new_tokens": 1}
        logits = _generate(model, given, **options).logits[0]
    assert logits is not None
    return logits


def _cache(result: Any) -> Any:
    return getattr(result, generate_name())


def _to_read(sequences: torch.Tensor, cache: Any) -> int:
    """Tokens of `sequences` that the cache has not read."""
    return max(sequences.shape[1] - int(cache.get_seq_length()), 0)


def _try_crop(model: Any, inputs: dict[str, Any], result: Any) -> None:
    """Forgets tokens and reads them again."""
    cropped = copy.deepcopy(_cache(result))
    _tqai(cropped.crop, -3)
    got = _tqai(_more, model, inputs, result, cropped)
    expected = _tqai(_more, model, inputs, result, copy.deepcopy(_cache(result)))
    error = (got - expected).norm() / expected.norm()
    if not error < BOUNDS[8]:
        raise Wrong(f"after crop(-3) the logits are {error:.3f} off")


def _try_file(model: Any, inputs: dict[str, Any], result: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        _tqai(tqai.save_cache, _cache(result), path)
        loaded = _tqai(tqai.load_cache, path, model)
    got = _tqai(_more, model, inputs, result, loaded)
    expected = _tqai(_more, model, inputs, result, copy.deepcopy(_cache(result)))
    if not torch.equal(got, expected):
        raise Wrong("a cache from a file gives other logits")


def _or_error(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # whatever the model's own code raises
        return error


def _tqai(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `function` returns; tqai's own errors as ``Refused``, all others as ``Wrong``."""
    try:
        return function(*arguments, **options)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if f"{os.sep}tqai{os.sep}" not in frames[-1].filename:
            raise Wrong(f"{_said(error)} ({_where(error)})") from error
        raise Refused(_said(error)) from error
    except Exception as error:
        raise Wrong(f"{_said(error)} ({_where(error)})") from error


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {text}"


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _same(got: Any, expected: Any) -> bool:
    return torch.equal(got.sequences, expected.sequences) and all(
        torch.equal(ours, theirs) for ours, theirs in zip(got.logits, expected.logits, strict=True)
    )


def _difference(got: Any, expected: Any) -> str:
    errors = [
        f"{(ours - theirs).norm() / theirs.norm():.2g}"
        for ours, theirs in zip(got.logits, expected.logits, strict=True)
    ]
    return f"the logits of the tokens are {', '.join(errors)} off"


def _error(got: Any, expected: Any) -> float:
    """Of the logits of as many tokens as followed on the same ones; some models force none."""
    start = got.sequences.shape[1] - len(got.logits)
    same = (got.sequences == expected.sequences).all(0)[start:].int().cumprod(0)
    steps = min(int(same.sum()) + 1, len(got.logits))
    ours, theirs = (torch.stack(each.logits[:steps]).double() for each in (got, expected))
    return float((ours - theirs).norm() / theirs.norm())


class _Seen:
    """What a patched model did."""

    def __init__(self) -> None:
        self.caches: list[TqaiCache] = []
        self.kernel: set[int] = set()
        self.gathered: set[int] = set()

    def attention(self) -> str:
        rest = self.gathered - self.kernel
        if not self.kernel or not rest:
            return "kernel" if self.kernel else "dequantised"
        return f"kernel; layers {', '.join(map(str, sorted(rest)))} dequantised"


@contextmanager
def _watched() -> Iterator[_Seen]:
    """Records the compressed caches that are made, and who reads sealed tokens how."""
    seen = _Seen()
    init, attend, gather = TqaiCache.__init__, attention._attend_packed, TqaiLayer.gather

    def made(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        seen.caches.append(self)

    def attended(query: Any, update: Any, *rest: Any) -> Any:
        seen.kernel.add(update.layer.index)
        return attend(query, update, *rest)

    def gathered(self: Any, *arguments: Any) -> Any:
        if self.is_packed():
            seen.gathered.add(self.index)
        return gather(self, *arguments)

    TqaiCache.__init__, attention._attend_packed, TqaiLayer.gather = made, attended, gathered
    try:
        yield seen
    finally:
        TqaiCache.__init__, attention._attend_packed, TqaiLayer.gather = init, attend, gather


# Each type has a process of its own, so that one that hangs or crashes does not stop the others.


_PRELOADED = [
    "torch",
    "transformers.generation",
    "transformers.models.auto.modeling_auto",
    "tqai.transformers.files.save_load",
    "tqai.transformers.hooks",
]
"""What takes seconds to import; processes are forked from one that has it."""


def start(types: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Future[Outcome]]:
    """Begins to try `types`, as many at a time as there are processors."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(_PRELOADED)
    pool = ThreadPoolExecutor(os.cpu_count())
    outcomes = {entry: pool.submit(_in_a_process, context, *entry) for entry in types}
    pool.shutdown(wait=False)
    return outcomes


def _in_a_process(context: Any, kind: str, name: str) -> Outcome:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, kind, name), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(SECONDS):
            return ours.recv()
        return Outcome(kind, name, why=f"not done after {SECONDS} seconds")
    except EOFError:
        process.join()
        return Outcome(kind, name, why=f"the process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send(pipe: Any, kind: str, name: str) -> None:
    warnings.filterwarnings("ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    start = time.monotonic()
    outcome = check(kind, name)
    outcome.seconds = time.monotonic() - start
    pipe.send(outcome)


COUNTED = {
    "works": "equal with all in the window, near with sealed tokens",
    "refused": "refused",
    "unbuildable": "not built",
    "failed": "failed",
}


def summary(outcomes: Iterable[Outcome]) -> str:
    """A line that closes a sweep."""
    counts = Counter(outcome.status for outcome in outcomes)
    return f"{sum(counts.values())} model types: " + ", ".join(
        f"{counts[status]} {text}" for status, text in COUNTED.items() if counts[status]
    )


def row(outcome: Outcome) -> list[str]:
    """The type's line in a table of the documentation; numbers differ between machines."""
    name = f"{outcome.kind} ({outcome.name})"
    if outcome.status != "works":
        return [name, outcome.why[:240]]
    said: dict[str, list[str]] = {}
    for feature, text in outcome.features.items():
        said.setdefault(text.partition(":")[0], []).append(feature)
    no = [f"no {feature}" for feature in said.get("no", ())]
    refused = [f"{' and '.join(said['refused'])} refused"] if "refused" in said else []
    return [name, outcome.inputs, outcome.attention, "; ".join(no + refused)]


def tables(outcomes: Iterable[Outcome]) -> str:
    """All that the documentation says of the types."""
    by_status: dict[str, list[list[str]]] = {status: [] for status in COUNTED}
    for outcome in outcomes:
        by_status[outcome.status].append(row(outcome))
    columns = [
        "type",
        "tried with",
        "attention over sealed tokens",
        "otherwise than the plain cache",
    ]
    parts = [page.table(columns, by_status["works"])]
    for status, title in (("refused", "what tqai says"), ("unbuildable", "why there is no model")):
        parts.append(page.table([f"{COUNTED[status]}", title], by_status[status]))
    return "\n\n".join(parts)


def _outcomes(types: list[tuple[str, str]], here: bool) -> Iterator[Outcome]:
    if here:
        yield from (check(*entry) for entry in types)
    else:
        yield from (future.result() for future in start(types).values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("types", nargs="*")
    parser.add_argument("--here", action="store_true", help="in this process, to debug")
    arguments = parser.parse_args()
    types = [entry for entry in tiny.types() if not arguments.types or entry[0] in arguments.types]
    outcomes = []
    for outcome in _outcomes(types, arguments.here):
        print(outcome.line(), flush=True)
        outcomes.append(outcome)
    print(f"transformers {transformers.__version__}, {summary(outcomes)}")
    return int(any(outcome.status == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
