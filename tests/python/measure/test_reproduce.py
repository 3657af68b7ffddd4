"""``tqai reproduce``: its figures against theory, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from tqai import _core
from tqai.cli import main
from tqai.measure.reproduce import Quantity, Reproduction, Row, reproduce

# Lloyd–Max distortion of unit vectors of 64 coordinates, by a solver that is not this library's.
LLOYD_MAX_64 = (0.35839, 0.11453, 0.033391, 0.0091315, 0.0023992, 6.1596e-4, 1.5615e-4, 3.9317e-5)
SMALL = ("--vectors", "64", "--queries", "2", "--projections", "4", "--head-dim", "16")


@pytest.fixture(scope="module", params=["hadamard", "haar"])
def result(request: pytest.FixtureRequest) -> Reproduction:
    return reproduce(64, vectors=16384, queries=32, projections=64, rotation=request.param, seed=1)


def quantities(row: Row) -> dict[str, Quantity]:
    names = ("error", "error_int8", "product_mse", "product_prod")
    return {name: getattr(row, name) for name in names}


def test_errors_are_those_of_the_law_on_the_sphere(result: Reproduction) -> None:
    assert [row.bits for row in result.rows] == list(range(1, 9))
    for row, distortion in zip(result.rows, LLOYD_MAX_64, strict=True):
        assert row.error.expected == pytest.approx(distortion, rel=1e-4)
        assert row.product_mse.expected == pytest.approx(distortion / 64, rel=1e-4)
        for name, quantity in quantities(row).items():
            # so that the next line means something
            assert quantity.standard_error < 0.03 * quantity.measured, (row.bits, name)
            off = abs(quantity.measured - quantity.expected)
            assert off < 4 * quantity.standard_error, (row.bits, name)


def test_errors_are_within_the_bounds(result: Reproduction) -> None:
    for row in result.rows:
        lower = 4.0**-row.bits
        upper = math.sqrt(3) * math.pi / 2 * lower
        assert (row.error.lower_bound, row.error.upper_bound) == pytest.approx((lower, upper))
        assert row.product_mse.upper_bound == pytest.approx(upper / 64)
        assert row.product_prod.upper_bound == pytest.approx(math.sqrt(3) * math.pi**2 * lower / 64)
        for name, quantity in quantities(row).items():
            assert quantity.lower_bound < quantity.measured, (row.bits, name)
            if name != "error_int8" or row.bits < 7:
                assert quantity.measured < quantity.upper_bound, (row.bits, name)


def test_trellis_codes_have_a_third_less_error(result: Reproduction) -> None:
    most = (0.84, 0.71, 0.67, 0.66)
    for row, share in zip(result.rows, most, strict=False):
        assert row.error_trellis is not None
        assert 4.0**-row.bits < row.error_trellis.measured < share * row.error.expected, row.bits
    assert all(row.error_trellis is None for row in result.rows[4:])


def test_lattices_lie_between_scalar_and_trellis_codes(result: Reproduction) -> None:
    for row in result.rows[1:4]:
        assert row.error_d4 is not None and row.error_trellis is not None
        spread = 3 * row.error_d4.standard_error
        assert row.error_trellis.measured < row.error_d4.measured + spread
        assert row.error_d4.measured < row.error.expected + spread
    e8 = result.rows[1].error_e8
    assert e8 is not None
    assert e8.measured == pytest.approx(0.76 * LLOYD_MAX_64[1], rel=0.05)
    assert [row.bits for row in result.rows if row.error_d4] == [1, 2, 3, 4]
    assert [row.bits for row in result.rows if row.error_e8] == [1, 2]
    # 12 coordinates are three runs of D4's and none of E8's
    (row,) = reproduce(12, (1,), vectors=8, projections=2).rows
    assert row.error_d4 and not row.error_e8


def test_prod_is_unbiased_and_mse_is_not(result: Reproduction) -> None:
    for row in result.rows:
        assert abs(row.bias_prod.measured) < 3 * row.bias_prod.standard_error, row.bits
        off = abs(row.bias_mse.measured - row.bias_mse.expected)
        assert off < 4 * row.bias_mse.standard_error, row.bits
    one = result.rows[0].bias_mse
    assert one.measured < -100 * one.standard_error
    assert one.measured == pytest.approx(2 / math.pi - 1, rel=0.03)  # the Gaussian's


def test_the_law_approaches_the_papers_values() -> None:
    """At a large d, but for what the paper rounded away."""
    rows = reproduce(512, range(1, 5), vectors=2, queries=1, projections=2).rows
    for row, share in zip(rows, (0.01, 0.01, 0.15, 0.06), strict=True):
        assert row.error.paper == pytest.approx(row.error.expected, rel=share)
    for row, share in zip(rows, (0.01, 0.02, 0.03, 0.15), strict=True):
        assert row.product_prod.paper == pytest.approx(row.product_prod.expected, rel=share)


def test_the_seed_decides_everything() -> None:
    def run(seed: int) -> Reproduction:
        return reproduce(16, (2,), vectors=64, queries=2, projections=4, seed=seed)

    assert run(1) == run(1)
    assert run(1).rows != run(2).rows


def test_seeds_of_vectors_rotation_and_projections_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    prod = _core.ProdQuantizer

    def recorded(*args: int, seed: int, projection_seed: int, rotation: str) -> object:
        seeds.extend((seed, projection_seed))
        return prod(*args, seed=seed, projection_seed=projection_seed, rotation=rotation)

    monkeypatch.setattr(_core, "ProdQuantizer", recorded)
    reproduce(16, (2,), vectors=8, queries=1, projections=8, seed=3)
    assert len(set(seeds)) == 1 + 8
    assert 3 not in seeds


def test_rows_vectors_and_progress() -> None:
    steps = []
    result = reproduce(
        16, (4, 1, 4), vectors=70, queries=2, projections=4, progress=lambda *a: steps.append(a)
    )
    assert [row.bits for row in result.rows] == [1, 4]
    assert result.vectors == 68
    assert result.rotation == "hadamard"
    assert steps[0] == (1, 8, "1 bits") and steps[-1] == (8, 8, "4 bits")
    assert reproduce(24, (1,), vectors=8, projections=2).rotation == "haar"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *SMALL, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["head_dim"] == 16 and result["rotation"] == "hadamard"
    assert (result["vectors"], result["queries"], result["projections"]) == (64, 2, 4)
    assert any("0.0345" in note for note in result["notes"])
    assert [row["bits"] for row in result["rows"]] == list(range(1, 9))
    for row in result["rows"]:
        for name in ("error", "error_int8", "product_mse", "product_prod"):
            assert set(row[name]) == set(Quantity.__dataclass_fields__)
            assert row[name]["measured"] > 0
        assert (row["error_trellis"] is None) == (row["bits"] > 4)
        for name in ("bias_mse", "bias_prod"):
            assert set(row[name]) == {"measured", "standard_error", "expected"}
    assert result["rows"][2]["error"]["paper"] == 0.03
    assert result["rows"][3]["product_prod"]["paper"] == 0.047 / 16
    assert result["rows"][4]["error"]["paper"] is None


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *SMALL, "--bits", "3", "8"]) == 0
    text = capsys.readouterr().out
    assert "64 unit vectors of 16 coordinates, Hadamard rotation, seed 0." in text
    assert text.count("\n3  ") == text.count("\n8  ") == 3
    assert "√3π/2·4^−b" in text and "√3π²·4^−b" in text
    notes = " ".join(text.split())
    assert "its 0.03 at 3 bits is 0.0345" in notes
    assert "above its bound at 8 bits" in notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head-dim", "7"], "head_dim=7: expected 8 to 576"),
        (["--head-dim", "96", "--rotation", "hadamard"], "powers of two"),
        (["--bits", "4", "9"], "bits=9: expected 1 to 8"),
        (["--vectors", "100"], "vectors=100: expected at least projections=128"),
        (["--queries", "0"], "queries=0: expected at least 1"),
        (["--projections", "1"], "projections=1: expected at least 2"),
        (["--seed", "-1"], "seed=-1: expected at least 0"),
    ],
)
def test_user_errors(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["reproduce", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert printed.err.startswith("tqai: ") and message in printed.err


def test_no_bits_are_an_error() -> None:
    with pytest.raises(ValueError, match="bits: expected at least one"):
        reproduce(bits=())
    with pytest.raises(ValueError, match="rotation='adaptive': expected one of auto, hadamard"):
        reproduce(rotation="adaptive")


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plot.{kind}"
    assert main(["reproduce", *SMALL, "--plot", str(file), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 8
    content = file.read_bytes()
    if kind == "png":
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
    else:
        assert b"<svg" in content


@pytest.mark.parametrize(
    ("name", "message"),
    [("plot.doc", "expected a name that ends in"), ("no/plot.png", "no folder")],
)
def test_files_that_cannot_be_plotted_to_are_told_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, message: str
) -> None:
    pytest.importorskip("matplotlib")
    assert main(["reproduce", "--plot", str(tmp_path / name)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err
    assert len(printed.err.splitlines()) == 1


def test_plot_without_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["reproduce", *SMALL, "--plot", "plot.png"]) == 2
    error = capsys.readouterr().err
    assert error == "tqai: --plot needs matplotlib: pip install matplotlib\n"


def test_without_tqdm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["reproduce", *SMALL]) == 0
    assert capsys.readouterr().err == ""


def test_unit_vectors_are_uniform() -> None:
    from tqai.measure.reproduce import _unit_vectors

    x = _unit_vectors(np.random.default_rng(0), 20_000, 16)
    assert x.dtype == np.float32
    assert np.linalg.norm(x, axis=1) == pytest.approx(1, abs=1e-6)
    moment = x.T @ x / len(x) * 16
    assert np.abs(moment - np.eye(16)).max() < 0.05
