"""Puts functions of tqai's in the place of mlx-lm's, wherever a module holds these by name.

Most of mlx-lm's models import its attention function by name; modules that are imported later find
ours where they look for it. All modules of the process are searched, also those of models that are
not mlx-lm's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from types import ModuleType
from typing import Any

_lock = RLock()


def put(function: Callable[..., Any], instead_of: Callable[..., Any]) -> None:
    """Makes every module that holds `instead_of` hold `function`. May be called again."""
    with _lock:
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] == "tqai" or not isinstance(module, ModuleType):
                continue
            names = object.__getattribute__(module, "__dict__")  # which loads no lazy module
            for name, value in list(names.items()):
                if value is instead_of:
                    names[name] = function


@contextmanager
def standing_in(function: Callable[..., Any], instead_of: Callable[..., Any]) -> Iterator[None]:
    """`function` in the place of `instead_of`, inside alone."""
    put(function, instead_of)
    try:
        yield
    finally:
        put(instead_of, function)
