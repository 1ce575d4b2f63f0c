"""What a task of `keepkv eval` is, and the loop that runs one: items, then methods, then budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from keepkv_sglang.tools.evaluate.methods import OURS, Method, Ours
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.evaluate.results import OFF, Results


@dataclass(frozen=True)
class Setup:
    """What all tasks of a run share. half: "dev" or "held-out" of the documents; items: how many per task, 0 for the
    task's own number; tokens: context length; originals: of tasks that read them, results.ORIGINALS; part: (i, n),
    item i of every n only."""

    probe: Probe
    data: Path
    half: str
    items: int
    tokens: int
    methods: Sequence[Method]
    budgets: Sequence[float]
    originals: Sequence[str] = (OFF,)
    part: tuple[int, int] | None = None


class Task(Protocol):
    """One question about quality. `run` below calls it; it keeps nothing between items but what `prepare` returns.

    A task that compares methods of its own also has `pairs(setup) -> list[tuple[Method, float]]`: methods and budgets
    in the place of setup's. One that can keep originals says `reads_originals = True`: its methods then say how
    (Ours.originals).
    """

    name: str

    def items(self, setup: Setup) -> Sequence[Any]:
        """The items, each with an attribute `number` that stays the same from run to run."""
        ...

    def prepare(self, setup: Setup, item: Any) -> Any:
        """What every method shares for this item: the full prefill, say."""
        ...

    def measure(self, setup: Setup, prepared: Any, method: Method, budget: float) -> dict[str, Any]:
        """One measurement: plain numbers and strings."""
        ...

    def report(self, rows: Sequence[dict[str, Any]]) -> str:
        """Markdown of the task's rows."""
        ...

    def plot(self, rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
        """PNG files, if any."""
        ...


def ours_only(setup: Setup, names: Sequence[str]) -> list[tuple[Method, float]]:
    """For a task that compresses piece by piece, which peers cannot do: our methods at every budget. Only those of
    `names` when the run asks for all of ours."""
    chosen: list[Method] = [method for method in setup.methods if isinstance(method, Ours)]
    if len(chosen) >= len(OURS):
        chosen = [method for method in chosen if method.name in names]
    return [(method, budget) for budget in setup.budgets for method in chosen]


def with_originals(pairs: Sequence[tuple[Method, float]], originals: Sequence[str]) -> list[tuple[Method, float]]:
    """Ours once for each way to keep originals; what no server can run only without; the full cache, which is not ours,
    once."""
    made: list[tuple[Method, float]] = []
    for method, budget in pairs:
        if isinstance(method, Ours) and not method.offline_scorer:
            made += [(replace(method, originals=kept), budget) for kept in originals]
        else:
            made.append((method, budget))
    return made


def run(task: Task, setup: Setup, results: Results) -> None:
    """Measures what `results` lacks. Interrupt it whenever you like."""
    items = task.items(setup)
    if setup.part:
        items = items[setup.part[0] - 1 :: setup.part[1]]
    own = getattr(task, "pairs", None)
    pairs = own(setup) if own else [(method, budget) for budget in setup.budgets for method in setup.methods]
    reads = getattr(task, "reads_originals", False)
    if reads:
        pairs = with_originals(pairs, setup.originals)
    with tqdm(total=len(items) * len(pairs), desc=task.name, mininterval=2.0, smoothing=0.02) as bar:
        for item in items:
            keyed = [(method, budget, getattr(method, "originals", OFF)) for method, budget in pairs]
            todo = [(m, b, kept) for m, b, kept in keyed if not results.has(task.name, m.name, b, item.number, kept)]
            bar.update(len(pairs) - len(todo))
            prepared = task.prepare(setup, item) if todo else None
            for method, budget, kept in todo:
                values = task.measure(setup, prepared, method, budget)
                if reads:
                    values = {"originals": kept, **values}
                results.add(task.name, method.name, budget, item.number, **values)
                bar.update()
