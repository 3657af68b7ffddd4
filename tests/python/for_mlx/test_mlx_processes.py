"""A prompt cache that one process saves and another loads; and with which weights it goes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_mlx import make_model, mx, read, tokens

# isort: split
import tqai
from mlx.utils import tree_map
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

PATHS = [*(path for path in sys.path if path), str(Path(__file__).parents[1])]
# What the processes share; the model's weights are the same in each.
BEFORE = f"""
import sys
sys.path[:0] = {PATHS!r}
import numpy as np
from small_mlx import make_model, mx, read, tokens
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
folder = sys.argv[1]
model, text = make_model("gemma3"), tokens(400)

def go_on(cache):
    np.save(folder + "/" + sys.argv[2], np.array(read(model, cache, text[:, 350:], [30])))
"""
SAVE = """
import tqai
cache = tqai.patch(model, residual_window=32)
read(model, cache, text[:, :350], [350])
save_prompt_cache(folder + "/cache.safetensors", cache, {"prompt": "a text"})
go_on(cache)
"""
LOAD = """
import tqai
tqai.patch(model)
cache, about = load_prompt_cache(folder + "/cache.safetensors", return_metadata=True)
assert about == {"prompt": "a text"} and [layer.offset for layer in cache] == [350, 350]
assert cache[0].settings.residual_window == 32  # those that it was made with
go_on(cache)
"""
LOAD_FIRST = """
import tqai.mlx.hooks
cache = load_prompt_cache(folder + "/cache.safetensors")
tqai.patch(model)
go_on(cache)
"""
WITHOUT = """
assert "tqai" not in sys.modules
load_prompt_cache(folder + "/cache.safetensors")
"""


def run(code: str, folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEFORE + code, str(folder), name]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_one_process_saves_and_another_loads(tmp_path: Path) -> None:
    for name, code in (("saved", SAVE), ("loaded", LOAD), ("first", LOAD_FIRST)):
        ran = run(code, tmp_path, name)
        assert ran.returncode == 0, ran.stderr
    saved = np.load(tmp_path / "saved.npy")
    for name in ("loaded", "first"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), saved)
    ran = run(WITHOUT, tmp_path, "none")
    assert ran.returncode == 1 and "KeyError: 'TqaiKVCache'" in ran.stderr


def saved(model: Any, file: Path) -> Any:
    """What a cache of `model` is when it was saved and loaded."""
    cache = tqai.patch(model, residual_window=32)
    read(model, cache, tokens(200), [150])
    save_prompt_cache(str(file), cache)
    return load_prompt_cache(str(file))


def test_other_weights_are_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    loaded = saved(model, tmp_path / "cache.safetensors")
    model(tokens(1), cache=copy.deepcopy(loaded))
    same = make_model("llama")
    tqai.patch(same)
    same(tokens(1), cache=copy.deepcopy(loaded))
    other = make_model("llama")
    other.update(tree_map(lambda array: array * 1.01, other.parameters()))
    cache = tqai.patch(other)
    for given in (loaded, tqai.new_cache(model)):
        read(model, given, tokens(3), [3])
        with pytest.raises(ValueError, match="a model with other weights than this .*llama.Model"):
            other(tokens(1), cache=given)
    # nothing of the first model's is left in what was trimmed
    for layer in loaded:
        layer.trim(10_000)
    assert mx.array_equal(other(tokens(3), cache=loaded), other(tokens(3), cache=cache))


def test_a_row_of_a_batch_goes_with_the_same_weights() -> None:
    model = make_model("llama")
    tqai.patch(model)
    rows = [tqai.new_cache(model) for _ in range(2)]
    for row in rows:
        read(model, row, tokens(20), [20])
    batch = [type(layers[0]).merge(layers) for layers in zip(*rows, strict=True)]
    model(tokens(1, rows=2), cache=batch)
    row = [layer.extract(1) for layer in batch]
    model(tokens(1), cache=row)
    again = [type(layer).from_state(layer.state) for layer in batch]
    other = make_model("llama")
    other.update(tree_map(lambda array: array * 1.01, other.parameters()))
    tqai.patch(other)
    for cache, count in ((row, 1), (again, 2)):
        with pytest.raises(ValueError, match="a model with other weights"):
            other(tokens(1, rows=count), cache=cache)
