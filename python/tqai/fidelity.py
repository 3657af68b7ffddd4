"""What a compressed cache costs in fidelity, measured while the packed tokens are read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

import tqai
from tqai.text import prose

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tqai.cache import TqaiCache

# What a setting's name may say after its bits, and the argument of `patch` that it stands for.
SETTING_KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "sinks": ("sink_tokens", int),
    "window": ("residual_window", int),
    "rotation": ("rotation", str),
    "centering": ("centering", str),
    "seed": ("seed", int),
    "level": ("level", str),
    "skip": ("skip_layers", lambda layers: tuple(int(layer) for layer in layers.split("+"))),
}


def parse_setting(name: str) -> dict[str, Any]:
    """Arguments of ``tqai.patch`` from a name such as ``k4v2`` or ``k4v4,window=32,sinks=0``.

    The keys are sinks, window, rotation, centering, seed, level and skip, whose layers are joined
    by plus signs.

    Raises:
        ValueError: for a name of another form.
    """
    bits, *rest = name.split(",")
    match = re.fullmatch(r"k(\d+)v(\d+)", bits)
    if match is None:
        raise ValueError(f"setting {name!r}: expected the bits of keys and values first, as k4v2")
    options: dict[str, Any] = {"bits_k": int(match[1]), "bits_v": int(match[2])}
    for item in rest:
        key, _, value = item.partition("=")
        if key not in SETTING_KEYS:
            allowed = ", ".join(f"{key}=" for key in SETTING_KEYS)
            raise ValueError(f"setting {name!r}: {item!r} starts with none of {allowed}")
        option, convert = SETTING_KEYS[key]
        try:
            options[option] = convert(value)
        except ValueError:
            raise ValueError(f"setting {name!r}: {key}={value!r} is not a number") from None
    return options


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
    """Tokens fed one at a time, in all samples together."""
    tokens_read_packed: int
    """Those of them after which the cache held packed tokens, which their attention read."""
    packed_share: float
    """Share of the tokens in the cache that were packed at the end."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None = None,
    settings: Iterable[str | Mapping[str, Any]] = ("k4v4", "k4v2"),
    *,
    prefill: int = 512,
    read: int = 256,
    samples: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Fidelity]:
    """Compares compressed caches with the model's own, as in decoding: one result per setting.

    Takes `samples` stretches of text, spread evenly. Of each, the first `prefill` tokens are read
    at once and exactly; then `read` tokens are fed one at a time, so that each reads the packed
    past, and the logits after each are compared with those of the uncompressed model, fed alike.

    Args:
        model: not patched; patched in between, and as it was in the end.
        text: by default ``tqai.text.prose()``.
        settings: arguments of ``tqai.patch``, or their names (``parse_setting``).
        progress: called after every token with the tokens fed, all that will be, and for what.

    Raises:
        ValueError: for a text too short, a patched model, or a setting under which no token read
            packed ones: it would have measured nothing.
    """
    _check_unpatched(model)
    measures = [_Measure(setting) for setting in settings]
    if not measures:
        raise ValueError("settings: expected at least one")
    for name, value in (("prefill", prefill), ("read", read), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    stretches = _stretches(tokenizer, prose() if text is None else text, prefill + read, samples)

    total = samples * read * (1 + len(measures))
    done = 0

    def count(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, what)

    for ids in stretches:
        targets = ids[0, prefill + 1 :]
        reference = []
        for logits in _decode(model, ids, prefill, DynamicCache(config=model.config)):
            reference.append(torch.log_softmax(logits.float(), -1))
            count("uncompressed")
        for measure in measures:
            cache = tqai.patch(model, **measure.options)
            try:
                decoding = _decode(model, ids, prefill, cache)
                for p, logits, target in zip(reference, decoding, targets, strict=True):
                    measure.add(p, torch.log_softmax(logits.float(), -1), target)
                    measure.look_at(cache, model.dtype.itemsize)
                    count(measure.name)
            finally:
                tqai.unpatch(model)
    return [measure.result() for measure in measures]


def _check_unpatched(model: PreTrainedModel) -> None:
    try:
        tqai.new_cache(model)
    except ValueError:
        return
    raise ValueError("the model is patched; call tqai.unpatch(model) first")


@torch.inference_mode()
def _decode(
    model: PreTrainedModel, ids: torch.Tensor, prefill: int, cache: Any
) -> Iterator[torch.Tensor]:
    """Logits [vocabulary] after each token that follows the prefill, but for the last token."""
    model(ids[:, :prefill], past_key_values=cache, use_cache=True, logits_to_keep=1)
    for position in range(prefill, ids.shape[1] - 1):
        token = ids[:, position : position + 1]
        yield model(token, past_key_values=cache, use_cache=True).logits[0, -1]


def _stretches(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, samples: int
) -> list[torch.Tensor]:
    """Token ids [1, length + 1] each: the last token is only predicted."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    # Some models (Gemma) make no sense of a text without its first token.
    first = [tokenizer.bos_token_id]
    start = first if tokenizer("a").input_ids[:1] == first else []
    taken = length + 1 - len(start)
    if len(tokens) < taken:
        raise ValueError(f"the text has {len(tokens)} tokens: expected at least {taken}")
    stride = (len(tokens) - taken) // max(samples - 1, 1)
    return [
        torch.tensor([start + tokens[sample * stride : sample * stride + taken]])
        for sample in range(samples)
    ]


class _Measure:
    """Sums over the tokens that one setting has read."""

    def __init__(self, setting: str | Mapping[str, Any]) -> None:
        if isinstance(setting, str):
            self.name, self.options = setting, parse_setting(setting)
        else:
            self.name = ",".join(f"{key}={value}" for key, value in setting.items())
            self.options = dict(setting)
        self._divergences: list[float] = []
        self._agreeing = 0
        self._loss = 0.0
        self._loss_uncompressed = 0.0
        self._read_packed = 0
        self._report: dict[str, Any] = {}
        self._item_size = 0

    def add(self, p: torch.Tensor, q: torch.Tensor, target: torch.Tensor) -> None:
        """Counts a token, given both log-probabilities [vocabulary] of the next one."""
        # The terms cancel almost wholly, so they are summed in double precision.
        divergence = torch.sum(p.double().exp() * (p.double() - q.double())).item()
        if not math.isfinite(divergence):
            raise ValueError(f"setting {self.name!r}: the model's logits are not finite")
        self._divergences.append(divergence)
        self._agreeing += int(p.argmax() == q.argmax())
        self._loss -= q[target].item()
        self._loss_uncompressed -= p[target].item()

    def look_at(self, cache: TqaiCache, item_size: int) -> None:
        """Counts what the cache holds after a token; `item_size`: bytes of an exact coordinate."""
        self._report = cache.memory_report()
        self._item_size = item_size
        self._read_packed += self._report["packed_tokens"] > 0

    def result(self) -> Fidelity:
        if self._read_packed == 0:
            raise ValueError(
                f"setting {self.name!r}: no packed token was read, so nothing was measured; "
                "prefill more tokens than sinks, window and a tile of 64, or lower the window"
            )
        read = len(self._divergences)
        divergences = torch.tensor(self._divergences, dtype=torch.float64)
        return Fidelity(
            setting=self.name,
            kl_mean=divergences.mean().item(),
            kl_median=divergences.median().item(),
            kl_max=divergences.max().item(),
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
