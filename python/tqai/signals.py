"""Errors that have come in from outside: what an application's signal handler raises.

Such a handler, as one that sets a time limit, may run in the midst of anything, and what it raises
may be of any kind (``TimeoutError`` is an ``OSError``). Where errors of others' code are made the
best of, this one is not theirs, and has to go on to who waits for it.
"""

from __future__ import annotations

import functools
import signal
from types import CodeType
from typing import Any


def is_of_a_handler(error: BaseException) -> bool:
    """Whether a signal handler written in Python has raised it."""
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        trace = trace.tb_next
    return False


def _code_of(handler: Any) -> CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    handler = getattr(handler, "__func__", handler)
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = type(handler).__call__
    return getattr(handler, "__code__", None)
