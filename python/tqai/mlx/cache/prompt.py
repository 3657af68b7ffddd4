"""The prompt cache of a patched model: a list with one cache a layer, as mlx-lm has it."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, RotatingKVCache

from tqai import reports
from tqai.mlx.cache.layer import TqaiKVCache
from tqai.mlx.model.geometry import Geometry
from tqai.mlx.model.probe import parts_of, together
from tqai.settings import Settings


class TqaiPromptCache(list[Any]):
    """One cache a layer: compressed ones, and the model's own where it is left alone.

    To be passed to mlx-lm as ``prompt_cache``, or to the model as ``cache``.
    """

    def __init__(self, geometry: Geometry, settings: Settings) -> None:
        count = len(geometry.templates)
        skipped = settings.skipped(count)
        self.model = geometry.model
        self.settings = settings
        mixed = any(
            isinstance(part, RotatingKVCache)
            for index in skipped
            for part in parts_of(geometry.templates[index])
        )
        super().__init__()
        for index, (template, shapes) in enumerate(
            zip(geometry.templates, geometry.shapes, strict=True)
        ):
            parts = parts_of(copy.deepcopy(template))
            for at, shape in enumerate(() if index in skipped else shapes):
                if shape is None:
                    continue
                if mixed and shape.max_size is not None:
                    shape = replace(shape, has_exact_siblings=True)
                own = settings.of_layer(index, count)
                parts[at] = TqaiKVCache(shape, own.of_latents() if shape.is_latent else own)
            self.append(together(template, parts))

    def memory_report(self) -> dict[str, Any]:
        """What the cache holds, as its allocators handed it out.

        ``packed_bytes`` (codes and norms), ``exact_bytes`` (sinks, windows, tokens that wait to be
        sealed, uncompressed layers), ``overhead_bytes`` (headers, lists, centres) and their sum
        ``total_bytes``, and ``uncompressed_bytes``, that the same tokens would take, are sums over
        the layers. ``tokens`` and ``packed_tokens`` are those of the layer that holds most, over
        all rows. ``layers`` has the same numbers layer by layer, ``centering`` counts the heads by
        what their keys are centred on, ``rotary`` the compressed layers by the layout of their
        rotary embedding, "unrecognised" where keys get no rotary centre, ``dequantised`` lists the
        layers that are not read packed, ``settings`` has the arguments of ``patch``. Tiles that
        caches share count in each of them.
        """
        report = reports.over_layers(map(_memory, self))
        parts = [part for layer in self for part in parts_of(layer)]
        ours = [part for part in parts if isinstance(part, TqaiKVCache)]
        stores = [layer.core for layer in ours if layer.core is not None]
        report["centering"] = dict(sum(map(reports.centerings_of, stores), Counter()))
        report["rotary"] = dict(
            Counter(
                "unrecognised" if layer.shape.rope is None else layer.shape.rope.layout
                for layer in ours
            )
        )
        report["dequantised"] = sorted({each.index for each in ours if not each.shape.is_packed})
        report["settings"] = asdict(self.settings)
        return report

    def __repr__(self) -> str:
        report = self.memory_report()
        return (
            f"TqaiPromptCache({self.model}, {len(self)} layers: {report['tokens']} tokens in "
            f"{report['total_bytes']} bytes, uncompressed {report['uncompressed_bytes']})"
        )


def _memory(layer: Any) -> dict[str, int]:
    """One layer's numbers; those of mlx-lm's own caches count as exact."""
    if isinstance(layer, TqaiKVCache):
        return layer.memory()
    if isinstance(layer, CacheList):
        parts = list(map(_memory, layer.caches))
        return {name: sum(part[name] for part in parts) for name in reports.COUNTS}
    numbers = dict.fromkeys(reports.COUNTS, 0)
    arrays = [array for _, array in tree_flatten(layer.state) if hasattr(array, "nbytes")]
    numbers["tokens"] = layer.size()
    for name in ("exact_bytes", "total_bytes", "uncompressed_bytes"):
        numbers[name] = sum(array.nbytes for array in arrays)
    return numbers
