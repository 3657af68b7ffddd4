"""Caches whose compressed tokens stay in their file."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tqai
from caches import SEALING, assert_equal, filled
from conftest import Models, make_ids
from tqai import _core

GOLDEN = Path(__file__).parents[3] / "golden"


@pytest.fixture
def model(models: Models) -> Any:
    model = models("llama")
    tqai.patch(model, **SEALING)
    return model


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    tqai.save_cache(filled(model, tqai.new_cache(model), make_ids(2, 200)), tmp_path / "f")
    return tmp_path / "f"


def more(model: Any, cache: Any, tokens: int, seed: int = 9) -> torch.Tensor:
    ids = make_ids(cache.layers[0].batch_size, tokens, seed)
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def bytes_of(cache: Any) -> list[bytes]:
    return [layer.core.serialize() for layer in cache.layers]


def test_a_mapped_cache_is_the_copied_one_without_its_tiles(model: Any, saved: Path) -> None:
    copied = tqai.load_cache(saved, model)
    before = _core.allocated_bytes()
    mapped = tqai.load_cache(saved, model, mapped=True)
    allocated = _core.allocated_bytes() - before
    ours, theirs = mapped.memory_report(), copied.memory_report()
    assert ours["mapped_bytes"] == theirs["packed_bytes"] > 0 == theirs["mapped_bytes"]
    assert ours["packed_bytes"] == 0 and ours["packed_tokens"] == theirs["packed_tokens"] > 0
    assert allocated == ours["total_bytes"] == theirs["total_bytes"] - theirs["packed_bytes"]
    assert bytes_of(mapped) == bytes_of(copied)
    if sys.platform == "linux":
        assert str(saved) in Path("/proc/self/maps").read_text()
    for tokens in (1, 100, 2):
        assert torch.equal(more(model, mapped, tokens), more(model, copied, tokens))
    assert bytes_of(mapped) == bytes_of(copied)
    after = mapped.memory_report()
    assert after["mapped_bytes"] == ours["mapped_bytes"]  # what came later is in memory
    assert after["packed_bytes"] > 0
    del mapped, after
    if sys.platform == "linux":
        assert str(saved) not in Path("/proc/self/maps").read_text()


def replace(model: Any, path: Path) -> None:
    tqai.save_cache(filled(model, tqai.new_cache(model), make_ids(1, 90, seed=5)), path)


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be replaced there")
@pytest.mark.parametrize(
    "change",
    [replace, lambda model, path: path.unlink(), lambda model, path: path.rename(f"{path} 2")],
    ids=["replaced", "removed", "renamed"],
)
def test_the_file_may_go(model: Any, saved: Path, change: Callable[..., None]) -> None:
    copied = tqai.load_cache(saved, model)
    mapped = tqai.load_cache(saved, model, mapped=True)
    change(model, saved)
    assert_equal(mapped, copied)
    assert torch.equal(more(model, mapped, 90), more(model, copied, 90))
    assert bytes_of(mapped) == bytes_of(copied)


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be replaced there")
def test_it_may_be_saved_onto_its_own_file(model: Any, saved: Path) -> None:
    copied = tqai.load_cache(saved, model)
    mapped = tqai.load_cache(saved, model, mapped=True)
    for cache in (mapped, copied):
        more(model, cache, 90)
    expected = bytes_of(copied)
    for _ in range(2):
        tqai.save_cache(mapped, saved)
        assert bytes_of(mapped) == expected
        mapped = tqai.load_cache(saved, model, mapped=True)
    assert bytes_of(mapped) == expected
    assert mapped.memory_report()["packed_bytes"] == 0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "cropped": lambda cache: cache.crop(70),
    "cropped in the window": lambda cache: cache.crop(-3),
    "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])),
    "chosen": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "emptied": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(model: Any, saved: Path, name: str) -> None:
    copied, mapped = (tqai.load_cache(saved, model, mapped=each) for each in (False, True))
    before = copy.deepcopy(mapped)
    for cache in (copied, mapped):
        CHANGES[name](cache)
        if name != "emptied":
            more(model, cache, 80)
    assert_equal(mapped, copied)
    assert_equal(before, tqai.load_cache(saved, model))  # the copy is as it was
    assert before.memory_report()["mapped_bytes"] > 0


def test_pickles_hold_the_bytes_themselves(model: Any, saved: Path) -> None:
    mapped = tqai.load_cache(saved, model, mapped=True)
    pickled = pickle.dumps(mapped)
    expected = bytes_of(mapped)
    del mapped
    saved.unlink()
    back = pickle.loads(pickled)
    assert bytes_of(back) == expected
    assert back.memory_report()["mapped_bytes"] == 0 < back.memory_report()["packed_bytes"]


def test_layers_that_are_not_compressed_are_copied(models: Models, tmp_path: Path) -> None:
    model = models("llama")
    cache = tqai.patch(model, skip_layers=[-1], **SEALING)
    tqai.save_cache(filled(model, cache, make_ids(1, 150)), tmp_path / "f")
    mapped = tqai.load_cache(tmp_path / "f", model, mapped=True)
    layers = mapped.memory_report()["layers"]
    assert [layer["mapped_bytes"] > 0 for layer in layers] == [True, False]
    assert torch.equal(more(model, mapped, 3), more(model, cache, 3))


def test_what_cannot_stay_in_the_file_is_refused(
    models: Models, model: Any, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"file_1.* is of format version 1, .* without mapped"):
        tqai.load_cache(GOLDEN / "file_1.safetensors", model, mapped=True)
    tqai.patch(model, backend="torch-ops", **SEALING)
    with pytest.raises(
        ValueError, match="layer 0 is read on the device cpu with backend 'torch-ops'"
    ):
        tqai.load_cache(saved, model, mapped=True)
    tqai.load_cache(saved, model)
    with pytest.raises(TypeError):
        tqai.load_cache(saved, model, True)  # type: ignore[misc]


def test_damage_is_found_before_it_is_read(model: Any, saved: Path) -> None:
    whole = saved.read_bytes()
    for bad in (whole[:-1], whole[: len(whole) // 2], whole[:-40] + b"x" + whole[-39:]):
        saved.write_bytes(bad)
        with pytest.raises(ValueError, match=str(saved)):
            tqai.load_cache(saved, model, mapped=True)
