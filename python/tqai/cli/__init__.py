"""The command line, ``tqai VERB``. Each verb is a module with ``add(verbs)``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import tqai
from tqai.cli import bench, demo, evaluate, info, memory, reproduce, run
from tqai.requirements import MissingPackage, needs_mlx_lm, needs_transformers

MOST_THREADS = 1024
"""As the library allows."""
VERBS = (run, demo, info, evaluate, memory, bench, reproduce)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; 2 and one line on stderr where the user asked for what cannot be."""
    parser = argparse.ArgumentParser(
        prog="tqai", description="Compressed key/value caches for transformers."
    )
    parser.add_argument("--version", action="version", version=f"tqai {tqai.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        verb.add(verbs)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a letter shows its number, rather than nothing of a text.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    options = _parse(parser, arguments)
    if options.threads is not None:
        if not 1 <= options.threads <= MOST_THREADS:
            parser.error(f"--threads {options.threads}: expected 1 to {MOST_THREADS}")
        # Read by the OpenMP runtimes when they are loaded, also in child processes.
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    try:
        if getattr(options, "framework", None) == "mlx":
            needs_mlx_lm()
        elif options.models:
            needs_transformers()
        options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _leave_stdout()
        return 128 + 13  # as where SIGPIPE ends a program
    except (ValueError, NotImplementedError, OSError, MissingPackage) as error:
        message = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"tqai: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _leave_stdout() -> None:
    """What is still to be printed goes nowhere, so that the interpreter does not complain of it."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    options, rest = parser.parse_known_args(arguments)
    # argparse takes all positional arguments where it finds the first of them.
    late = getattr(options, "may_come_late", None)
    if late and getattr(options, late) is None:
        if len(rest) == 2 and rest[0] == "--":
            setattr(options, late, rest[1])
            rest = []
        elif len(rest) == 1 and not rest[0].startswith("-"):
            setattr(options, late, rest.pop())
    if rest:
        named = late is None and hasattr(options, "model") and not rest[0].startswith("-")
        hint = "; a model is named with --model" if named else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return options
