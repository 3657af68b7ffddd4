"""The memory that reading a prompt takes under mlx-lm at its highest, plain and compressed.

    PYTHONPATH=python python bench/mlx_prompt_memory.py FOLDER [--context 8192] [--layers 6]

Each cache gets a process of its own, which loads the model and has mlx-lm read the prompt in steps,
as ``mlx_lm.generate`` does. Printed are what the process's physical memory had grown by at its
highest since then, what it had grown by at the end, the cache's ``nbytes`` and the time.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import mlx.core as mx
import tqai
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from tqai.measure.resident import peak_resident_bytes, reset_peak, resident_bytes
from tqai.measure.text import prose
from tqai.mlx.loading import load


def read(options: argparse.Namespace) -> dict[str, float]:
    model, tokenizer = load(options.folder, options.dtype)
    if options.layers:
        del model.model.layers[options.layers :]
    text = prose()
    ids = tokenizer.encode(text)
    while len(ids) < options.context:
        ids = ids + ids
    if options.cache == "tqai":
        tqai.patch(model, bits_k=options.bits_k, bits_v=options.bits_v)
    # Once before, so that what mlx makes once is not counted.
    next(generate_step(mx.array(ids[:16]), model, max_tokens=1))
    cache = make_prompt_cache(model)
    mx.clear_cache()
    before = resident_bytes()
    if before is None or not reset_peak():
        raise SystemExit("this system does not tell what memory a process takes")
    start = time.perf_counter()
    prompt = mx.array(ids[: options.context])
    step = options.prefill_step_size
    next(generate_step(prompt, model, max_tokens=1, prompt_cache=cache, prefill_step_size=step))
    seconds = time.perf_counter() - start
    peak = peak_resident_bytes()
    mx.clear_cache()
    after = resident_bytes()
    assert peak is not None and after is not None
    size = sum(layer.nbytes for layer in cache)
    return {"peak": peak - before, "after": after - before, "nbytes": size, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, help="of the model, the first ones alone")
    parser.add_argument("--prefill-step-size", type=int, default=512)
    parser.add_argument("--bits-k", type=int, default=4)
    parser.add_argument("--bits-v", type=int, default=2)
    parser.add_argument("--cache", choices=("plain", "tqai"), help="this one alone, as JSON")
    options = parser.parse_args()
    if options.cache:
        print(json.dumps(read(options)))
        return
    layers = f"the first {options.layers} layers" if options.layers else "all layers"
    step = options.prefill_step_size
    print(f"{options.context} tokens, {layers}, {options.dtype}, steps of {step}", flush=True)
    for cache in ("plain", "tqai"):
        command = [sys.executable, *sys.argv, "--cache", cache]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        name = f"k{options.bits_k}v{options.bits_v}" if cache == "tqai" else "KVCache"
        megabytes = (f"{found[part] / 1e6:.1f} MB {part}" for part in ("peak", "after", "nbytes"))
        print(f"{name}: {', '.join(megabytes)}, {found['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
