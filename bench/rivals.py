"""Other ways of compressing a cache, written anew and measured as `tqai eval` measures tqai's.

    PYTHONPATH=python python bench/rivals.py FOLDER [--only tbq4 kivi2 …] [--setting k4v4 …]
        [--window 128 --sinks 4] [--prefill 512] [--read 256] [--samples 4] [--own] [--json]

Each cache returns what its codes stand for, so that the model's own attention reads it; what is fed
at a time sees itself exactly, and the prompt too. Bytes are those that codes, scales and zeros
take, packed as tightly as can be, and exact tokens in the model's dtype. They say nothing of speed.

- tbq4: as OpenVINO's TBQ4: random rotation, a norm a vector, 4 bits by Lloyd and Max; no centre, no
  norm correction, and all tokens quantised as they come (arXiv:2504.19874).
- kivi2: as KIVI (arXiv:2402.02750): 2 bits between the least and the largest of 32, keys along
  tokens in each channel, values along channels in each token; the last 128 tokens exact.
- kvarn42, kvarn22: as KVarN (arXiv:2606.03458): Hadamard rotation, tiles of 128 tokens whose rows
  and columns are brought to equal variance in turn, then 4 or 2 bits for keys and 2 for values
  between the least and the largest; the first 4 and the last 128 tokens exact.
- e8: random rotation, a norm a vector, the 65536 points of E8 of `tqai reproduce` at 2 bits; the
  first 4 and the last 128 tokens exact.
- quanto4, quanto2, hqq4, hqq2: transformers' QuantizedCache, where optimum-quanto or hqq is there.

With --window and --sinks those of the first kinds have these in place of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from tqai import _core
from tqai.cli.evaluate import print_comparison
from tqai.cli.output import print_json, progress_bar
from tqai.measure.fidelity import evaluate
from tqai.measure.lattices import quantised
from tqai.transformers.loading import load
from transformers import QuantizedCache
from transformers.cache_utils import Cache, DynamicLayer

Quantise = Callable[[torch.Tensor, int], tuple[torch.Tensor, int]]
"""Of vectors [heads, tokens, head_dim] fp32 and a seed: what their codes stand for, and bytes."""

_HALF = 2
"""Bytes of an FP16 number: scales, zero points and norms."""


@dataclass(frozen=True)
class Rival:
    """See ``tqai.measure.named_settings.Candidate``."""

    name: str
    model: Any
    keys: Quantise
    values: Quantise
    tile: int = 1
    """Tokens that are quantised together."""
    window: int = 0
    sinks: int = 0
    seed: int | None = None

    def again(self, **changes: Any) -> Rival:
        window = changes.get("residual_window", self.window)
        seed = changes.get("seed", self.seed)
        name = f"{self.name},window={window}" if window != self.window else self.name
        return replace(self, name=name, window=window, seed=seed)

    @contextmanager
    def patched(self) -> Iterator[RivalCache]:
        text = self.model.config.get_text_config()
        yield RivalCache([RivalLayer(self) for _ in range(text.num_hidden_layers)])


class RivalLayer(DynamicLayer):
    """Keys and values, of which those that are quantised are what their codes stand for."""

    def __init__(self, rival: Rival) -> None:
        super().__init__()
        self.rival = rival
        self.packed = 0
        self.packed_bytes = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_initialized:
            self._seal()
        return super().update(key_states, value_states, *args, **kwargs)

    @torch.inference_mode()
    def _seal(self) -> None:
        """What has left the window, as before tqai appends."""
        rival, start = self.rival, self.rival.sinks + self.packed
        tokens = self.keys.shape[2] - rival.window - start
        tokens -= tokens % rival.tile
        if tokens <= 0:
            return
        part = slice(start, start + tokens)
        for side, (states, quantise) in enumerate(
            ((self.keys, rival.keys), (self.values, rival.values))
        ):
            found, size = quantise(states[0, :, part].float(), 2 * (rival.seed or 0) + side)
            states[0, :, part] = found.to(states.dtype)
            self.packed_bytes += size
        self.packed += tokens

    def report(self) -> dict[str, int]:
        self._seal()  # what the next tokens will read
        tokens = self.keys.shape[2]
        whole = self.keys.nbytes + self.values.nbytes
        return {
            "tokens": tokens,
            "packed_tokens": self.packed,
            "packed_bytes": self.packed_bytes,
            "total_bytes": self.packed_bytes + whole // tokens * (tokens - self.packed),
            "uncompressed_bytes": whole,
        }


class RivalCache(Cache):
    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)

    def memory_report(self) -> dict[str, Any]:
        return _summed([layer.report() for layer in self.layers])


def _summed(layers: list[dict[str, int]]) -> dict[str, Any]:
    return {
        "layers": layers,
        "tokens": layers[0]["tokens"],
        "packed_tokens": layers[0]["packed_tokens"],
        "total_bytes": sum(layer["total_bytes"] for layer in layers),
        "uncompressed_bytes": sum(layer["uncompressed_bytes"] for layer in layers),
    }


def tbq(bits: int) -> Quantise:
    def quantise(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, int]:
        rows = x.reshape(-1, x.shape[2]).numpy()
        quantiser = _core.Quantizer(x.shape[2], bits, seed=seed, norm_correction=False)
        codes, norms = quantiser.encode(rows)
        found = torch.from_numpy(quantiser.decode(codes, norms)).reshape(x.shape)
        return found, codes.nbytes + norms.nbytes

    return quantise


def e8(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, int]:
    rotation = rotation_of(x.shape[2], seed)
    norms = x.norm(dim=2, keepdim=True).clamp(min=1e-20)
    rows = (x / norms @ rotation.T).reshape(-1, x.shape[2]).numpy()
    found = torch.from_numpy(quantised("E8", 2, rows).astype(np.float32)).reshape(x.shape)
    size = x.numel() * 2 // 8 + norms.numel() * _HALF
    return found @ rotation * norms.half().float(), size


def between(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """To the nearest of 2^bits steps from the least to the largest along `dim`, both as FP16."""
    low = x.amin(dim, keepdim=True).half().float()
    step = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().float().clamp(min=1e-7)
    return ((x - low) / step).round().clamp(0, 2**bits - 1) * step + low


def kivi(bits: int, group: int, along_tokens: bool) -> Quantise:
    def quantise(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, int]:
        heads, tokens, dim = x.shape
        if along_tokens:
            found = between(x.reshape(heads, -1, group, dim), bits, 2)
        else:
            found = between(x.reshape(heads, tokens, -1, group), bits, 3)
        size = x.numel() * bits // 8 + x.numel() // group * 2 * _HALF
        return found.reshape(x.shape), size

    return quantise


def kvarn(bits: int, tile: int, along_tokens: bool, rounds: int = 16) -> Quantise:
    def quantise(x: torch.Tensor, seed: int) -> tuple[torch.Tensor, int]:
        heads, tokens, dim = x.shape
        rotation = rotation_of(dim, seed)
        tiles = (x @ rotation.T).reshape(heads, -1, tile, dim)
        rows = torch.ones_like(tiles[..., :1])
        columns = torch.ones_like(tiles[..., :1, :])
        for _ in range(rounds):
            for scale, along in ((rows, 3), (columns, 2)):
                left = tiles / (rows * columns)
                scale *= left.square().mean(along, keepdim=True).sqrt().clamp(min=1e-10)
        rows, columns = rows.half().float(), columns.half().float()
        level = tiles / (rows * columns).clamp(min=1e-7)
        found = between(level, bits, 2 if along_tokens else 3) * (rows * columns)
        # The scales of the steps go into those of the same axis.
        groups, others = (dim, tile) if along_tokens else (tile, dim)
        size = tiles.numel() * bits // 8 + heads * tiles.shape[1] * (2 * groups + others) * _HALF
        return found.reshape(x.shape) @ rotation, size

    return quantise


def rotation_of(dim: int, seed: int) -> torch.Tensor:
    """Orthogonal [dim, dim]: Hadamard's after random signs where there is one, else uniform."""
    generator = torch.Generator().manual_seed(seed + 1)
    if dim & (dim - 1):
        return torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (dim,), generator=generator) * 2 - 1
    return matrix * signs / dim**0.5


@dataclass(frozen=True)
class Hugging:
    """transformers' QuantizedCache, as a candidate."""

    name: str
    model: Any
    backend: str
    bits: int
    window: int = 128
    seed: int | None = None

    def again(self, **changes: Any) -> Hugging:
        return replace(self, window=changes.get("residual_window", self.window))

    @contextmanager
    def patched(self) -> Iterator[QuantizedCache]:
        cache = QuantizedCache(
            self.backend, self.model.config, nbits=self.bits, residual_length=self.window
        )
        size = self.model.dtype.itemsize
        cache.memory_report = lambda: _summed([_quantized(layer, size) for layer in cache.layers])
        yield cache


def _quantized(layer: Any, item_size: int) -> dict[str, int]:
    tokens = layer.get_seq_length()
    exact = layer.keys.shape[2] if layer.is_initialized and layer.keys.dim() == 4 else 0
    packed = [layer._quantized_keys, layer._quantized_values]
    size = sum(map(_bytes, packed))
    exact_bytes = layer.keys.nbytes + layer.values.nbytes if exact else 0
    heads, dim = packed[0].shape[1], packed[0].shape[3]
    whole = tokens * heads * dim * 2 * item_size
    return {
        "tokens": tokens,
        "packed_tokens": tokens - exact,
        "packed_bytes": size,
        "total_bytes": size + exact_bytes,
        "uncompressed_bytes": whole,
    }


def _bytes(tensor: Any) -> int:
    """Of all that a quantised tensor consists of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def rivals_of(model: Any) -> dict[str, Any]:
    """By name, as their authors have them."""
    tail = {"window": 128, "sinks": 4}
    found: dict[str, Any] = {
        rival.name: rival
        for rival in (
            Rival("tbq4", model, tbq(4), tbq(4)),
            Rival("kivi2", model, kivi(2, 32, True), kivi(2, 32, False), tile=32, window=128),
            Rival("kvarn42", model, kvarn(4, 128, True), kvarn(2, 128, False), tile=128, **tail),
            Rival("kvarn22", model, kvarn(2, 128, True), kvarn(2, 128, False), tile=128, **tail),
            Rival("e8", model, e8, e8, tile=64, **tail),
        )
    }
    for backend, module in (("quanto", "optimum"), ("hqq", "hqq")):
        if importlib.util.find_spec(module) is not None:
            for bits in (4, 2):
                found[f"{backend}{bits}"] = Hugging(f"{backend}{bits}", model, backend, bits)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--only", nargs="+", metavar="RIVAL", help="these alone")
    parser.add_argument("--setting", nargs="*", default=["k4v4", "k2v2"], help="tqai's, beside")
    parser.add_argument("--window", type=int, help="of all rivals that have tiles of their own")
    parser.add_argument("--sinks", type=int)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--read", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--own", action="store_true", help="read what the model goes on with")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model, tokenizer = load(options.folder, "float32", None)
    known = rivals_of(model)
    chosen = options.only or list(known)
    for name in chosen:
        if name not in known:
            raise SystemExit(f"--only {name}: expected one of {', '.join(known)}")
    rivals = [known[name] for name in chosen]
    for name in ("window", "sinks"):
        if getattr(options, name) is not None:
            changed = {name: getattr(options, name)}
            rivals = [replace(e, **changed) if isinstance(e, Rival) else e for e in rivals]
    with progress_bar("token") as progress:
        results = evaluate(
            model,
            tokenizer,
            settings=[*options.setting, *rivals],
            prefill=options.prefill,
            read=options.read,
            samples=options.samples,
            own=options.own,
            progress=progress,
        )
    if options.json:
        print_json([asdict(result) for result in results])
    else:
        print_comparison(results)


if __name__ == "__main__":
    main()
