"""Fresh processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from typing import Any


def run_fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function`'s result from a process that has done nothing else, so that its memory can be
    told from the rest. Exceptions pass through."""
    with fresh_process() as call:
        return call(function, *arguments)


@contextmanager
def fresh_process() -> Iterator[Callable[..., Any]]:
    """As ``run_fresh``, for several calls of one process, which keeps what they leave in memory."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        max_workers=1, mp_context=context, initializer=_end_with_parent
    ) as pool:
        known = pool.submit(os.getpid)

        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            try:
                process = known.result()
                try:
                    return pool.submit(function, *arguments).result()
                except KeyboardInterrupt:
                    with suppress(OSError):  # it has ended
                        os.kill(process, signal.SIGTERM)  # or the pool waits until it is done
                    raise
            except BrokenProcessPool:
                raise OSError(
                    "the process that ran the model ended early (out of memory?)"
                ) from None

        yield call


def _end_with_parent() -> None:
    """Ends this process when the one that started it has ended. Where that was killed, nobody is
    left to say so, and minutes of computing would go on for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="tqai: waits for the parent", daemon=True).start()
