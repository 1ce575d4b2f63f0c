"""PNG plots with matplotlib (development extra). Without matplotlib there are no plots; the tables say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.report.statistics import median


def available() -> bool:
    """True when matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure that belongs to no window system, and its axes."""
    from matplotlib.figure import Figure  # optional dependency

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def curves(
    series: Mapping[str, Mapping[float, float]],
    path: Path,
    x: str,
    y: str,
    log: bool = True,
    log_x: bool = False,
    bottom: float | None = None,
    title: str = "",
) -> Path:
    """One line per series over its x values. log, log_x: y, x on a logarithmic axis. bottom: where y begins."""
    figure, axes = _figure(8, 5)
    for name, points in series.items():
        axes.plot(list(points), list(points.values()), marker="o", markersize=3, label=name)
    if log:
        axes.set_yscale("log")
    if log_x:
        axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=bottom)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=130)
    return path


def boxes(values: Mapping[str, Sequence[float]], path: Path, x: str) -> Path:
    """One horizontal box per name, the lowest median on top, whiskers over everything, log scale."""
    names = sorted(values, key=lambda name: -median(values[name]))
    figure, axes = _figure(8, 1 + 0.28 * len(names))
    axes.boxplot([list(values[name]) for name in names], orientation="horizontal", whis=(0, 100), tick_labels=names)
    axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=130)
    return path
