"""What transformers' continuous batching is given in place of its paged cache.

Its scheduler, queues and block tables go on as they are: they say which requests a pass is of, and
when one may join. Keys and values go to ``Requests``; the tensor that they would be written to has
no memory. Needs a transformers whose models hand keys and values to ``cache.update`` themselves.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from itertools import compress
from types import FunctionType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tqai.transformers.attention.functions import SEQUENCES
from tqai.transformers.cache.cache import TqaiCache
from tqai.transformers.serving.capacity import Capacity, LayerBytes
from tqai.transformers.serving.requests import Requests

OLDEST = "5.24"
"""transformers whose interface this is."""

try:
    from transformers.generation.continuous_batching import cache as _cache
    from transformers.generation.continuous_batching import cache_allocators as _allocators
    from transformers.generation.continuous_batching import continuous_api as _continuous_api
    from transformers.generation.continuous_batching import utils as _utils
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    api: Any = _continuous_api
except ImportError:
    _cache = None  # type: ignore[assignment]
    _utils = None  # type: ignore[assignment]
    _allocators = None  # type: ignore[assignment]
    api = None
    PagedAttentionCache = object  # type: ignore[assignment,misc]


def serves_requests() -> bool:
    """Whether the transformers that is installed has this interface."""
    return _allocators is not None


def check_supported() -> None:
    """Raises NotImplementedError, with the version's name, for one that has another interface."""
    if not serves_requests():
        raise NotImplementedError(
            "continuous batching over compressed caches needs transformers "
            f"{OLDEST} or newer; this is {transformers.__version__}, whose paged cache has another "
            "interface: install a newer one, or call tqai.unpatch(model) before generate_batch()"
        )


class PackedPagedCache(PagedAttentionCache):  # type: ignore[misc]
    """A paged cache whose blocks are counted, and whose tokens lie in compressed caches."""

    def __init__(self, make_cache: Callable[[], TqaiCache], **arguments: Any) -> None:
        device = arguments.pop("device")
        config = arguments["config"] = _without_mask(arguments["config"])
        heads, dim = _utils.find_num_key_value_heads(config), _utils.find_head_dim(config)
        self.tqai_capacity = capacity = Capacity(
            LayerBytes(layer, heads, dim, arguments["dtype"].itemsize)
            for layer in make_cache().layers
        )
        planned = []

        class Handler(_cache.PagedAttentionMemoryHandler):  # type: ignore[name-defined]
            """One whose sectors are enough for as many tokens as the same bytes hold packed."""

            def infer_max_batch_tokens_and_num_sectors(self) -> tuple[int, int]:
                tokens, sectors = super().infer_max_batch_tokens_and_num_sectors()
                planned.append(sectors)
                return tokens, sectors * capacity.most

        begin = _in_place(PagedAttentionCache.__init__, PagedAttentionMemoryHandler=Handler)
        begin(self, device=torch.device("meta"), **arguments)
        self.device = device
        capacity.budget = planned[0] * self.bytes_per_sector
        # What transformers writes into its settings, from which another cache may be made.
        self.num_blocks //= capacity.most
        # Blocks of it would be handed to others by what they hold, which is here of no request.
        self.use_prefix_sharing = self.allow_block_sharing = False
        self.tqai_requests = Requests(make_cache)
        self._batch: list[list[int]] | None = None

    def can_store_request_tokens(self, state: Any, request_len: int, dry_run: bool = False) -> bool:
        """Whether what the plain cache's tensor would take has room for a request's new tokens."""
        tokens = state.current_len() + request_len
        fits = self.tqai_capacity.fits(state.request_id, tokens)
        fits = fits and super().can_store_request_tokens(state, request_len, dry_run)
        if not dry_run:
            (self.tqai_capacity.hold if fits else self.tqai_capacity.refuse)(
                state.request_id, tokens
            )
        return fits

    def count_storable_requests(self, list_blocks_needed: list[dict[str, int]]) -> int:
        """How many of the requests that were refused could have their tokens, in that order."""
        blocks = super().count_storable_requests(list_blocks_needed)
        return min(blocks, self.tqai_capacity.count_storable())

    def compute_free_capacity(self, relative: bool = True) -> int | float:
        """What the scheduler keeps a margin of."""
        free = super().compute_free_capacity(relative)
        share = self.tqai_capacity.free_share
        return min(free, share if relative else int(share * self.tqai_capacity.budget))

    def extend_read_and_write_indices(
        self,
        request_id: str,
        past_length: int,
        query_length: int,
        read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:
        """Notes which requests the next pass is of; no index leads anywhere."""
        if write_index is not self._batch:  # a list for each batch
            self._batch = write_index
            self.tqai_requests.begin_batch()
        self.tqai_requests.expect(request_id, past_length, query_length)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds a pass's tokens, and gives attention what each request reads."""
        kwargs[SEQUENCES] = self.tqai_requests.update(key_states, value_states, layer_idx)
        return key_states, value_states

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """Also the request's compressed cache."""
        super().free_blocks(request_id, no_cache)
        self.tqai_requests.free(request_id)
        self.tqai_capacity.free(request_id)

    def free_all_requests(self, clear_ledgers: bool = False) -> None:
        """Also their compressed caches."""
        super().free_all_requests(clear_ledgers)
        self.tqai_requests.free_all()
        self.tqai_capacity.free_all()

    def prepare_fork_request(self, src_state: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Forks share tiles."""
        forked = super().prepare_fork_request(src_state, *args, **kwargs)
        tokens = src_state.current_len()
        self.tqai_requests.fork(src_state.request_id, forked, tokens)
        for name in forked:
            self.tqai_capacity.hold(name, tokens)
        return forked

    def perform_cache_copy(self, copy_src_and_dst: Any) -> None:
        """Nothing: there are no blocks to copy."""


def _without_mask(config: Any) -> Any:
    """A copy that asks for no mask of all tokens by all tokens, as for flash attention: each
    request reads its own cache."""
    config = copy.copy(config)
    config._attn_implementation_internal = "flash_attention_2"
    return config


def _in_place(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """`function` with other meanings for some names of its module."""
    plain = inspect.unwrap(function)
    assert isinstance(plain, FunctionType)
    return FunctionType(
        plain.__code__,
        {**plain.__globals__, **names},
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )


def _check_options(config: Any) -> None:
    """Raises NotImplementedError for what needs the plain paged cache's memory."""
    if config.use_async_batching or any(config.cuda_graph_booleans):
        raise NotImplementedError(
            "continuous batching over compressed caches prepares a pass when the one before is "
            "done, and captures no graph: leave out use_async_batching and use_cuda_graph, or call "
            "tqai.unpatch(model)"
        )
    if config.varlen_compile_config is not None or config.decode_compile_config is not None:
        raise NotImplementedError(
            "continuous batching over compressed caches runs the model as it is; a compiled pass "
            "has tokens that are of no request: leave out varlen_compile_config, "
            "decode_compile_config, default_compile_level and the generation config's "
            "compile_config, or call tqai.unpatch(model)"
        )
    if config.cpu_offload_space:
        raise NotImplementedError(
            "cpu_offload_space moves the plain paged cache's blocks; compressed caches have none: "
            "leave it out, or call tqai.unpatch(model)"
        )


def init_continuous_batching(
    make_cache: Callable[[], TqaiCache], model: PreTrainedModel, *args: Any, **kwargs: Any
) -> Any:
    """transformers' ``init_continuous_batching``, with compressed caches of `make_cache`.

    Raises:
        NotImplementedError: with a transformers before 5.24; for options that need the plain paged
            cache's memory.
    """
    check_supported()

    begin = _in_place(
        api.ContinuousMixin.init_continuous_batching, ContinuousBatchingManager=_Manager
    )
    with torch.no_grad():
        manager = begin(model, *args, **kwargs)
    manager.tqai_make_cache = make_cache
    return manager


if api is not None and _allocators is not None:

    class _Manager(api.ContinuousBatchingManager):
        """One whose batches have a ``PackedPagedCache``. One class: a manager that a model keeps
        is known by it."""

        tqai_make_cache: Callable[[], TqaiCache]

        def switch_to_cb_friendly_attn(self, *args: Any, **kwargs: Any) -> None:
            """tqai's attention is."""

        def _create_batch_processor(self) -> Any:
            config = self.continuous_batching_config
            _check_options(config)
            config.max_blocks_per_request = 0  # block tables are flash attention's
            create = _in_place(
                api.ContinuousBatchingManager._create_batch_processor,
                PagedAttentionCache=partial(PackedPagedCache, self.tqai_make_cache),
                ContinuousBatchProcessor=_Processor,
            )
            return create(self)

    _Manager.__name__ = _Manager.__qualname__ = "ContinuousBatchingManager"

    class _Processor(api.ContinuousBatchProcessor):
        """One that prepares no masks, and ends the requests that a pass failed for."""

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**{**arguments, "config": _without_mask(arguments["config"])})

        def update_batch(self) -> None:
            """Adds the pass's tokens to the requests; those that have failed end with their error,
            and get none."""
            failed = self.cache.tqai_requests.take_failed()
            batch = self.inputs_and_outputs
            if failed:
                update = batch.prepare_batch_update()
                vars(batch)["prepare_batch_update"] = lambda: _without(failed, *update)
            try:
                for state in [future.state for future in batch.requests_in_batch if failed]:
                    if state.request_id in failed:
                        self._end(state, failed[state.request_id])
                super().update_batch()
            finally:
                vars(batch).pop("prepare_batch_update", None)

        def _end(self, state: Any, error: Exception) -> None:
            forks = self.scheduler._requests_to_fork
            forks[:] = [other for other in forks if other is not state]
            answers = state.num_children  # that are waited for, and will not be begun
            state.num_children = 0
            self._handle_request_error(error, state)
            self.scheduler.finish_request(state.request_id)
            for number in range(answers):
                answer = copy.copy(state)
                answer.request_id = f"{state.request_id}__child#{number}"
                self.output_router.fail_and_deliver(answer, error)


def _without(
    failed: Mapping[str, Exception],
    requests: list[Any],
    tokens: list[int],
    logprobs: list[float] | None,
) -> tuple[list[Any], list[int], list[float] | None]:
    """What a pass gave, of the requests that have not failed."""
    goes_on = [request.state.request_id not in failed for request in requests]
    has_token = [request.has_new_token for request in requests]
    of_tokens = list(compress(goes_on, has_token))
    return (
        list(compress(requests, goes_on)),
        list(compress(tokens, of_tokens)),
        None if logprobs is None else list(compress(logprobs, of_tokens)),
    )
