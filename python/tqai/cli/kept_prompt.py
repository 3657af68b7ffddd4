"""``--cache FILE`` of ``tqai run``: a prompt that was read is kept, with what it was.

A file of ``tqai.save_cache`` does not say which tokens it has read, so they stand in a file of JSON
beside it, with a digest that ties the two together.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tqai.transformers.cache.cache import TqaiCache


def keep(path: Path, cache: TqaiCache, tokens: list[int]) -> None:
    """Writes `cache`, which has read `tokens`, to `path`, and the tokens beside it.

    Raises:
        NotImplementedError: for a cache that cannot be saved.
        OSError: where a file cannot be written.
    """
    import tqai

    tqai.save_cache(cache, path)
    beside(path).write_text(json.dumps({"sha256": _digest(path), "tokens": tokens}))


def recall(path: Path, model: PreTrainedModel, tokens: list[int]) -> tuple[TqaiCache, int] | str:
    """A cache that has read the first of `tokens`, and how many; or in words why there is none.

    `model`: patched with the settings that the cache must have. At least one token stays to be
    read.

    Raises:
        ValueError: for a file that is not a kept prompt, and so must not be written over.
    """
    import tqai

    if not path.exists():
        return f"{path} does not exist yet"
    try:
        noted = json.loads(beside(path).read_text())
        digest, read = noted["sha256"], list(map(int, noted["tokens"]))
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"--cache {path}: not a prompt that tqai run has kept, as {beside(path).name} is not "
            "beside it; name another file, or remove this one"
        ) from None
    if digest != _digest(path):
        return f"{path} was changed after it was kept"
    try:
        cache: Any = tqai.load_cache(path, model)
    except ValueError as error:
        return str(error)
    here = tqai.new_cache(model).settings
    if replace(cache.settings, backend=here.backend, level=here.level) != here:
        return f"{path} was kept with other settings"
    common = _common(read, tokens[:-1])
    if common == 0:
        return f"{path} holds another text"
    if common < len(read):
        try:
            cache.crop(common)
        except (RuntimeError, NotImplementedError) as error:
            return f"{path} goes on otherwise: {error}"
    return cache, common


def beside(path: Path) -> Path:
    """The file with the tokens of `path`."""
    return path.with_name(f"{path.name}.tokens")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _common(first: list[int], second: list[int]) -> int:
    """Equal tokens at the start of both."""
    for at, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return at
    return min(len(first), len(second))
