"""The compressed cache of one attention layer, as transformers' caches want their layers."""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType
from weakref import ref as weak_ref

import torch
from transformers.cache_utils import CacheLayerMixin

from tqai import _core
from tqai.remarks import remark_on_long_vector
from tqai.settings import Settings
from tqai.shapes.heads import Heads, Latents, check_head_dim
from tqai.shapes.rope import Rope
from tqai.stores import for_torch as stores
from tqai.stores.device import TILE_TOKENS
from tqai.stores.for_torch import Store
from tqai.stores.for_torch.tensor_refs import DTYPES
from tqai.transformers.attention import compiled
from tqai.transformers.attention.padding import shown
from tqai.transformers.attention.view import Owner, TqaiView, Update, view_of
from tqai.transformers.model.positions import Turned


class TqaiLayer(CacheLayerMixin):
    """Keys and values of one layer, compressed as they leave the residual window.

    ``update`` returns views without storage (``tqai.view``) that stand for the tokens that
    transformers' own dynamic layers would return, in the same shape. The store behind them is made
    at the first update, from the shapes, the dtype and the device met there.

    Not thread-safe. A method that raises leaves the layer as it was.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    owner: ReferenceType[Owner] | None = None
    """The cache that the layer belongs to, to undo a forward pass that fails."""
    _reading: ReferenceType[Update] | None = None
    """What ``keys`` and ``values`` last handed out, while somebody has it."""

    def __init__(
        self,
        index: int,
        settings: Settings,
        sliding_window: int | None = None,
        heads: Heads | None = None,
        rope: Rope | None = None,
        latents: Latents = frozenset(),
        basis: _core.KeyBasis | None = None,
    ) -> None:
        """`heads` is what the model's configuration says, checked at each update; None: unknown.

        `rope` is what the keys have gone through; None: unknown, or nothing. `latents` says which
        tensors would not be keys and values. `basis` is what keys are quantised in; None: the
        settings' rotation.

        Raises:
            ValueError: for centering="rope" without one.
        """
        if settings.centering == "rope" and rope is None:
            raise ValueError(
                f"layer {index}: centering='rope' needs a rotary embedding that tqai recognises; "
                "the model has none there: use centering='auto'"
            )
        # CacheLayerMixin.__init__ would assign `keys` and `values`, which are computed here.
        self.index = index
        self.settings = settings
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.heads = heads
        self.rope = rope
        self.latents = latents
        self.basis = basis
        self.record_past = False
        self.exact_arithmetic = False
        """Whether attention reads the codes dequantised, with torch's arithmetic; see
        ``TqaiCache.use_exact_arithmetic``."""
        self.core: Store | None = None
        self.dtypes: tuple[torch.dtype, torch.dtype] | None = None
        """Of the keys and of the values; under autocast they differ."""
        self.version = 0
        """Counts changes, so that a view can tell whether it is out of date."""
        self.padding: list[int] = []
        """Tokens at the start of each row that are padding."""
        self._added: tuple[Any, ...] | None = None
        """Shapes, dtypes and devices of the last tokens: others like them need no check."""
        self._seals_later = False
        self._warned = False
        self.turned: Turned | None = None
        """What the next update's keys are turned by, where that is known."""
        self.told: Turned | None = None
        """What the last update's pass was told of padding, until attention is done."""
        self.has_gaps = False
        """Whether padding between other tokens may have been dropped."""
        self.seen = 0
        """Tokens that the store holds, for tracing, which cannot ask it; see ``compiled``."""
        self.has_packed = False
        """Whether any token was held as codes when attention was last done, for tracing."""

    # What transformers asks of a layer.

    @property
    def is_initialized(self) -> bool:
        return self.core is not None

    @property
    def batch_size(self) -> int:
        # transformers asks with hasattr: a layer without rows must not have the attribute.
        if self.core is None:
            raise AttributeError("batch_size: the layer is empty")
        return self.core.batch

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys, [batch, kv_heads, tokens, head_dim]; None before the first update.

        A view, dequantised when it is read: some models update a layer once, as with an image that
        all later tokens look at, and pass its keys on to attention from then on. What is read keeps
        its tokens when the layer changes.
        """
        return self._visible(0)

    @property
    def values(self) -> torch.Tensor | None:
        """Values, [batch, kv_heads, tokens, value_head_dim]; see ``keys``."""
        return self._visible(1)

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._refuse_assignment("keys")

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._refuse_assignment("values")

    def _refuse_assignment(self, name: str) -> None:
        raise NotImplementedError(
            f"layer {self.index}: the {name} of a compressed layer cannot be assigned, its tokens "
            "are packed: crop() and batch_select_indices() of the cache take tokens and rows away; "
            f"a layer whose {name} are to be pruned or edited stays plain with "
            f"skip_layers=[{self.index}]"
        )

    def lazy_initialization(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None
    ) -> None:
        """Nothing: ``update`` sets the layer up, from the keys and the values that it gets."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens and returns views of the keys and values that their queries may see.

        Args:
            key_states: [batch, kv_heads, n, head_dim], float32, float16 or bfloat16. On the CPU
                they go to the C++ kernels, elsewhere to torch operations (``tqai.stores``).
            value_states: [batch, kv_heads, n, value_head_dim].

        Raises:
            ValueError: for a shape or dtype that does not fit the layer, NaN, or infinity.
            NotImplementedError: for a head_dim outside 8…576, or tensors without numbers.
        """
        keys, values = _plain(key_states), _plain(value_states)
        shapes, dtypes = (keys.shape, values.shape), (keys.dtype, values.dtype)
        like = shapes, dtypes, keys.device, values.device, self.settings
        core = self.core
        held = 0 if core is None else core.tokens
        self._keep_reading()
        another = core is None or like != self._added
        if another:
            self._check(keys, values)
        try:
            if core is None or another:
                core = self._store_for(keys, values)
            positions = self._take_positions(keys)
            stores.append(core, *_of_one_dtype(keys, values), positions)
        except (ValueError, NotImplementedError) as error:
            raise self._named(error) from error
        queries = keys.shape[2]
        if self.core is None:
            self.dtypes = keys.dtype, values.dtype
            self.padding = [0] * keys.shape[0]
        self.core, self._added = core, like
        self.seen = held + queries
        self.version += 1
        self._seals_later = held > 0 and not self.seals_at_once(queries)
        first = 0
        if self.is_sliding:
            first = self._first_visible(held)
            if held > 0 and not self.record_past:
                core.discard_before(first)
        fresh = None
        if held == 0:
            # Contiguous, as the plain cache would hold them, so that results are equal bit for bit.
            fresh = keys.contiguous(), values.contiguous()
        update = Update(self, first, held - first + queries, queries, fresh)
        update.positions = positions
        update.cache = None if self.owner is None else self.owner()
        return update.views(keys, values)

    def takes_like(self, like: tuple[Any, ...]) -> bool:
        """Whether ``update_each`` can add a token of these shapes, dtypes and devices."""
        core = self.core
        return (
            type(core) is _core.KvCache
            and (*like, self.settings) == self._added
            and core.tokens > 0
        )

    def get_seq_length(self) -> int:
        if compiled.is_tracing():
            return self.seen
        return 0 if self.core is None else self.core.tokens

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and first token of the keys that `query_length` new queries see together."""
        if isinstance(query_length, torch.Tensor):  # transformers 4 passes the cache positions
            query_length = query_length.shape[0]
        tokens = self.get_seq_length()
        first = self._first_visible(tokens)
        return tokens - first + query_length, first

    def get_max_length(self) -> int:
        return -1 if self.sliding_window is None else self.sliding_window

    get_max_cache_shape = get_max_length

    def activate_past_recording(self) -> None:
        """Keeps tokens that fell out of a sliding window until the next ``crop``."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens; a positive number is a length to keep.

        Raises:
            RuntimeError: when a sliding layer no longer has the tokens to go back to.
        """
        if self.core is None:
            return
        tokens = self.core.tokens
        count = int(tokens_to_remove)
        target = min(count, tokens) if count > 0 else max(tokens + count, 0)
        if self.is_sliding and target < tokens and self._first_visible(target) < self._first_held():
            raise RuntimeError(
                f"layer {self.index} cannot go back from {tokens} tokens to {target}: its window "
                f"of {self.sliding_window} tokens has moved on; call activate_past_recording() "
                "before the tokens that are to be cropped are added"
            )
        self.truncate(target)
        if self.core is not None and self.is_sliding:
            self.core.discard_before(self._first_visible(target))

    def reset(self) -> None:
        self._keep_reading()
        self.core = self.dtypes = None
        self.take_note()
        self.padding = []
        self.version += 1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.core is not None:
            self._select([row for row in range(self.core.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.core is not None:
            rows = torch.arange(self.core.batch, device="cpu")[indices.cpu()]
            self._select(rows.reshape(-1).tolist())

    def offload(self) -> None:
        """Nothing: transformers does that to caches of its own."""

    def prefetch(self) -> None:
        """Nothing, as ``offload``."""

    # What attention asks of it.

    def is_packed(self) -> bool:
        """Whether any token of any row is held as codes."""
        core = self.core
        return core is not None and any(map(core.packed_tokens, range(core.batch)))

    def gather(self, first: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantised keys and values of tokens first…first + length − 1 in the layer's dtypes.

        Shapes [batch, kv_heads, length, head_dim] and [batch, kv_heads, length, value_head_dim].
        Padding and discarded tokens are zeros; tokens that are still exact come out as they went
        in.
        """
        assert self.core is not None and self.dtypes is not None
        return stores.gather(self.core, first, length, self.dtypes)

    def mark_hidden(self, hidden: torch.Tensor) -> None:
        """Drops padding, so that it takes up neither sinks, window nor bytes.

        hidden: [batch, n] bool on the CPU, which of the last n tokens no query has seen. At the
        start of a row that alone makes them padding. Further on it may be a sparse mask's doing,
        and they are dropped where the decoder was told that they are padding too.
        """
        core = self.core
        assert core is not None
        start = core.tokens - hidden.shape[1]
        leading = (hidden.long().cumprod(1).sum(1)).tolist()
        counts = [
            start + more if had == start else had
            for had, more in zip(self.padding, leading, strict=True)
        ]
        if counts != self.padding and self._first_visible(start) == 0:
            self._keep_reading()
            try:
                core.set_padding(counts)
            except (ValueError, NotImplementedError) as error:
                raise self._named(error) from error
            self.padding = counts
        told = self.told and self.told.told_padding(core.batch, start, core.tokens)
        if told is None:
            return
        inner = hidden & told
        for row, count in enumerate(self.padding):
            inner[row, : max(count - start, 0)] = False
        if inner.any():
            self._keep_reading()
            core.leave_out(inner.flatten().tolist())
            self.has_gaps = True

    @property
    def has_dropped(self) -> bool:
        """Whether tokens of some row were dropped as padding."""
        return self.has_gaps or any(self.padding)

    def check_dropped(self, mask: torch.Tensor | None, first: int) -> None:
        """Looks whether tokens that were dropped as padding still are.

        mask: [batch or 1, heads or 1, n, tokens − first], bool or additive, or None.

        Raises:
            ValueError: where `mask` shows one.
        """
        assert self.core is not None
        # What was told of the start of rows says it for all layers.
        told = any(self.padding) and self.told is not None and self.told.hides(self.padding)
        for row in range(self.core.batch):
            gaps = self.core.left_out(row) if self.has_gaps else []
            for start, count in gaps if told else [(0, self.padding[row]), *gaps]:
                if count == 0 or start + count <= first:
                    continue
                if mask is None or shown(mask, row, start - first, count):
                    raise ValueError(
                        f"layer {self.index}: tokens {start}…{start + count - 1} of row {row} were "
                        "padding in the pass that brought them and are not held; the mask of this "
                        "pass shows them: give it an attention_mask that is 0 there, or make a "
                        "cache with tqai.new_cache(model) and read the text again"
                    )

    def seals_at_once(self, tokens: int) -> bool:
        """Whether what so many more tokens push out of the window is sealed after attention.

        Else it stays exact until the forward pass ends, and if it never does; for many tokens that
        would take too much memory in all layers together.
        """
        return tokens > TILE_TOKENS or (tokens > 1 and not self.settings.exact_prefill)

    def settle(self, was_empty: bool) -> None:
        """Called when attention over an update is done: seals what has left the residual window,
        if that is not to wait for the end of the forward pass."""
        if was_empty and self.is_sliding and not self.record_past:
            assert self.core is not None
            self._keep_reading()
            self.core.discard_before(self._first_visible(self.core.tokens))
        self.told = None
        if not self._seals_later:
            self.seal()

    def seal(self) -> None:
        """Compresses what has left the residual window.

        Warns, once, where it cannot because of a vector that is too long for its FP16 norm.
        """
        if self.core is None:
            return
        self._keep_reading()
        try:
            waiting = self.core.seal()
        except (ValueError, NotImplementedError) as error:
            raise self._named(error) from error
        self.has_packed = self.has_packed or self.is_packed()
        if waiting > 0 and not self._warned:
            self._warned = True
            remark_on_long_vector(self.index, self.settings.sink_tokens)

    def put_back(self, store: Store, padding: list[int]) -> None:
        """Makes the layer hold what `store` does."""
        self._keep_reading()
        self.version += 1
        self.core = store
        self.padding = padding
        self.take_note()

    def truncate(self, tokens: int) -> None:
        """Forgets all tokens from `tokens` on."""
        if self.core is None or tokens >= self.core.tokens:
            return
        self._keep_reading()
        self.version += 1
        if tokens == 0:
            self.reset()
            return
        self.core.crop(tokens)
        self.take_note()
        self.padding = [min(count, tokens) for count in self.padding]

    def take_note(self) -> None:
        """Called when the store is another, or holds other tokens than ``update`` has added."""
        self.seen = 0 if self.core is None else self.core.tokens
        self.has_packed = self.is_packed()
        self._added = None

    def view(self, like: torch.Tensor, which: int, first: int, length: int) -> TqaiView:
        """A view of keys (0) or values (1), made when a traced graph is run as it is."""
        return view_of(Update(self, first, length, 0, None), which, like)

    def _first_visible(self, tokens: int) -> int:
        """First token that a query after `tokens` tokens sees."""
        return max(tokens - self.sliding_window + 1, 0) if self.sliding_window is not None else 0

    def _first_held(self) -> int:
        """First token that is not gone from a row where it is more than padding."""
        assert self.core is not None
        first = self.core.first_token
        return 0 if first <= min(self.padding, default=0) else first

    def _visible(self, which: int) -> torch.Tensor | None:
        """A view, so that attention can find the layer when a model passes it on."""
        if self.core is None or self.dtypes is None:
            return None
        update = self._reading() if self._reading is not None else None
        if update is None or not update.is_current():
            update = self._read()
            self._reading = weak_ref(update)  # the layer must not keep what keeps the layer
        dim = (self.core.head_dim, self.core.value_head_dim)[which]
        return view_of(update, which, self._like(dim, self.dtypes[which]))

    def _read(self) -> Update:
        """Stands for all tokens that a next query would see."""
        assert self.core is not None
        first = self._first_visible(self.core.tokens)
        update = Update(self, first, self.core.tokens - first, 0, None)
        update.settled = True
        update.cache = None if self.owner is None else self.owner()
        return update

    def _like(self, dim: int, dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor with the layer's rows and heads, where its store is."""
        assert self.core is not None
        rows, heads = self.core.batch, self.core.kv_heads
        device = stores.device_of(self.core)
        return torch.empty(rows, heads, 0, dim, dtype=dtype, device=device)

    def _keep_reading(self) -> None:
        """Called before the layer changes: dequantises what somebody has read of it and holds."""
        update = self._reading() if self._reading is not None else None
        if update is not None and update.fresh is None and update.is_current():
            update.fresh = self.gather(update.first, update.length)
        self._reading = None

    def __getstate__(self) -> dict[str, Any]:
        """References to what is around the layer are the new owner's to make."""
        state = dict(vars(self))
        state.pop("owner", None)
        state.pop("_reading", None)
        if self.core is not None and self.basis is self.core.key_basis:
            del state["basis"]  # the store has it, and would have another one in another process
        return {**state, "turned": None, "told": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "basis" not in state:
            self.basis = None if self.core is None else self.core.key_basis

    def _select(self, rows: list[int]) -> None:
        if self.core is None:
            return
        self._keep_reading()
        self.core.select(rows)
        self.take_note()
        self.padding = [self.padding[row] for row in rows]
        self.version += 1

    def _store_for(self, keys: torch.Tensor, values: torch.Tensor) -> Store:
        """The layer's store, where these tensors can be added; a new one if there is none."""
        if self.core is not None:
            return stores.moved(self.core, self.settings, keys.device)
        if self.rope is not None and self.turned is not None:
            self.rope = self.turned.rope(self.rope)
        # A sink that has left a sliding window is never seen again.
        settings = self.settings
        if keys.shape[1] == 1 and (keys.shape[3], values.shape[3]) in self.latents:
            settings = settings.of_latents()
        dtype = torch.promote_types(keys.dtype, values.dtype)
        return stores.make_store(
            settings, self.rope, keys, values, dtype, not self.is_sliding, self.basis
        )

    def _take_positions(self, keys: torch.Tensor) -> torch.Tensor | None:
        """What the new keys were turned by; see ``Turned.of``."""
        turned, self.turned = self.turned, None
        self.told = turned
        if turned is None or self.rope is None:
            return None
        return turned.of(self.index, self.rope.section_count, keys.shape[0], keys.shape[2])

    def _check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for name, tensor in (("keys", keys), ("values", values)):
            if tensor.device.type == "meta":
                raise NotImplementedError(
                    f"layer {self.index}: {name} on the device 'meta', which holds no numbers: "
                    "load the model's weights first"
                )
            if tensor.ndim != 4:
                raise ValueError(
                    f"layer {self.index}: {name} of shape {tuple(tensor.shape)}; expected "
                    "[batch, kv_heads, tokens, head_dim]"
                )
            if tensor.dtype not in DTYPES:
                raise ValueError(
                    f"layer {self.index}: {name} of {tensor.dtype}; expected float32, float16 or "
                    "bfloat16: model.to(torch.float32) first"
                )
            check_head_dim(self.index, name, tensor.shape[3])
        if keys.device != values.device:
            raise ValueError(
                f"layer {self.index}: keys on {keys.device} do not go with values on "
                f"{values.device}"
            )
        if keys.shape[:3] != values.shape[:3]:
            raise ValueError(
                f"layer {self.index}: keys of shape {tuple(keys.shape)} do not go with values of "
                f"shape {tuple(values.shape)}"
            )
        if self.core is not None and keys.shape[0] != self.core.batch:
            raise ValueError(
                f"layer {self.index}: keys of {keys.shape[0]} rows; the cache holds "
                f"{self.core.batch}, and goes on with these only: make another with "
                "tqai.new_cache(model), or give it the new rows first with "
                "batch_repeat_interleave() or batch_select_indices()"
            )
        if self.dtypes not in (None, (keys.dtype, values.dtype)):
            raise ValueError(
                f"layer {self.index}: keys of {keys.dtype} and values of {values.dtype}; the cache "
                f"holds {self.dtypes[0]} and {self.dtypes[1]}: make another with "
                "tqai.new_cache(model) after the model's dtype has changed"
            )
        given = Heads(keys.shape[1], keys.shape[3])
        if self.heads is not None and given != self.heads:
            raise ValueError(
                f"layer {self.index}: keys with {given.count} heads of {given.dim}; the cache was "
                f"made for a model with {self.heads.count} of {self.heads.dim}. A cache goes with "
                "one model: make another with tqai.new_cache(model)"
            )

    def _named(self, error: ValueError | NotImplementedError) -> Exception:
        """What the store complains about, with the layer's number."""
        return type(error)(f"layer {self.index}: {error}")


def like_one(keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
    """What ``takes_like`` takes, for one token of keys and values [1, kv_heads, n, dim]."""
    shapes = tuple(torch.Size((1, each.shape[1], 1, each.shape[3])) for each in (keys, values))
    return shapes, (keys.dtype, values.dtype), keys.device, values.device


def update_each(layers: list[TqaiLayer], keys: torch.Tensor, values: torch.Tensor) -> list[Update]:
    """``TqaiLayer.update`` of many layers of one row, by a token each, in one call of the kernels.

    Each of them takes tokens like these (``takes_like``). All of them get theirs, or none.

    Args:
        keys: [1, kv_heads, len(layers), head_dim].
        values: [1, kv_heads, len(layers), value_head_dim].

    Raises:
        ValueError: for NaN or infinity.
    """
    cores = []
    for layer in layers:
        layer._keep_reading()
        assert isinstance(layer.core, _core.KvCache)
        cores.append(layer.core)
    try:
        stores.append_each(cores, *_of_one_dtype(keys, values))
    except (ValueError, NotImplementedError) as error:
        raise layers[0]._named(error) from error
    updates = []
    for layer, core in zip(layers, cores, strict=True):
        layer.turned = layer.told = None
        held = layer.seen = core.tokens
        layer.version += 1
        layer._seals_later = True
        first = 0
        if layer.is_sliding:
            first = layer._first_visible(held - 1)
            if not layer.record_past:
                core.discard_before(first)
        update = Update(layer, first, held - first, 1, None)
        update.cache = None if layer.owner is None else layer.owner()
        updates.append(update)
    return updates


def seal_each(layers: list[TqaiLayer]) -> None:
    """Seals in one call of the kernels what the layers' ``seal`` finds done then."""
    cores = []
    for layer in layers:
        if type(layer.core) is _core.KvCache:
            layer._keep_reading()
            cores.append(layer.core)
    _core.seal_sequences(cores)


def _of_one_dtype(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if keys.dtype is values.dtype:
        return keys, values
    dtype = torch.promote_types(keys.dtype, values.dtype)
    return keys.to(dtype), values.to(dtype)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with storage, where it is a view of another layer."""
    return tensor.dense() if isinstance(tensor, TqaiView) else tensor
