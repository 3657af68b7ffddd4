"""Two processes, LMCache's own managers with the serde "tqai", and a Redis server between them.

    python bench/lmcache_processes.py --model FOLDER [--tokens 4096] [--texts 4]

One process reads prompts and stores the keys and values of their first tokens, in whole chunks; the
other, which has only the prompts, fetches these chunks, reads the rest of each prompt itself, as
LMCache's engines do, and goes on. Printed are the bytes in the server, and of the next tokens the
KL divergence from a cache that never left the first process and was never compressed: of what the
second process says; of what the first one says over a cache of tqai's own at the same bits, with
the same tokens exact; and over that cache as it is by default, with more of them exact. Needs
lmcache, redis and redis-server.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqai import api
from tqai.measure.text import prose
from tqai.measure.time_prefill import _read, _seal
from tqai.measure.time_store import _cache_of, _chunks, _distributions, _kl, _options, _tensors
from tqai.transformers.loading import load
from transformers import DynamicCache

CHUNK, REST, NEXT = 256, 128, 64
"""Tokens of a chunk; of a prompt beyond its last chunk; whose distributions are compared."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--tokens", type=int, default=4096, help="of each prompt in chunks")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--bits", default="4,2", help="of keys and values (default: 4,2)")
    parser.add_argument("--exact-first", type=int, default=1)
    parser.add_argument("--role", choices=("write", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role is not None:
        {"write": write, "read": read}[options.role](options)
        return
    with socket.socket() as found, tempfile.TemporaryDirectory() as folder:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        command = ["redis-server", "--port", str(port), "--save", "", "--dir", folder]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            time.sleep(1)
            for role in ("write", "read"):
                more = ["--role", role, "--port", str(port), "--folder", folder]
                subprocess.run([sys.executable, *sys.argv, *more], check=True)
        finally:
            server.kill()


def serde(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    keys, values = map(int, options.bits.split(","))
    own = {"bits_k": keys, "bits_v": values, "exact_first": options.exact_first}
    return {"type": "tqai", **_options(model), **own}


def manager(options: argparse.Namespace, serde: dict[str, Any]) -> Any:
    import tqai.lmcache  # noqa: F401
    from lmcache.v1.distributed.config import (
        EvictionConfig,
        L1ManagerConfig,
        L1MemoryManagerConfig,
        StorageManagerConfig,
    )
    from lmcache.v1.distributed.l2_adapters.config import parse_args_to_l2_adapters_config
    from lmcache.v1.distributed.storage_manager import StorageManager

    spec = {"type": "resp", "host": "127.0.0.1", "port": options.port, "num_workers": 2}
    adapters = SimpleNamespace(l2_adapter=[json.dumps({**spec, "serde": serde})])
    room = L1MemoryManagerConfig(size_in_bytes=1 << 30, use_lazy=False, shm_name="")
    return StorageManager(
        StorageManagerConfig(
            l1_manager_config=L1ManagerConfig(memory_config=room),
            eviction_config=EvictionConfig(eviction_policy="LRU"),
            l2_adapter_config=parse_args_to_l2_adapters_config(adapters),
        )
    )


def keys_and_layout(model: Any, text: int, count: int) -> tuple[list[Any], Any]:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey

    rank = ObjectKey.ComputeKVRank(1, 0, 1, 0)
    numbers = range(text * count, (text + 1) * count)
    keys = [ObjectKey(number.to_bytes(16, "big"), "a/model", rank) for number in numbers]
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = [2, config.num_hidden_layers, CHUNK, config.num_key_value_heads * dim]
    return keys, MemoryLayoutDesc([torch.Size(shape)], [torch.bfloat16])


def prompts(tokenizer: Any, options: argparse.Namespace) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each text, the ids in whole chunks, and those of the rest and of what follows."""
    ids = torch.tensor([tokenizer(prose(), verbose=False).input_ids])
    whole = options.tokens + REST + NEXT
    step = (ids.shape[1] - whole) // max(options.texts - 1, 1)
    if step < whole:
        raise SystemExit(f"the text has {ids.shape[1]} tokens: fewer than {options.texts} prompts'")
    cut = [ids[:, at : at + whole] for at in range(0, step * options.texts, step)]
    return [(each[:, : options.tokens], each[:, options.tokens :]) for each in cut]


def says(model: Any, cache: Any, more: torch.Tensor, rest: int = REST) -> torch.Tensor:
    """Log-probabilities after each of the next tokens, once the rest of the prompt was read."""
    _distributions(model, cache, more[:, :rest])
    return _distributions(model, cache, more[:, rest:])


def own_divergences(
    model: Any, options: argparse.Namespace, states: Any, read: Any, expected: Any, more: Any
) -> tuple[float, float]:
    """Of caches of this process: with the same tokens exact as those of the second one, and with
    those that are by default."""
    bits_k, bits_v = map(int, options.bits.split(","))
    first = options.exact_first
    with api.patched(model, bits_k=bits_k, bits_v=bits_v, sink_tokens=first, residual_window=0):
        packed = api.new_cache(model)
        # So many tokens that no tile of the last ones is left open.
        end = states[0][0].shape[2] + first
        _seal(packed, [(each.keys[:, :, :end], each.values[:, :, :end]) for each in read.layers])
        decoded = [(each.keys, each.values) for each in packed.layers]
    same = says(model, _cache_of(decoded), more[:, first:], REST - first)
    with api.patched(model, bits_k=bits_k, bits_v=bits_v):
        packed = api.new_cache(model)
        _seal(packed, states)
        return _kl(expected, same), _kl(expected, says(model, packed, more))


@torch.inference_mode()
def write(options: argparse.Namespace) -> None:
    import redis

    model, tokenizer = load(options.model)
    store = manager(options, serde(model, options))
    kept: list[dict[str, Any]] = []
    whole = 0
    for number, (prompt, more) in enumerate(prompts(tokenizer, options)):
        plain = DynamicCache()
        start = time.perf_counter()
        _read(model, prompt, plain)
        seconds = time.perf_counter() - start
        print(f"the first process read {prompt.shape[1]} tokens in {seconds:.2f} s")
        layers: list[Any] = plain.layers
        states = [(layer.keys, layer.values) for layer in layers]
        whole_cache: Any = _cache_of(states)
        expected = says(model, whole_cache, more)
        own = own_divergences(model, options, states, whole_cache, expected, more)
        chunks = _chunks(states, CHUNK)
        shape, dtype = states[0][0].shape, states[0][0].dtype
        kept.append({"expected": expected, "own": own, "shape": shape, "dtype": dtype})
        keys, layout = keys_and_layout(model, number, len(chunks))
        rooms = store.reserve_write(keys, layout)
        for key, chunk in zip(keys, chunks, strict=True):
            rooms[key].tensor.copy_(chunk)
        store.finish_write(keys)
        whole += sum(chunk.nbytes for chunk in chunks)
    torch.save(kept, options.folder / "kept.pt")
    client = redis.Redis(port=options.port)
    while client.dbsize() < len(kept) * len(chunks):
        time.sleep(0.05)
    time.sleep(0.5)
    size = sum(client.strlen(key) for key in client.keys())
    print(
        f"{size} bytes in Redis of {whole} in bfloat16: 1/{whole / size:.3f}; of fp8 "
        f"1/{whole / 2 / size:.3f}"
    )
    store.close()


def told(divergences: tuple[float, ...]) -> str:
    through, same, default = divergences
    return (
        f"KL of what it goes on with {through:.5f}; in the first process with the same tokens "
        f"exact {same:.5f}, by default {default:.5f}"
    )


@torch.inference_mode()
def read(options: argparse.Namespace) -> None:
    from lmcache.v1.distributed.api import GroupedObjectKeys, PrefetchTaskSpec

    model, tokenizer = load(options.model)
    kept = torch.load(options.folder / "kept.pt", weights_only=False)
    store = manager(options, serde(model, options))
    found_of_all: list[tuple[float, float, float]] = []
    for number, ((_, more), known) in enumerate(
        zip(prompts(tokenizer, options), kept, strict=True)
    ):
        keys, layout = keys_and_layout(model, number, options.tokens // CHUNK)
        row = GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=layout)
        start = time.perf_counter()
        handle = store.submit_prefetch_task(PrefetchTaskSpec(key_groups=[row]))
        assert store.wait_prefetch_status(handle, 60)
        result = store.query_prefetch_status(handle)
        assert result.hit_cells[0].popcount() == len(keys)
        seconds = time.perf_counter() - start
        like = [(torch.empty(known["shape"], dtype=known["dtype"]),)]
        with store.read_prefetched_results(keys) as objects:
            states = _tensors([each.tensor for each in objects], like)
        store.finish_read_prefetched(keys)
        found = says(model, _cache_of(states), more)
        found_of_all.append((_kl(known["expected"], found), *known["own"]))
        print(f"{len(keys)} chunks came in {seconds:.2f} s; {told(found_of_all[-1])}")
    sums = (sum(each) / len(found_of_all) for each in zip(*found_of_all, strict=True))
    print(f"mean of {len(found_of_all)} texts: {told(tuple(sums))}")
    store.close()


if __name__ == "__main__":
    main()
