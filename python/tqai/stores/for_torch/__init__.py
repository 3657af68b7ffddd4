"""Stores of torch's tensors: the C++ cache on the CPU, torch operations on other devices."""

from __future__ import annotations

import torch

from tqai import _core
from tqai.settings import Settings
from tqai.shapes.rope import Rope
from tqai.stores.device import Options
from tqai.stores.for_torch.tensor_refs import DTYPES, mask_ref, ref, rows_contiguous
from tqai.stores.for_torch.torch_store import TorchStore

Store = _core.KvCache | TorchStore
"""Both have the same methods; those that take tensors are called by the functions here."""


_CPU = torch.device("cpu")


def make_store(
    settings: Settings,
    rope: Rope | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    dtype: torch.dtype,
    keeps_sinks: bool,
    basis: _core.KeyBasis | None = None,
) -> Store:
    """An empty store for tokens like these, [batch, kv_heads, n, head_dim], held in `dtype`.

    basis: what keys are quantised in; None: the rotation of the settings.

    Raises:
        ValueError: for options out of range, and for another layer's basis.
    """
    batch, kv_heads, _, head_dim = keys.shape
    options = settings.core_options()
    options.update(kv_heads=kv_heads, head_dim=head_dim, value_head_dim=values.shape[3])
    if not keeps_sinks:
        options["sink_tokens"] = 0
    if basis is not None:
        options["key_codes"] = settings.key_codes
    if is_native(settings.backend, keys.device):
        argument = None if rope is None else rope.core_argument()
        return _core.KvCache(
            batch=batch, dtype=DTYPES[dtype], rope=argument, key_basis=basis, **options
        )
    options.pop("level", None)
    options.update(rope=None if rope is None else rope.options(), key_basis=basis)
    return TorchStore(Options(dtype=DTYPES[dtype].name, **options), batch, keys.device)


def is_native(backend: str, device: torch.device) -> bool:
    """Whether tensors on `device` go to the C++ kernels."""
    return backend == "auto" and device.type == "cpu"


def moved(store: Store, settings: Settings, device: torch.device) -> Store:
    """`store` itself, or the same tokens where tensors on `device` can be added to them."""
    bases = [] if store.key_basis is None else [store.key_basis]
    if is_native(settings.backend, device):
        if isinstance(store, TorchStore):
            data = store.serialize()
            return _core.KvCache.deserialize(data, level=settings.level, key_bases=bases)
        return store
    if isinstance(store, TorchStore) and store.device == device:
        return store
    return TorchStore.deserialize(store.serialize(), device, bases)


def append(
    store: Store,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> None:
    """Adds tokens [batch, kv_heads, n, dim], of the store's dtype or one that it can hold.

    positions: [batch or 1, sections or 1, n] int64 on the CPU, what the keys were turned by; None:
    each token is one further than the one before in its row.
    """
    if isinstance(store, TorchStore):
        store.append(keys, values, None if positions is None else positions.numpy())
        return
    keys, values = rows_contiguous(keys), rows_contiguous(values)  # alive till the call is done
    at = None
    if positions is not None:
        at = positions.data_ptr(), positions.shape, positions.stride()
    store.append(ref(keys), ref(values), at)


def attend(
    store: Store,
    queries: torch.Tensor,
    *,
    scale: float | None = None,
    soft_cap: float = 0.0,
    causal: bool = True,
    window: int = 0,
    first_token: int = 0,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of queries [batch, query_heads, n, head_dim]; see ``DeviceStore.attend``."""
    if isinstance(store, TorchStore):
        return store.attend(
            queries,
            scale=scale,
            soft_cap=soft_cap,
            causal=causal,
            window=window,
            first_token=first_token,
            mask=mask,
            sinks=sinks,
        )
    batch, heads, count, _ = queries.shape
    output = queries.new_empty(batch, count, heads, store.value_head_dim)
    if sinks is not None:
        sinks = sinks.float().reshape(-1).contiguous()
    queries = rows_contiguous(queries)
    # By place: pybind11 takes as long to look up eight names as a short cache takes to be read.
    store.attend(
        ref(queries),
        ref(output),
        scale,
        soft_cap,
        causal,
        window,
        first_token,
        None if mask is None else mask_ref(mask),
        0 if sinks is None else sinks.data_ptr(),
    )
    return output


def append_each(cores: list[_core.KvCache], keys: torch.Tensor, values: torch.Tensor) -> None:
    """Adds a token to each of many stores of one row, all of them or none.

    keys, values: [1, kv_heads, len(cores), dim], of the stores' dtype.
    """
    keys, values = rows_contiguous(keys), rows_contiguous(values)
    _core.append_sequences(cores, [1] * len(cores), ref(keys), ref(values))


def attend_each(
    cores: list[_core.KvCache],
    queries: torch.Tensor,
    *,
    scale: float | None,
    soft_cap: float,
    window: int,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the last token's query in each of many stores of one row and one geometry.

    queries: [1, query_heads, len(cores), head_dim]. Returns [1, len(cores), query_heads,
    value_head_dim].
    """
    _, heads, count, _ = queries.shape
    output = queries.new_empty(1, count, heads, cores[0].value_head_dim)
    if sinks is not None:
        sinks = sinks.float().reshape(-1).contiguous()
    queries = rows_contiguous(queries)
    _core.attend_sequences(
        cores,
        [1] * count,
        ref(queries),
        ref(output),
        scale,
        soft_cap,
        True,
        window,
        0 if sinks is None else sinks.data_ptr(),
    )
    return output


def gather(
    store: Store, first: int, length: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of tokens first…first + length − 1; see ``DeviceStore.gather``."""
    if isinstance(store, TorchStore):
        return store.gather(first, length, dtypes)
    shape = store.batch, store.kv_heads, length
    keys, values = (
        torch.empty(*shape, dim, dtype=dtype, device="cpu")
        for dim, dtype in zip((store.head_dim, store.value_head_dim), dtypes, strict=True)
    )
    store.gather(first, ref(keys), ref(values))
    return keys, values


def snapshot(store: Store) -> Store:
    """What `store` holds now, to go back to: of the two only one may be changed from now on."""
    return store.snapshot() if isinstance(store, TorchStore) else store.copy()


def device_of(store: Store) -> torch.device:
    """Where the store's tensors are."""
    return store.device if isinstance(store, TorchStore) else _CPU
