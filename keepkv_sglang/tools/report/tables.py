"""Tables of text, made by tabulate."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from tabulate import DataRow, TableFormat, tabulate

_ROW = DataRow("|", "|", "|")
_NARROW = TableFormat(
    lineabove=None, linebelowheader=lambda widths, _: "|" + "---|" * len(widths), linebetweenrows=None, linebelow=None,
    headerrow=_ROW, datarow=_ROW, padding=1, with_header_hide=None,
)  # fmt: skip


def markdown(
    columns: Sequence[str], rows: Iterable[Sequence[object]], text: Collection[int] = (0,), padded: bool = True
) -> str:
    """A GitHub Markdown table. The columns numbered in `text` are aligned left, the others, of numbers, right.

    Cells are shown as they are, None as nothing: whoever calls rounds. A "|" is escaped, a line break becomes a space.
    padded: columns are filled up with spaces, so that they stand below each other in a terminal; otherwise nothing is
    aligned."""
    heads, *cells = [[_escaped(cell) for cell in row] for row in (columns, *rows)]
    if padded:
        return tabulate(cells, heads, tablefmt="pipe", disable_numparse=True, colalign=_alignment(columns, text))
    return tabulate(cells, heads, tablefmt=_NARROW, disable_numparse=True, stralign=None)


def plain(columns: Sequence[str], rows: Iterable[Sequence[object]], text: Collection[int] = (0,)) -> str:
    """Columns for a terminal, aligned as in `markdown`."""
    cells = [[_shown(cell) for cell in row] for row in rows]
    return tabulate(cells, list(columns), tablefmt="simple", disable_numparse=True, colalign=_alignment(columns, text))


def _alignment(columns: Sequence[str], text: Collection[int]) -> list[str]:
    return ["left" if i in text else "right" for i in range(len(columns))]


def _shown(cell: object) -> str:
    return "" if cell is None else str(cell).strip()


def _escaped(cell: object) -> str:
    return _shown(cell).replace("|", "\\|").replace("\n", " ")
