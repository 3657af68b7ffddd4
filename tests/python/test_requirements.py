"""What is said where a package is missing or too old, in processes in which that is really so."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import tqai
from tqai.requirements import (
    NEWEST_MLX_LM,
    NEWEST_TRANSFORMERS,
    OLDEST_MLX_LM,
    OLDEST_TRANSFORMERS,
)

TORCH = "tqai for models needs torch and transformers: pip install torch transformers"
OLD = (
    "transformers 4.50.1 is too old for tqai, which needs 4.57 or newer: "
    "pip install 'transformers>=4.57'"
)

ENTRIES = {
    "patch": "tqai.patch(None)",
    "patched": "tqai.patched(None)",
    "unpatch": "tqai.unpatch(None)",
    "new_cache": "tqai.new_cache(None)",
    "TqaiCache": "tqai.TqaiCache",
    "TqaiEncoderDecoderCache": "from tqai import TqaiEncoderDecoderCache",
    "save_cache": "tqai.save_cache",
    "load_cache": "from tqai import load_cache",
    "PrefixStore": "tqai.PrefixStore",
    "evaluate": "tqai.evaluate",
    "needle": "tqai.needle",
    "Fidelity": "tqai.Fidelity",
    "Recall": "from tqai import Recall",
}
VERBS = (
    ["demo"],
    ["eval"],
    ["eval", "--needle"],
    ["memory"],
    ["bench", "kernels"],
    ["bench", "model"],
    ["bench", "prefill"],
    ["bench", "store"],
    ["info", "--model", "somewhere"],
)
EACH = """
import contextlib, io, sys
import tqai
assert not tqai.is_patched(object()) and tqai.Settings().bits_k == 4 and tqai.Quantizer(64)
for name, code in ENTRIES.items():
    try:
        exec(code)
    except ImportError as error:
        print(name, "|", error)
    else:
        print(name, "| nothing")
from tqai.cli import main
for verb in VERBS:
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = main(verb)
    print(*verb, "|", code, stderr.getvalue().strip())
"""


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Python with tqai, numpy and what is in `folder`, and no other package."""
    for package in (tqai, numpy):
        assert package.__file__ is not None
        whole = Path(package.__file__).parent
        (folder / whole.name).symlink_to(whole)
        for libs in whole.parent.glob(f"{whole.name}.libs"):  # numpy's own libraries
            (folder / libs.name).symlink_to(libs)
    start = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + code],
        capture_output=True,
        text=True,
        check=False,
    )


def said(folder: Path) -> dict[str, str]:
    ran = run(folder, f"ENTRIES = {ENTRIES!r}\nVERBS = {VERBS!r}\n{EACH}")
    assert ran.returncode == 0, ran.stderr
    return dict(line.split(" | ", 1) for line in ran.stdout.splitlines())


def test_without_torch(tmp_path: Path) -> None:
    verbs = {" ".join(verb): f"2 tqai: {TORCH}" for verb in VERBS}
    assert said(tmp_path) == {**dict.fromkeys(ENTRIES, TORCH), **verbs}


def put_transformers(folder: Path, version: str) -> None:
    """Packages that say this of themselves, and cannot be imported."""
    for package, number in (("torch", "2.8.0"), ("transformers", version)):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise RuntimeError('imported')")
        about = folder / f"{package}-{number}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Name: {package}\nVersion: {number}\n")


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "6.0.1", "5.24.9", "4.57.6"])
def test_a_transformers_that_is_newer_than_those_tried(tmp_path: Path, version: str) -> None:
    """One remark in a process, at the user's own line, and tqai goes on."""
    put_transformers(tmp_path, version)
    code = """
import contextlib, warnings
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    import tqai
    assert not found
    for _ in range(3):
        with contextlib.suppress(RuntimeError):
            tqai.patch(None)  # imports transformers
for warning in found:
    print(warning.filename, warning.category.__name__, warning.message)
"""
    ran = run(tmp_path, code)
    assert ran.returncode == 0, ran.stderr
    if version in ("5.24.9", "4.57.6"):
        assert ran.stdout == ""
    else:
        assert ran.stdout.splitlines() == [
            f"<string> UserWarning transformers {version} is newer than any that this tqai was "
            "tried with, the newest being 5.24. tqai goes on; should something be wrong, take that "
            "one: pip install 'transformers<5.25'"
        ]


def test_the_versions_tried_are_those_of_the_package() -> None:
    """What pip is told, what is said at run time, what the tests run with, and what is promised."""
    root = Path(__file__).parents[2]

    def found(name: str, pattern: str) -> tuple[int, ...]:
        # The first one: constraints.txt has an older one for an older Python next.
        version = re.findall(pattern, (root / name).read_text(), re.MULTILINE)[0]
        return tuple(map(int, version.split(".")))

    major, minor = NEWEST_TRANSFORMERS
    assert found("pyproject.toml", r'"transformers>=[\d.]+,<([\d.]+)"') == (major, minor + 1)
    assert (
        OLDEST_TRANSFORMERS
        <= found("constraints.txt", r"^transformers==([\d.]+)(?!.*<)")[:2]
        <= NEWEST_TRANSFORMERS
    )
    oldest = found("scripts/test", r"^oldest=([\d.]+)")
    assert oldest[:2] == OLDEST_TRANSFORMERS
    assert found("pyproject.toml", r'"transformers>=([\d.]+),<') == oldest
    major_lm, minor_lm = NEWEST_MLX_LM
    packages = (root / "pyproject.toml").read_text()
    bounds = set(re.findall(r'"mlx-lm.*>=([\d.]+,<[\d.]+);', packages))
    assert bounds == {f"{'.'.join(map(str, OLDEST_MLX_LM))},<{major_lm}.{minor_lm + 1}"}
    assert OLDEST_MLX_LM <= found("constraints.txt", r"^mlx-lm==([\d.]+)")[:2] <= NEWEST_MLX_LM
    promised = f"| transformers | {'.'.join(map(str, oldest))} to {major}.{minor}, tried"
    assert promised in (root / "README.md").read_text()


def test_a_transformers_that_is_too_old(tmp_path: Path) -> None:
    put_transformers(tmp_path, "4.50.1")
    verbs = {" ".join(verb): f"2 tqai: {OLD}" for verb in VERBS}
    assert said(tmp_path) == {**dict.fromkeys(ENTRIES, OLD), **verbs}


MLX_MODEL = """
import sys, types
import tqai
nn = types.ModuleType("mlx.nn")
nn.Module = dict
sys.modules["mlx.nn"] = nn  # as it is where somebody has a model of mlx's
for entry in (tqai.patch, tqai.patched, tqai.unpatch, tqai.new_cache):
    try:
        entry({})
    except ImportError as error:
        print(error)
assert not tqai.is_patched({})
"""


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ((), "tqai for mlx's models needs mlx and mlx-lm: pip install mlx mlx-lm"),
        (("mlx",), "tqai for mlx's models needs mlx-lm: pip install mlx-lm"),
        (
            ("mlx", "mlx_lm"),
            "mlx-lm 0.31.3 is too old for tqai, which needs 0.32 or newer: "
            "pip install 'mlx-lm>=0.32'",
        ),
    ],
)
def test_without_mlx_lm(tmp_path: Path, installed: tuple[str, ...], message: str) -> None:
    for package in installed:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / "core.py").touch()
    about = tmp_path / "mlx_lm-0.31.3.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: mlx-lm\nVersion: 0.31.3\n")
    ran = run(tmp_path, MLX_MODEL)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [message] * 4


@pytest.mark.parametrize("others", [[], ["_core.cpython-39-x86_64-linux-gnu.so"]])
def test_a_package_that_is_not_compiled_for_this_python(tmp_path: Path, others: list[str]) -> None:
    package = tmp_path / "tqai"
    ignored = shutil.ignore_patterns("_core*.so", "_core*.pyd", "__pycache__")
    shutil.copytree(Path(tqai.__file__).parent, package, ignore=ignored)
    for name in others:
        (package / name).touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import tqai"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = ran.stderr.splitlines()[-1]
    tag = sys.implementation.cache_tag
    assert last.startswith(f"ImportError: tqai's compiled module for {tag} is not in {package}")
    assert "pip install" in last and all(name in last for name in others)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="newer ones refuse the module themselves")
def test_another_interpreter_of_the_process_is_refused() -> None:
    """In a process of its own: once there was another, Python says of every thread that it holds
    the GIL, and torch then refuses to run backwards."""
    code = f"""
import _xxsubinterpreters as interpreters
own = interpreters.create()
interpreters.run_string(own, "import sys; sys.path[:] = {sys.path!r}; import tqai")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "RunFailedError" in ran.stderr and "main interpreter alone" in ran.stderr


def test_what_needs_no_models(tmp_path: Path) -> None:
    code = "from tqai.cli import main; main(['info']); main(['reproduce', '--vectors', '512'])"
    ran = run(tmp_path, code.replace("'512'", "'512', '--projections', '2'"))
    assert ran.returncode == 0, ran.stderr
    assert "not installed" in ran.stdout and "Bounds of arXiv" in ran.stdout


def test_no_message_names_a_package_that_is_not_ours() -> None:
    """The name tqai on the registry is another package's."""
    root = Path(tqai.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert "pip install tqai" not in text and "pip install 'tqai" not in text, path
        assert "tqai[" not in text, path
