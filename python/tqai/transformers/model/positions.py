"""What a pass turns its keys by: the positions that the model hands to its rotary embedding.

Positions are not always 0, 1, 2 …: an image's tokens stand on a grid (M-RoPE), padding between the
turns of a conversation takes no position, and a caller may pass any. A hook on the decoder's rotary
modules sees them as they are used; where there is no such call, the decoder's own argument says
them. Where neither does, each token stands one further than the one before.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from tqai.shapes.rope import Rope
from tqai.stores.device.positions import MAX_POSITION

ARGUMENT = "position_ids"
"""What decoders and rotary modules call them."""
MASK = "attention_mask"
"""What decoders call what tells them of padding, [batch, tokens], or the mask made of it."""


class Turned:
    """What the keys of one forward pass are turned by."""

    def __init__(self, given: Any, mask: Any = None) -> None:
        """`given` and `mask`: the decoder's arguments, if it got some."""
        self._given = given if is_positions(given) else None
        self._mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        self._calls: list[tuple[torch.nn.Module, torch.Tensor]] = []
        self._made: dict[Any, torch.Tensor | None] = {}
        self._found: dict[tuple[int, int, int, int], torch.Tensor | None] = {}
        self._read: set[int] = set()
        self._hidden: dict[tuple[int, ...], bool] = {}

    def saw(self, module: torch.nn.Module, positions: torch.Tensor) -> None:
        """A rotary module is called with these."""
        self._calls.append((module, positions))

    def of(self, layer: int, sections: int, batch: int, tokens: int) -> torch.Tensor | None:
        """Of the tokens that `layer` gets, [batch or 1, sections or 1, tokens] int64 on the CPU.

        None where nothing fits. Once a layer: what it gets later is another pass's, that no hook
        has seen.
        """
        if layer in self._read:
            return None
        self._read.add(layer)
        asked = len(self._calls), sections, batch, tokens
        if asked not in self._found:
            self._found[asked] = self._find(sections, batch, tokens)
        return self._found[asked]

    def told_padding(self, batch: int, first: int, end: int) -> torch.Tensor | None:
        """Which of tokens first…end − 1 are padding, as the decoder was told.

        [batch, end − first] bool; None where it was told nothing.
        """
        mask = self._mask
        if mask is None or mask.shape[0] != batch or mask.shape[1] < end:
            return None
        return mask[:, first:end].cpu() == 0

    def hides(self, padding: Sequence[int]) -> bool:
        """Whether the decoder was told that the first so many tokens of each row are padding."""
        known = tuple(padding)
        if known not in self._hidden:
            told = self.told_padding(len(known), 0, max(known))
            self._hidden[known] = told is not None and all(
                bool(row[:count].all()) for row, count in zip(told, known, strict=True)
            )
        return self._hidden[known]

    def _find(self, sections: int, batch: int, tokens: int) -> torch.Tensor | None:
        """The last that the model's rotary modules were called with, where they fit."""
        seen = [positions for _, positions in reversed(self._calls)]
        for positions in seen if self._given is None else [*seen, self._given]:
            key = id(positions), sections, batch, tokens
            if key not in self._made:
                self._made[key] = _fitted(positions, sections, batch, tokens)
            if self._made[key] is not None:
                return self._made[key]
        return None

    def rope(self, known: Rope) -> Rope:
        """`known` with the frequencies of now, where they depend on the length of the text or were
        changed since they were tried out."""
        now = {
            tuple(buffer.float().tolist())
            for module, _ in self._calls
            for buffer in frequencies(module, recurse=False)
            if len(buffer) == len(known.inv_freq)
        }
        if known.inv_freq in now or len(now) != 1:
            return known
        return replace(known, inv_freq=next(iter(now)))


class TurnWatch:
    """Forward pre-hook of a decoder's rotary modules; each thread has a pass of its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    def begin(self, given: Any, mask: Any = None) -> Turned | None:
        """A pass begins, whose decoder got `given` as its positions and `mask` as its mask."""
        if torch.compiler.is_compiling():  # what a graph has read is known when all of it has run
            return None
        self._local.turned = Turned(given, mask)
        return self._local.turned

    def install(self, decoder: torch.nn.Module) -> None:
        for module in rotary_modules(decoder):
            module.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self, decoder: torch.nn.Module) -> None:
        for module in decoder.modules():
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if torch.compiler.is_compiling():
            return
        turned = getattr(self._local, "turned", None)
        positions = positions_among(args, kwargs)
        if turned is not None and positions is not None:
            turned.saw(module, positions)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._local = threading.local()


def rotary_modules(decoder: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The modules of the decoder that have frequencies."""
    for module in decoder.modules():
        if next(frequencies(module, recurse=False), None) is not None:
            yield module


def frequencies(module: torch.nn.Module, recurse: bool = True) -> Iterator[torch.Tensor]:
    """The ``inv_freq`` buffers of rotary modules, as they are now."""
    for name, buffer in module.named_buffers(recurse=recurse):
        last = name.rpartition(".")[2]
        if last.endswith("inv_freq") and "original" not in last and buffer.ndim == 1:
            yield buffer


def positions_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The positions among a rotary module's arguments."""
    if is_positions(kwargs.get(ARGUMENT)):
        return kwargs[ARGUMENT]
    return next((value for value in args if is_positions(value)), None)


def is_positions(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.ndim in (1, 2, 3)
        and value.dtype in (torch.int64, torch.int32)
        and value.device.type != "meta"
    )


def _fitted(positions: torch.Tensor, sections: int, batch: int, tokens: int) -> torch.Tensor | None:
    """As ``Turned.of`` gives them; None where they are not for so many tokens."""
    if positions.shape[-1] != tokens:
        return None
    if positions.ndim < 3:
        positions = positions.reshape(1, -1, tokens)
    if positions.shape[1] not in (1, batch):
        return None
    positions = positions.detach().to("cpu", torch.int64)
    if len(positions) == sections + 1 and sections > 1:
        positions = positions[1:]  # the first is that of the text, which masks are made from
    if len(positions) not in (1, sections):
        if not (positions == positions[:1]).all():
            return None
        positions = positions[:1]
    if tokens == 0 or not -MAX_POSITION <= int(positions.min()) <= int(positions.max()) <= (
        MAX_POSITION
    ):
        return None
    return positions.transpose(0, 1)
