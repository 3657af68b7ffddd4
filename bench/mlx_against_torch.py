"""Greedy tokens of one model under mlx-lm and under transformers, both with tqai's cache.

Says where they differ first, and how far apart the two best logits were there.

    PYTHONPATH=python python bench/mlx_against_torch.py FOLDER [--context 600] [--tokens 64]

Both read the prompt at once, and then decode. Where the two frameworks choose different tokens the
texts part; so each is also asked what it would choose after the tokens of the other ("given the
same text"), where logits can be compared place by place. fp32, one set of bits.
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx.core as mx
import numpy as np
import torch
import tqai
from tqai.measure.text import prose
from tqai.mlx.loading import load
from tqai.transformers.model.names import cache_argument
from transformers import AutoModelForCausalLM, AutoTokenizer


def torch_logits(folder: str, ids: list[int], bits: dict[str, int], given: Any) -> Any:
    """Logits [tokens, vocabulary] after a prompt, of the tokens that the model chooses, `given`
    being how many, or of those that are given; and what the cache takes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache = tqai.patch(model, **bits)

    def step(tokens: list[int]) -> np.ndarray:
        with torch.inference_mode():
            out = model(torch.tensor([tokens]), logits_to_keep=1, **cache_argument(model, cache))
        return out.logits[0, -1].float().numpy()

    return decode(step, ids, given), cache.memory_report()


def mlx_logits(folder: str, ids: list[int], bits: dict[str, int], given: Any) -> Any:
    """As ``torch_logits``."""
    model = load(folder)[0]
    cache = tqai.patch(model, **bits)

    def step(tokens: list[int]) -> np.ndarray:
        logits = model(mx.array([tokens]), cache=cache)[0, -1]
        mx.eval(logits, [layer.state for layer in cache])
        return np.array(logits)

    return decode(step, ids, given), cache.memory_report()


def decode(step: Any, ids: list[int], given: int | list[int]) -> np.ndarray:
    logits = [step(ids)]
    count = given if isinstance(given, int) else len(given)
    for at in range(count - 1):
        token = int(logits[-1].argmax()) if isinstance(given, int) else given[at]
        logits.append(step([token]))
    return np.stack(logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bits-k", type=int, default=4)
    parser.add_argument("--bits-v", type=int, default=2)
    options = parser.parse_args()
    bits = {"bits_k": options.bits_k, "bits_v": options.bits_v}
    ids = AutoTokenizer.from_pretrained(options.folder)(prose()[:50_000]).input_ids
    ids = ids[: options.context]
    theirs, report = torch_logits(options.folder, ids, bits, options.tokens)
    tokens = theirs.argmax(-1).tolist()
    free, _ = mlx_logits(options.folder, ids, bits, options.tokens)
    forced, own = mlx_logits(options.folder, ids, bits, tokens)

    same = free.argmax(-1) == theirs.argmax(-1)
    first = next((at for at, equal in enumerate(same) if not equal), len(same))
    print(f"{options.folder}, K{options.bits_k}/V{options.bits_v}, {options.context} tokens read")
    print(f"greedy: the first {first} of {len(tokens)} tokens are equal")
    best = np.sort(theirs, -1)
    gaps = best[:, -1] - best[:, -2]
    apart = np.abs(forced - theirs).max(-1)
    differ = np.flatnonzero(forced.argmax(-1) != theirs.argmax(-1))
    print(f"given torch's text: {len(tokens) - len(differ)} of {len(tokens)} equal")
    print(
        f"logits apart by at most {apart.max():.2g}, mean of each place's most {apart.mean():.2g}"
    )
    for at in differ:
        print(f"  place {at}: torch's two best {gaps[at]:.2g} apart, logits by {apart[at]:.2g}")
    print(f"least gap of torch's two best at any place: {gaps.min():.2g}")
    for name, each in (("torch", report), ("mlx", own)):
        print(f"{name}: {each['total_bytes']} bytes, {each['packed_tokens']} tokens packed")


if __name__ == "__main__":
    main()
