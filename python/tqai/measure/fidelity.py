"""What a compressed cache costs in fidelity, measured while the packed tokens are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tqai.measure.named_settings import NamedSetting, named_settings
from tqai.measure.readers import Reader, reader_of
from tqai.measure.text import prose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tqai.api import MlxModel


@dataclass(frozen=True)
class Fidelity:
    """What one setting costs: p is the model with its own cache, q with the compressed one."""

    setting: str
    kl_mean: float
    """KL(p‖q) of the next token in nats, over all tokens read."""
    kl_median: float
    kl_max: float
    top1_agreement: float
    """Share of the tokens read after which p and q have the same likeliest next token."""
    perplexity: float
    perplexity_uncompressed: float
    bits_per_coordinate: float
    """Codes and norms of the packed tokens, at the end."""
    bits_per_coordinate_whole: float
    """The whole cache's bytes over all its tokens, at the end."""
    tokens_read: int
    """Tokens fed after the prefill, in all samples together."""
    tokens_read_packed: int
    """Those of them before which the cache held packed tokens, which their attention read."""
    packed_share: float
    """Share of the tokens in the cache that were packed at the end."""


def evaluate(
    model: PreTrainedModel | MlxModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    settings: Iterable[str | Mapping[str, Any]] = ("k4v4", "k4v2"),
    *,
    prefill: int = 512,
    read: int = 256,
    samples: int = 1,
    chunk: int = 1,
    bos: bool | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Fidelity]:
    """Compares compressed caches with the model's own, as in decoding: one result per setting.

    Takes `samples` stretches of text, spread evenly. Of each, the first `prefill` tokens are read
    at once and exactly; then `read` tokens are fed `chunk` by `chunk`, so that each reads the
    packed past, and the logits after each are compared with those of the uncompressed model, fed
    alike.

    Args:
        model: on any device, or one that ``mlx_lm.load`` gives; not patched; patched in between,
            and as it was in the end.
        text: by default ``tqai.text.prose()``.
        settings: arguments of ``tqai.patch``, and arithmetic="exact" for attention by torch over
            the dequantised codes; or their names (``tqai.named.parse_setting``).
        chunk: tokens fed at a time. Those of a chunk are exact to each other, so it is at most as
            long as every setting's residual window, or 1.
        bos: whether each stretch begins with the tokenizer's first token; by default where the
            tokenizer puts it, which tokenizers out of a GGUF file may have forgotten.
        progress: called after every chunk with the tokens fed, all that will be, and for what.

    Raises:
        ValueError: for a text too short, a chunk too long, a patched model, or a setting under
            which no token read packed ones: it would have measured nothing.
    """
    for name, value in (
        ("prefill", prefill),
        ("read", read),
        ("samples", samples),
        ("chunk", chunk),
    ):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    measures = [_Measure(setting) for setting in named_settings(model, settings)]
    for measure in measures:
        measure.check_chunk(chunk)
    reader = reader_of(model)
    stretches = _stretches(
        reader, tokenizer, prose() if text is None else text, prefill + read, samples, bos
    )

    total = samples * read * (1 + len(measures))
    done = 0

    def count(tokens: int, what: str) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(done, total, what)

    for ids in stretches:
        reference = []
        for _, q in reader.decode(ids, prefill, chunk, reader.own_cache()):
            reference.append(q)
            count(len(q), "uncompressed")
        targets = [
            ids[at + 1 : min(at + chunk, len(ids) - 1) + 1]
            for at in range(prefill, len(ids) - 1, chunk)
        ]
        for measure in measures:
            with measure.setting.patched() as cache:
                decoding = reader.decode(ids, prefill, chunk, cache)
                for p, target, (packed, q) in zip(reference, targets, decoding, strict=True):
                    measure.add(p, q, target, packed)
                    count(len(q), measure.setting.name)
                measure.look_at(cache, reader.item_size)
    return [measure.result() for measure in measures]


def _stretches(
    reader: Reader, tokenizer: Any, text: str, length: int, samples: int, bos: bool | None
) -> list[list[int]]:
    """length + 1 token ids each: the last token is only predicted."""
    tokens = reader.tokenize(tokenizer, text, False)
    # Some models (Gemma) make no sense of a text without its first token.
    first = [tokenizer.bos_token_id]
    if bos is None:
        bos = reader.tokenize(tokenizer, "a", True)[:1] == first
    elif bos and first == [None]:
        raise ValueError("bos: the tokenizer has no token to begin a text with")
    start = first if bos else []
    taken = length + 1 - len(start)
    if len(tokens) < taken:
        raise ValueError(f"the text has {len(tokens)} tokens: expected at least {taken}")
    stride = (len(tokens) - taken) // max(samples - 1, 1)
    return [start + tokens[sample * stride : sample * stride + taken] for sample in range(samples)]


class _Measure:
    """Sums over the tokens that one setting has read."""

    def __init__(self, setting: NamedSetting) -> None:
        self.setting = setting
        self._divergences: list[float] = []
        self._agreeing = 0
        self._loss = 0.0
        self._loss_uncompressed = 0.0
        self._read_packed = 0
        self._report: dict[str, Any] = {}
        self._item_size = 0

    def check_chunk(self, chunk: int) -> None:
        window = self.setting.settings.residual_window
        if chunk > max(window, 1):
            raise ValueError(
                f"chunk={chunk}: setting {self.setting.name!r} has a window of {window} tokens; "
                "a longer chunk would read more exact tokens than decoding does"
            )

    def add(self, p: np.ndarray, q: np.ndarray, targets: list[int], packed: bool) -> None:
        """Counts tokens, given both log-probabilities [tokens, vocabulary] of the next ones, and
        whether the tokens read packed ones."""
        # The terms cancel almost wholly, so they are summed in double precision.
        divergences = np.sum(np.exp(p) * (p - q), -1).tolist()
        if not all(map(math.isfinite, divergences)):
            raise ValueError(f"setting {self.setting.name!r}: the model's logits are not finite")
        self._divergences += divergences
        self._agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
        rows = np.arange(len(targets))
        self._loss -= float(q[rows, targets].sum())
        self._loss_uncompressed -= float(p[rows, targets].sum())
        self._read_packed += len(divergences) * packed

    def look_at(self, cache: Any, item_size: int) -> None:
        """Notes what the cache holds at an end; `item_size`: bytes of an exact coordinate."""
        self._report = cache.memory_report()
        self._item_size = item_size

    def result(self) -> Fidelity:
        if self._read_packed == 0:
            raise ValueError(
                f"setting {self.setting.name!r}: no packed token was read, so nothing was "
                "measured; prefill more tokens than sinks, window and a tile of 64, or lower the "
                "window"
            )
        read = len(self._divergences)
        divergences = np.array(self._divergences)
        return Fidelity(
            setting=self.setting.name,
            kl_mean=float(divergences.mean()),
            kl_median=float(np.sort(divergences)[(read - 1) // 2]),
            kl_max=float(divergences.max()),
            top1_agreement=self._agreeing / read,
            perplexity=math.exp(self._loss / read),
            perplexity_uncompressed=math.exp(self._loss_uncompressed / read),
            bits_per_coordinate=_packed_bits(self._report, self._item_size),
            bits_per_coordinate_whole=8
            * self._item_size
            * self._report["total_bytes"]
            / self._report["uncompressed_bytes"],
            tokens_read=read,
            tokens_read_packed=self._read_packed,
            packed_share=self._report["packed_tokens"] / self._report["tokens"],
        )


def _packed_bits(report: dict[str, Any], item_size: int) -> float:
    """Bits per coordinate of the packed tokens, over the layers that have any."""
    layers = [layer for layer in report["layers"] if layer["packed_tokens"] > 0]
    coordinates = sum(
        layer["uncompressed_bytes"] / item_size * layer["packed_tokens"] / layer["tokens"]
        for layer in layers
    )
    return 8 * sum(layer["packed_bytes"] for layer in layers) / coordinates
