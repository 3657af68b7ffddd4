"""What LMCache's serde needs to know of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqai.transformers.model.geometry import geometry_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """The serde's configuration for `model`, for JSON: its heads, rotary embedding and weights.

    Bits, and what else there is to choose, are added to it. ``model`` in it tells the weights from
    others: every server and client of a store must have the same.

    Raises:
        ValueError: for a model whose layers have not all heads of one dimension.
    """
    geometry = geometry_of(model, afresh=True)
    dims = {None if heads is None else heads.dim for heads in geometry.heads}
    if len(dims) != 1 or None in dims:
        raise ValueError(
            f"{geometry.describe()}: a chunk of LMCache's has heads of one dimension in all "
            f"layers; this model's are {sorted(map(str, dims))}"
        )
    described: dict[str, Any] = {"type": "tqai", "head_dim": dims.pop()}
    described["model"] = geometry.identity
    ropes = set(geometry.ropes)
    rope = ropes.pop() if len(ropes) == 1 else None
    if rope is not None and not rope.sections and not rope.changes:
        described["rope"] = {"inv_freq": list(rope.inv_freq), "layout": rope.layout}
    return described
