"""PNG plots with matplotlib (development extra). Without matplotlib there are no plots; the tables say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def available() -> bool:
    """True when matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def curves(series: Mapping[str, Mapping[float, float]], path: Path, x: str, y: str, log: bool = True) -> Path:
    """One line per series over its x values."""
    figure, axes = _figure(8, 5)
    for name, points in series.items():
        axes.plot(list(points), list(points.values()), marker="o", markersize=3, label=name)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=130)
    return path


def boxes(values: Mapping[str, Sequence[float]], path: Path, x: str) -> Path:
    """One horizontal box per name, whiskers over everything, log scale."""
    names = sorted(values, key=lambda name: -sorted(values[name])[len(values[name]) // 2])
    figure, axes = _figure(8, 1 + 0.28 * len(names))
    axes.boxplot([list(values[name]) for name in names], orientation="horizontal", whis=(0, 100), tick_labels=names)
    axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=130)
    return path
