"""``tqai reproduce``: the paper's synthetic results, measured here."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tqai.cli.options import add_verb
from tqai.cli.output import print_json, print_table, progress_bar
from tqai.cli.plot import add_plot, figure_for
from tqai.settings import ROTATIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tqai.measure.reproduce import Bias, Quantity, Reproduction


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "reproduce",
        "Measures the errors of TurboQuant's two quantisers (arXiv:2504.19874) on random unit "
        "vectors, and those of trellis codes and lattices, beside the paper's values and bounds.",
        run,
        models=False,
    )
    number = {"type": int, "metavar": "N"}
    for option, default, text in (
        ("--head-dim", 128, "coordinates of a vector, 8…576"),
        ("--vectors", 32768, "vectors, in equal parts for each projection"),
        ("--queries", 64, "queries for each part, each multiplied with all of its vectors"),
        ("--projections", 128, "projection seeds of the prod quantiser"),
        ("--seed", 0, "of everything: vectors, rotation and projections"),
    ):
        parser.add_argument(
            option, default=default, help=f"{text} (default: %(default)s)", **number
        )
    parser.add_argument(
        "--bits", nargs="+", default=list(range(1, 9)), help="1…8 each (default: all)", **number
    )
    parser.add_argument(
        "--rotation",
        choices=ROTATIONS,
        default="auto",
        help="kind of rotation (default: %(default)s)",
    )
    add_plot(parser, "both errors")


def run(options: argparse.Namespace) -> None:
    from tqai.measure.reproduce import reproduce

    figure = None if options.plot is None else figure_for(options.plot, (11, 4.8))
    with progress_bar("step") as progress:
        result = reproduce(
            options.head_dim,
            options.bits,
            vectors=options.vectors,
            queries=options.queries,
            projections=options.projections,
            rotation=options.rotation,
            seed=options.seed,
            progress=progress,
        )
    if options.json:
        print_json(asdict(result) | {"notes": result.notes()})
    else:
        _print(result)
    if figure is not None:
        _draw(figure, result)
        figure.savefig(options.plot)


def _print(result: Reproduction) -> None:
    d = result.head_dim

    def paper(quantity: Quantity, scale: int = 1) -> str:
        return "" if quantity.paper is None else f"{quantity.paper * scale:.3g}"

    def bias(bias: Bias) -> list[str]:
        expected = f"{bias.expected:+.6f}" if bias.expected else "0"
        return [f"{bias.measured:+.6f}", f"{bias.standard_error:.6f}", expected]

    print(
        f"{result.vectors} unit vectors of {d} coordinates, {result.rotation.title()} rotation, "
        f"seed {result.seed}.\n\n"
        "Squared error of the mse quantiser, and of the same on the cache's int8 grid, with scalar "
        "and\nwith trellis codes; of lattices, for comparison; and the bounds:"
    )
    print_table(
        [
            "bits",
            "mse",
            "expected",
            "paper",
            "int8 grid",
            "expected",
            "trellis",
            "D4",
            "E8",
            "4^−b",
            "√3π/2·4^−b",
        ],
        [
            [
                str(row.bits),
                _text(row.error.measured),
                _text(row.error.expected),
                paper(row.error),
                _text(row.error_int8.measured),
                _text(row.error_int8.expected),
                *(
                    _text(each.measured) if each else ""
                    for each in (row.error_trellis, row.error_d4, row.error_e8)
                ),
                _text(row.error.lower_bound),
                _text(row.error.upper_bound),
            ]
            for row in result.rows
        ],
    )
    print(
        f"\nSquared error of inner products with {result.queries} unit queries for each of "
        f"{result.projections} projections, times d = {d}:"
    )
    print_table(
        ["bits", "mse", "prod", "expected", "paper", "4^−b", "mse: √3π/2·4^−b", "prod: √3π²·4^−b"],
        [
            [
                str(row.bits),
                _text(row.product_mse.measured * d),
                _text(row.product_prod.measured * d),
                _text(row.product_prod.expected * d),
                paper(row.product_prod, d),
                _text(row.product_prod.lower_bound * d),
                _text(row.product_mse.upper_bound * d),
                _text(row.product_prod.upper_bound * d),
            ]
            for row in result.rows
        ],
    )
    print("\nBias of the inner products, as a share of them, with its standard error:")
    print_table(
        ["bits", "mse", "±", "expected", "prod", "±", "expected"],
        [[str(row.bits), *bias(row.bias_mse), *bias(row.bias_prod)] for row in result.rows],
    )

    def uncertainty(*names: str) -> str:
        quantities = [getattr(row, name) for row in result.rows for name in names]
        return f"{100 * max(q.standard_error / q.measured for q in quantities):.2f} %"

    print(
        f"\nStandard errors are up to {uncertainty('error')} of the squared error, "
        f"{uncertainty('error_int8')} on the int8 grid,\nand "
        f"{uncertainty('product_mse', 'product_prod')} of that of inner products. "
        "Expected: by integration of the law on the sphere.\n"
    )
    for note in result.notes():
        print(textwrap.fill(note, 100, initial_indent="- ", subsequent_indent="  "))


def _text(value: float) -> str:
    """Four digits."""
    return f"{value:.4f}" if value >= 0.1 else f"{value:.3e}"


def _draw(figure: Figure, result: Reproduction) -> None:
    """Both errors against bits, each between its bounds, on logarithmic scales."""
    bits = [row.bits for row in result.rows]
    left, right = figure.subplots(1, 2)

    def points(axes: Any, quantities: list[Quantity], label: str, style: str) -> None:
        axes.plot(bits, [q.measured for q in quantities], style, label=label, markersize=5)

    def bound(axes: Any, values: list[float], label: str, style: str) -> None:
        axes.plot(bits, values, style, color="0.45", linewidth=1, label=label, zorder=1)

    error = [row.error for row in result.rows]
    points(left, error, "mse", "oC0-")
    points(left, [row.error_int8 for row in result.rows], "mse, int8 grid", "xC2--")
    for name, label, style in (
        ("error_trellis", "mse, trellis codes", "^C3-"),
        ("error_d4", "lattice D4", "vC4:"),
        ("error_e8", "lattice E8", "DC5:"),
    ):
        found = [(row.bits, each.measured) for row in result.rows if (each := getattr(row, name))]
        if found:
            left.plot(*zip(*found, strict=True), style, label=label, markersize=5)
    bound(left, [q.upper_bound for q in error], r"$\frac{\sqrt{3}\pi}{2}\,4^{-b}$", "--")
    bound(left, [q.lower_bound for q in error], r"$4^{-b}$", ":")
    left.set(title=f"Mean squared error, d = {result.head_dim}", ylabel=r"E‖x − x̂‖²")

    mse = [row.product_mse for row in result.rows]
    prod = [row.product_prod for row in result.rows]
    points(right, prod, "prod", "sC1-")
    points(right, mse, "mse", "oC0-")
    bound(right, [q.upper_bound for q in prod], r"$\sqrt{3}\pi^2\,4^{-b}/d$ (prod)", "-.")
    bound(right, [q.upper_bound for q in mse], r"$\frac{\sqrt{3}\pi}{2}\,4^{-b}/d$ (mse)", "--")
    bound(right, [q.lower_bound for q in prod], r"$4^{-b}/d$", ":")
    right.set(title=f"Inner-product error, d = {result.head_dim}", ylabel="E(⟨y, x⟩ − ⟨y, x̂⟩)²")
    for axes in (left, right):
        axes.set(yscale="log", xlabel="bits a coordinate", xticks=sorted(set(bits)))
        axes.grid(alpha=0.3)
        axes.legend()
