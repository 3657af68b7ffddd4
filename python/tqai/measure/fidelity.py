"""What a compressed cache costs in fidelity, measured while the packed tokens are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tqai.measure.equal_bytes import packed_bits, window_of_bytes
from tqai.measure.named_settings import Candidate, named_settings
from tqai.measure.readers import Reader, reader_of
from tqai.measure.statistics import interval_of_mean, quantile
from tqai.measure.stretches import Stretch, continued, stretches_of
from tqai.measure.text import prose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tqai.api import MlxModel

CHUNK = 16
SAMPLES, READ = 4, 256
SAMPLES_OWN, READ_OWN = 2, 1024
"""Of what the model goes on with, which it writes token by token."""
_PARTS = 4


@dataclass(frozen=True)
class Fidelity:
    """What one setting costs: p is the model with its own cache, q with the compressed one."""

    setting: str
    kl_mean: float
    """KL(p‖q) of the next token in nats, over all tokens read."""
    kl_median: float
    kl_p999: float
    """What 99.9 % of the tokens do not exceed."""
    kl_max: float
    kl_interval: tuple[float, float] | None
    """Within which the mean over all such stretches lies with 95 %, by Student's t on the means of
    these; None for one."""
    kl_by_stretch: tuple[float, ...]
    kl_by_seed: tuple[float, ...]
    """Means over all stretches, for each seed."""
    kl_along: tuple[float, ...]
    """Means over equal parts of what was read, one after the other, of which there are four."""
    top1_agreement: float
    """Share of the tokens read after which p and q have the same likeliest next token."""
    perplexity: float
    perplexity_uncompressed: float
    bits_per_coordinate: float
    """Codes and norms of the packed tokens, at the end."""
    bits_per_coordinate_whole: float
    """The whole cache's bytes over all its tokens, at the end."""
    bytes_held: int
    """By the cache, at the end."""
    bytes_shared: int
    """Beside it, by what all caches of the model share: bases of keys."""
    bytes_uncompressed: int
    """What the model's own cache takes for as many tokens."""
    tokens_read: int
    """Tokens fed after the prefill, in all samples together, for one seed."""
    tokens_read_packed: int
    """Those of them before which the cache held packed tokens, which their attention read."""
    packed_share: float
    """Share of the tokens in the cache that were packed at the end."""
    chunk: int
    """Tokens that were fed at a time."""
    own: bool
    """Whether what was read is what the model itself goes on with."""
    equal_tokens: tuple[int, ...] | None
    """Of what the model goes on with: tokens for each seed and stretch before the first one that
    the compressed cache makes another; None where a text was read. All that were read, and the one
    after them, where there is none."""


def evaluate(
    model: PreTrainedModel | MlxModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    settings: Iterable[str | Mapping[str, Any] | Candidate] = ("k4v4", "k4v2"),
    *,
    prefill: int = 512,
    read: int | None = None,
    samples: int | None = None,
    chunk: int | None = None,
    own: bool = False,
    temperature: float = 0.0,
    seeds: int = 1,
    tails: Sequence[int] = (),
    equal_bytes: bool = False,
    bos: bool | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Fidelity]:
    """Compares compressed caches with the model's own, as in decoding: one result per setting.

    Takes `samples` stretches of text, spread evenly. Of each, the first `prefill` tokens are read
    at once and exactly; then `read` tokens are fed `chunk` by `chunk`, so that each reads the
    packed past, and the logits after each are compared with those of the uncompressed model, which
    reads each stretch once, whatever the number of settings. Its logits are kept meanwhile: 4 bytes
    times `read` times the vocabulary.

    Args:
        model: on any device, or one that ``mlx_lm.load`` gives; not patched; patched in between,
            and as it was in the end.
        text: by default ``tqai.text.prose()``.
        settings: arguments of ``tqai.patch``, and arithmetic="exact" for attention by torch over
            the dequantised codes; or their names (``tqai.named.parse_setting``); or what is a
            ``Candidate`` itself.
        read: by default 256, and 1024 with `own`.
        samples: by default 4, and 2 with `own`.
        chunk: tokens fed at a time. Those of a chunk are exact to each other, so it is at most as
            long as every setting's residual window, or 1. By default 16, or the window.
        own: whether what is read after the prefill is the model's own continuation, which it
            writes without compression, in place of the text's.
        temperature: of the continuation; 0: always the likeliest token. Above, each place has
            random numbers of its own, which decide alike for all caches (Gumbel's), so that
            ``equal_tokens`` mean the same.
        seeds: of the rotations, so many for each setting, which are counted together: the one that
            the setting names, or 0, and those after it.
        tails: each setting is measured with these residual windows in place of its own.
        equal_bytes: whether each setting but the first gets the window that makes its cache as
            large as the first one's at the end, as far as 64 tokens go.
        bos: whether each stretch begins with the tokenizer's first token; by default where the
            tokenizer puts it, which tokenizers out of a GGUF file may have forgotten.
        progress: called after every chunk with the tokens fed, all that will be, and for what.

    Raises:
        ValueError: for a text too short, a chunk too long, a patched model, a setting that takes
            more bytes than the first one without any window, or one under which no token read
            packed ones: it would have measured nothing.
    """
    if read is None:
        read = READ_OWN if own else READ
    if samples is None:
        samples = SAMPLES_OWN if own else SAMPLES
    for name, value in (
        ("prefill", prefill),
        ("read", read),
        ("samples", samples),
        ("chunk", 1 if chunk is None else chunk),
        ("seeds", seeds),
    ):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if not 0 <= temperature < math.inf or (temperature > 0 and not own):
        raise ValueError(
            f"temperature={temperature}: expected at least 0, and 0 where the text is read"
        )
    if tails and equal_bytes:
        raise ValueError("tails and equal_bytes both choose windows: expected one of them")
    candidates = named_settings(model, settings)
    if tails:
        candidates = [each.again(residual_window=tail) for tail in tails for each in candidates]
    reader = reader_of(model)
    length = prefill + (0 if own else read)
    texts = stretches_of(reader, tokenizer, prose() if text is None else text, length, samples, bos)
    if equal_bytes:
        candidates = _of_equal_bytes(reader, candidates, texts[0], prefill + read)
    measures = [_Measure(each, chunk, seeds, own) for each in candidates]

    total = samples * read * (1 + seeds * len(measures))
    done = 0

    def count(tokens: int, what: str) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(done, total, what)

    for number, ids in enumerate(texts):
        if own:
            stretch = continued(reader, ids, prefill, read, temperature, number, count)
        else:
            stretch = Stretch.of_text(
                reader, ids, prefill, CHUNK if chunk is None else chunk, count
            )
        for measure in measures:
            measure.read(stretch, reader, count)
    return [measure.result() for measure in measures]


def _of_equal_bytes(
    reader: Reader, candidates: list[Candidate], ids: list[int], tokens: int
) -> list[Candidate]:
    """With windows that make their caches of `tokens` as large as the first one's."""
    # Whatever the tokens are, they take the same bytes.
    ids = (ids * (tokens // len(ids) + 1))[:tokens]
    reports = []
    for each in candidates:
        with each.patched() as cache:
            reader.feed(ids[:-1], cache, last=True)
            reader.feed(ids[-1:], cache, last=True)
            reports.append(cache.memory_report())
    first = candidates[0]
    equal = [first]
    for each, report in zip(candidates[1:], reports[1:], strict=True):
        window = window_of_bytes(report, each.window, reports[0]["total_bytes"])
        if window is None:
            raise ValueError(
                f"setting {each.name!r}: takes more bytes at {tokens} tokens than {first.name!r}, "
                f"{reports[0]['total_bytes']}, also without a window; put the largest first"
            )
        equal.append(each.again(residual_window=window))
    return equal


class _Measure:
    """What the tokens cost that one setting has read, with each of its seeds."""

    def __init__(self, setting: Candidate, chunk: int | None, seeds: int, own: bool) -> None:
        self.setting = setting
        longest = max(setting.window, 1)
        if chunk is not None and chunk > longest:
            raise ValueError(
                f"chunk={chunk}: setting {setting.name!r} has a window of {setting.window} tokens; "
                "a longer chunk would read more exact tokens than decoding does"
            )
        self._chunk = min(CHUNK, longest) if chunk is None else chunk
        self._own = own
        first = setting.seed or 0
        self._seeded = (
            [setting] if seeds == 1 else [setting.again(seed=first + i) for i in range(seeds)]
        )
        self._divergences: list[np.ndarray] = []
        """[read], of each stretch and, within it, seed."""
        self._equal_tokens: list[int] = []
        self._agreeing = 0
        self._loss = 0.0
        self._loss_uncompressed = 0.0
        self._read_packed = 0
        self._report: dict[str, Any] = {}
        self._item_size = 0

    def read(self, stretch: Stretch, reader: Reader, count: Callable[[int, str], None]) -> None:
        """Reads a stretch, with each seed."""
        for seeded in self._seeded:
            with seeded.patched() as cache:
                self._read(stretch, reader, cache, count)
                self._report = cache.memory_report()
        self._item_size = reader.item_size

    def _read(
        self, stretch: Stretch, reader: Reader, cache: Any, count: Callable[[int, str], None]
    ) -> None:
        at = 0
        equal: int | None = None
        divergences = np.empty(len(stretch.logs))
        for packed, q in reader.decode(stretch.ids, stretch.prefill, self._chunk, cache):
            end = at + len(q)
            p, targets = stretch.logs[at:end], stretch.targets[at:end]
            divergences[at:end] = _divergences(p, q)
            rows = np.arange(len(targets))
            self._agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
            self._loss -= float(q[rows, targets].sum(dtype=np.float64))
            self._loss_uncompressed -= float(p[rows, targets].sum(dtype=np.float64))
            self._read_packed += len(targets) * packed
            if self._own and equal is None:
                chosen = stretch.choose(q, at)
                others = np.flatnonzero(chosen != targets)
                equal = at + int(others[0]) + 1 if len(others) else None
            count(len(q), self.setting.name)
            at = end
        if not np.isfinite(divergences).all():
            raise ValueError(f"setting {self.setting.name!r}: the model's logits are not finite")
        self._divergences.append(divergences)
        if self._own:
            self._equal_tokens.append(len(stretch.targets) + 1 if equal is None else equal)

    def result(self) -> Fidelity:
        if self._read_packed == 0:
            raise ValueError(
                f"setting {self.setting.name!r}: no packed token was read, so nothing was "
                "measured; prefill more tokens than sinks, window and a tile of 64, or lower the "
                "window"
            )
        report, seeds = self._report, len(self._seeded)
        divergences = np.array(self._divergences).reshape(-1, seeds, len(self._divergences[0]))
        read = divergences.size
        by_stretch = divergences.mean((1, 2)).tolist()
        parts = np.array_split(divergences, min(_PARTS, divergences.shape[2]), axis=2)
        return Fidelity(
            setting=self.setting.name,
            kl_mean=float(divergences.mean()),
            kl_median=quantile(divergences, 0.5),
            kl_p999=quantile(divergences, 0.999),
            kl_max=float(divergences.max()),
            kl_interval=interval_of_mean(by_stretch),
            kl_by_stretch=tuple(by_stretch),
            kl_by_seed=tuple(divergences.mean((0, 2)).tolist()),
            kl_along=tuple(float(part.mean()) for part in parts),
            top1_agreement=self._agreeing / read,
            perplexity=math.exp(self._loss / read),
            perplexity_uncompressed=math.exp(self._loss_uncompressed / read),
            bits_per_coordinate=packed_bits(report, self._item_size),
            bits_per_coordinate_whole=8
            * self._item_size
            * report["total_bytes"]
            / report["uncompressed_bytes"],
            bytes_held=report["total_bytes"],
            bytes_shared=report.get("basis_bytes", 0),
            bytes_uncompressed=report["uncompressed_bytes"],
            tokens_read=read // seeds,
            tokens_read_packed=self._read_packed // seeds,
            packed_share=report["packed_tokens"] / report["tokens"],
            chunk=self._chunk,
            own=self._own,
            equal_tokens=tuple(self._equal_tokens) if self._own else None,
        )


def _divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p‖q) [tokens], given both log-probabilities [tokens, vocabulary] float32.

    The terms cancel almost wholly, so they are summed in double precision, and what the rounding of
    logarithms to single precision has done to the sums of probabilities is taken out again.
    """
    result = np.empty(len(p))
    for at, (one, other) in enumerate(zip(p, q, strict=True)):
        log_p, log_q = one.astype(np.float64), other.astype(np.float64)
        exp_p = np.exp(log_p)
        sum_p, sum_q = exp_p.sum(), np.exp(log_q).sum()
        with np.errstate(invalid="ignore"):  # logits that are not finite, which are refused later
            result[at] = exp_p @ (log_p - log_q) / sum_p + np.log(sum_q) - np.log(sum_p)
    return result
