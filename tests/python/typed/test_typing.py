"""What pyright says to a user's program, and to one with mistakes in it."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tqai
import transformers
from tqai import api
from tqai.settings import OPTIONS, Options, Settings

HERE = Path(__file__).parent
PROGRAMS = ("user_program.py", "mistaken_program.py")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[int]]]:
    """File → lines that pyright reports errors in, strict but for what others leave untyped."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed (pip install 'pyright[nodejs]')")
    folder = tmp_path_factory.mktemp("pyright")
    for name in PROGRAMS:
        shutil.copy(HERE / name, folder)
    # The package as it is imported here; users' rules without those on other packages' gaps.
    settings: dict[str, Any] = {
        "extraPaths": [entry for entry in sys.path if Path(entry).is_dir()],
        "typeCheckingMode": "strict",
        "reportUnknownMemberType": False,
        "reportMissingTypeStubs": False,
        "reportUnusedExpression": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    ran = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--project", str(folder)]
        + ["--pythonpath", sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    result = json.loads(ran.stdout)
    assert result["summary"]["filesAnalyzed"] == len(PROGRAMS)
    lines: dict[str, set[int]] = {name: set() for name in PROGRAMS}
    for each in result["generalDiagnostics"]:
        if each["severity"] == "error":
            lines[Path(each["file"]).name].add(each["range"]["start"]["line"] + 1)
            print(each["file"], each["range"]["start"]["line"] + 1, each["message"])
    yield lines


def test_a_program_without_mistakes(said: dict[str, set[int]]) -> None:
    assert said[PROGRAMS[0]] == set()


def test_each_mistake_is_reported(said: dict[str, set[int]]) -> None:
    marked = {
        number
        for number, line in enumerate((HERE / PROGRAMS[1]).read_text().splitlines(), 1)
        if "# wrong" in line
    }
    assert len(marked) > 20
    assert said[PROGRAMS[1]] == marked


def test_all_encoder_decoders_that_types_know_exist() -> None:
    """A name that this transformers lacks would make every model look like one."""
    tree = ast.parse(Path(api.__file__).read_text())
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "transformers"
        for alias in node.names
    ]
    assert len(names) > 10
    for name in names:
        assert hasattr(transformers, name), name


def test_options_are_those_of_settings() -> None:
    assert set(Options.__annotations__) == set(OPTIONS)
    assert set(OPTIONS) == {"preset", *Settings.__dataclass_fields__}
    assert set(tqai.PRESETS) == {"quality", "balanced", "small"}
