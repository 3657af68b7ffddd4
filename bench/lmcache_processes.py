"""Two processes, LMCache's own managers with the serde "tqai", and a Redis server between them.

    python bench/lmcache_processes.py --model FOLDER [--tokens 4096]

One process reads a prompt and stores its keys and values; the other, which has only its ids,
fetches them and goes on. Printed are the bytes in the server, and the KL divergence of the next
tokens from a cache that never left the first process and was never compressed, beside that of
tqai's cache of the first process at the same bits. Needs lmcache, redis and redis-server.
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

CHUNK, READ = 256, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--bits", default="4,2", help="of keys and values (default: 4,2)")
    parser.add_argument("--exact-first", type=int, default=0)
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


def keys_and_layout(model: Any, count: int) -> tuple[list[Any], Any]:
    from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey

    rank = ObjectKey.ComputeKVRank(1, 0, 1, 0)
    keys = [ObjectKey(number.to_bytes(16, "big"), "a/model", rank) for number in range(count)]
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = [2, config.num_hidden_layers, CHUNK, config.num_key_value_heads * dim]
    return keys, MemoryLayoutDesc([torch.Size(shape)], [torch.bfloat16])


def texts(tokenizer: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([tokenizer(prose(), verbose=False).input_ids])
    return ids[:, :tokens], ids[:, tokens : tokens + READ]


@torch.inference_mode()
def write(options: argparse.Namespace) -> None:
    import redis

    model, tokenizer = load(options.model)
    prompt, more = texts(tokenizer, options.tokens)
    cache = DynamicCache()
    start = time.perf_counter()
    _read(model, prompt, cache)
    print(f"the first process read {options.tokens} tokens in {time.perf_counter() - start:.2f} s")
    states = [(layer.keys, layer.values) for layer in cache.layers]
    expected = _distributions(model, _cache_of(states), more)
    bits_k, bits_v = map(int, options.bits.split(","))
    for name, own in (("all packed", {"sink_tokens": 0, "residual_window": 0}), ("defaults", {})):
        with api.patched(model, bits_k=bits_k, bits_v=bits_v, **own):
            packed = api.new_cache(model)
            _seal(packed, states)
            kl = _kl(expected, _distributions(model, packed, more))
        print(f"KL of its own cache at K{bits_k}/V{bits_v}, {name}: {kl:.5f}")
    chunks = _chunks(states, CHUNK)
    raw = _distributions(model, _cache_of(_tensors(chunks, states)), more)
    print(f"KL of bfloat16: {_kl(expected, raw):.5f}")
    torch.save((expected, [states[0][0].shape, states[0][0].dtype]), options.folder / "expected.pt")
    store = manager(options, serde(model, options))
    keys, layout = keys_and_layout(model, len(chunks))
    rooms = store.reserve_write(keys, layout)
    for key, chunk in zip(keys, chunks, strict=True):
        rooms[key].tensor.copy_(chunk)
    store.finish_write(keys)
    client = redis.Redis(port=options.port)
    while client.dbsize() < len(keys):
        time.sleep(0.05)
    time.sleep(0.5)
    size = sum(client.strlen(key) for key in client.keys())
    whole = sum(chunk.nbytes for chunk in chunks)
    print(
        f"{size} bytes in Redis of {whole} in bfloat16: 1/{whole / size:.3f}; of fp8 "
        f"1/{whole / 2 / size:.3f}"
    )
    store.close()


@torch.inference_mode()
def read(options: argparse.Namespace) -> None:
    from lmcache.v1.distributed.api import GroupedObjectKeys, PrefetchTaskSpec

    model, tokenizer = load(options.model)
    _, more = texts(tokenizer, options.tokens)
    expected, (shape, dtype) = torch.load(options.folder / "expected.pt", weights_only=False)
    store = manager(options, serde(model, options))
    keys, layout = keys_and_layout(model, options.tokens // CHUNK)
    row = GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=layout)
    start = time.perf_counter()
    handle = store.submit_prefetch_task(PrefetchTaskSpec(key_groups=[row]))
    assert store.wait_prefetch_status(handle, 60)
    result = store.query_prefetch_status(handle)
    assert result.hit_cells[0].popcount() == len(keys)
    seconds = time.perf_counter() - start
    with store.read_prefetched_results(keys) as objects:
        states = _tensors([each.tensor for each in objects], [(torch.empty(shape, dtype=dtype),)])
    found = _distributions(model, _cache_of(states), more)
    store.finish_read_prefetched(keys)
    print(
        f"the second process had them in {seconds:.2f} s; KL of what it goes on with: "
        f"{_kl(expected, found):.5f}"
    )
    store.close()


if __name__ == "__main__":
    main()
