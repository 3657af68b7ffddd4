"""``--cache FILE`` of ``tqai run``: a prompt that was read is kept, with what it was.

It is a file of ``tqai.save_cache`` whose header also says which tokens it has read, so that both
are of one moment, whoever writes to the same place.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tqai.transformers.cache.cache import TqaiCache

_READ = "read"
"""What the header calls the tokens."""


def keep(path: Path, cache: TqaiCache, tokens: list[int]) -> None:
    """Writes `cache`, which has read `tokens`, to `path`.

    Raises:
        NotImplementedError: for a cache that cannot be saved.
        OSError: where the file cannot be written.
    """
    from tqai.transformers.files.save_load import write_cache

    write_cache(cache, path, False, {_READ: tokens})


def recall(path: Path, model: PreTrainedModel, tokens: list[int]) -> tuple[TqaiCache, int] | str:
    """A cache that has read the first of `tokens`, and how many; or in words why there is none.

    `model`: patched with the settings that the cache must have. At least one token stays to be
    read.

    Raises:
        ValueError: for a file that is not a kept prompt, and so must not be written over.
    """
    import tqai
    from tqai import container
    from tqai.transformers.files.save_load import read_cache

    try:
        file, header = container.opened(path)
    except FileNotFoundError:
        return f"{path} does not exist yet"
    except ValueError as error:
        raise _not_kept(path, str(error)) from error
    read = header.get(_READ)
    if not isinstance(read, list) or any(type(token) is not int for token in read):
        raise _not_kept(path, "its header names no tokens")
    try:
        cache: Any = read_cache(path, file, header, model, False)
    except ValueError as error:
        return str(error)
    if cache.get_seq_length() != len(read):
        return f"{path} has read {cache.get_seq_length()} tokens, and names {len(read)}"
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


def _not_kept(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"--cache {path}: not a prompt that tqai run has kept ({reason}); name another file, or "
        "remove this one"
    )


def _common(first: list[int], second: list[int]) -> int:
    """Equal tokens at the start of both."""
    for at, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return at
    return min(len(first), len(second))
