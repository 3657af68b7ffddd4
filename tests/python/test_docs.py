"""docs/python.md has all that the package exports, as it is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import tqai
from tqai.settings import OPTIONS

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
README = PAGE.parents[1] / "README.md"


def sections() -> dict[str, str]:
    """Name → its heading and text."""
    parts = re.split(r"^### `tqai\.(\w+)", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_all_names_and_no_others() -> None:
    assert sections().keys() == set(tqai.__all__)


@pytest.mark.parametrize("name", ["unpatch", "save_cache", "load_cache", "evaluate", "needle"])
def test_signatures(name: str) -> None:
    heading = sections()[name].split("`\n")[0]
    written = re.findall(r"[(,] ?(?:\*, )?(\w+)(?=[=,)])", heading.split(" ->")[0])
    parameters = inspect.signature(getattr(tqai, name)).parameters
    assert [each for each in written if each in parameters] == list(parameters)
    for parameter in parameters.values():
        if parameter.default is not parameter.empty:
            default = str(parameter.default).replace("'", '"')
            assert f"{parameter.name}={default}" in heading, parameter


def test_options_and_their_defaults() -> None:
    table = dict(re.findall(r"^\| (`[^|]+) \| (`[^|]+) \|", sections()["patch"], flags=re.M))
    written = {}
    for names, defaults in table.items():
        pairs = zip(names.split(", "), defaults.split(", "), strict=True)
        written |= {name.strip("`"): default.strip("`") for name, default in pairs}
    assert written == {name: repr(value).replace("'", '"') for name, value in OPTIONS.items()}


@pytest.mark.parametrize("name", ["Fidelity", "Recall"])
def test_fields(name: str) -> None:
    for field in getattr(tqai, name).__dataclass_fields__:
        assert f"`{field}`" in sections()[name], field


@pytest.mark.parametrize("name", ["Quantizer", "ProdQuantizer", "Codebook"])
def test_quantisers(name: str) -> None:
    kind = getattr(tqai, name)
    signature = inspect.getdoc(kind.__init__).splitlines()[0]  # type: ignore[union-attr]
    for parameter in re.findall(r"(\w+): ", signature):
        assert parameter == "self" or parameter in sections()[name], parameter


def test_readme_has_the_presets() -> None:
    text = README.read_text(encoding="utf-8")
    for name, own in tqai.PRESETS.items():
        size = (own["bits_k"] + own["bits_v"]) * 128 // 8 + 4
        row = next(line for line in text.splitlines() if line.startswith(f'| `"{name}"`'))
        bits, codec = f"{own['bits_k']}, {own['bits_v']}", f'`"{own["codec"]}"`'
        assert f"| {bits} | {codec} | {size} bytes |" in row
