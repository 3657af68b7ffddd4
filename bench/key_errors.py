"""What compression costs in scores, without the chance that one text's KL has.

    PYTHONPATH=python python bench/key_errors.py FOLDER [--tokens 2048] [--bits 2 3 4] [--json]

A model reads English prose uncompressed; then each layer's keys go into caches of tqai's, are
sealed and read back. Printed is the squared error of the scores of the prose's own queries with
them, over the energy of these scores, all less each query's mean over keys, which softmax does not
see: the geometric mean over all kv heads, by rotation (codec="scalar") and in learnt bases
(codec="adaptive").
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqai import api
from tqai.cli.output import print_json
from tqai.measure.text import prose
from tqai.transformers.loading import load
from tqai.transformers.model.names import cache_argument
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_WINDOW = 0
_SINKS = 4

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [heads, tokens, dim], keys and values [kv heads, tokens, dim], as attention has them."""


@contextmanager
def heard(model: Any, layers: list[Layer]) -> Iterator[None]:
    """Attention inside adds what it gets to ``layers``."""

    def listen(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        layers.append((query[0], key[0], value[0]))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("heard", listen)
    before = model.config._attn_implementation
    model.set_attn_implementation("heard")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def read_back(model: Any, layers: list[Layer], codec: str, bits: int) -> list[torch.Tensor]:
    """The layers' keys as caches have them that are sealed."""
    api.patch(
        model, codec=codec, bits_k=bits, bits_v=4, sink_tokens=_SINKS, residual_window=_WINDOW
    )
    try:
        cache = api.new_cache(model)
        for index, (_, keys, values) in enumerate(layers):
            cache.update(keys[None], values[None], index)
            cache.layers[index].settle(True)
        return [torch.as_tensor(layer.keys[0]) for layer in cache.layers]
    finally:
        api.unpatch(model)


def score_error(queries: torch.Tensor, keys: torch.Tensor, held: torch.Tensor) -> float:
    """Of one kv head, over the energy of the scores."""
    queries = queries.double().flatten(0, 1)
    moments = queries.T @ queries

    def energy(vectors: torch.Tensor) -> float:
        centred = vectors.double() - vectors.double().mean(0)
        return float(((centred @ moments) * centred).sum())

    sealed = slice(_SINKS, _SINKS + (len(keys) - _SINKS) // 64 * 64)
    return energy((held - keys)[sealed]) / energy(keys[sealed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model, tokenizer = load(options.model, "float32", None)
    ids = torch.tensor([tokenizer(prose(), verbose=False).input_ids[: options.tokens]])
    layers: list[Layer] = []
    with torch.inference_mode(), heard(model, layers):
        model(ids, logits_to_keep=1, **cache_argument(model, DynamicCache()))
    found: dict[str, float] = {}
    for bits in options.bits:
        for codec in ("scalar", "adaptive"):
            logarithms = []
            for (queries, keys, _), held in zip(
                layers, read_back(model, layers, codec, bits), strict=True
            ):
                group = len(queries) // len(keys)
                for head in range(len(keys)):
                    own = queries[head * group : (head + 1) * group]
                    logarithms.append(math.log(score_error(own, keys[head], held[head])))
            found[f"k{bits},codec={codec}"] = math.exp(sum(logarithms) / len(logarithms))
    if options.json:
        print_json(found)
        return
    print(f"{ids.shape[1]} tokens, {len(layers)} layers: squared error of scores over their energy")
    for name, error in found.items():
        print(f"{name:22} {error:.6f}")


if __name__ == "__main__":
    main()
