"""``--plot``, of verbs that can draw what they measure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqai.requirements import needs

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def add_plot(parser: Any, what: str) -> None:
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw {what} (needs matplotlib)")


def figure_for(path: Path, size: tuple[float, float]) -> Figure:
    """An empty figure, its size in inches.

    Raises:
        MissingPackage: without matplotlib.
        ValueError, OSError: where it could not be drawn to `path` later.
    """
    needs("matplotlib", what="--plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot {path}: expected a name that ends in .{', .'.join(kinds)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--plot {path}: no folder {path.parent}")
    return figure
