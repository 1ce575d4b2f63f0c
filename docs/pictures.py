"""Draws docs/row.svg and docs/tree.svg: `python docs/pictures.py`. A test fails when they are stale.

Both have a background of their own, so they read alike on white and on dark pages. The numbers belong together: budget
0.4, 2 recent tokens, an interval of 10 tokens, no sinks. They are small so that every slot can be drawn.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
WIDTH = 960

INK, GREY, PAPER = "#1c1f24", "#5a6270", "#fbfaf6"
# (fill, stroke) of what owns a slot
ANCHOR, SPAN, OWN, RAW = ("#cfe0f5", "#2f5f9e"), ("#fbdfb3", "#a55f00"), ("#e6d6f3", "#6b3fa0"), ("#d3edd8", "#2c7434")
FREE = ("#fbfaf6", "#9aa1ac")
KEPT, JOINED, DROPPED = "#2c7434", "#6b3fa0", "#b3261e"


@dataclass
class Drawing:
    """SVG text, element by element."""

    height: int
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, size: int = 13, at: str = "start", bold: bool = False, ink=INK):
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{at}" fill="{ink}"{weight}>'
            f"{escape(words)}</text>"
        )

    def box(self, x: float, y: float, w: float, h: float, colour: tuple[str, str], thick: float = 1.3, dash: str = ""):
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4" fill="{colour[0]}" stroke="{colour[1]}" '
            f'stroke-width="{thick:g}"{dashes}/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, ink: str = INK, thick: float = 1.5, dash: str = ""):
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{ink}" stroke-width="{thick:g}"{dashes}/>'
        )

    def cross(self, x: float, y: float, ink: str = DROPPED, half: float = 6):
        self.line(x - half, y - half, x + half, y + half, ink, 2)
        self.line(x - half, y + half, x + half, y - half, ink, 2)

    def dot(self, x: float, y: float):
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{INK}"/>')

    def svg(self, title: str) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" font-family="Helvetica, Arial, sans-serif" role="img">'
        )
        paper = (
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="10" fill="{PAPER}" '
            'stroke="#c9cdd4"/>'
        )
        return "\n".join([head, f"<title>{escape(title)}</title>", paper, *self.parts, "</svg>", ""])


# -- a request's row -------------------------------------------------------------------------------------------------

CELL, PITCH, GAP, LEFT = 30, 32, 12, 30
PARTS = ("anchor", "cached spans", "own segments", "raw tail")
OWNERS = ("SGLang's tree", "the span tree", "this request", "this request")
COLOURS = (ANCHOR, SPAN, OWN, RAW)
VOTES = ([1] * 4, [3, 1, 5, 2, 1, 4], [2, 3, 1, 3], [1] * 12)
TOKENS = (4, 18, 10, 12)
# tail token -> the kept token that it joins; it is kept itself where both are the same, and dropped where there is none
JOINS = {1: 2, 2: 2, 3: 2, 4: 5, 5: 5, 6: 6, 7: 5, 8: 9, 9: 9, 10: None, 11: 11, 12: 12}
RECENT = (11, 12)


def starts(lengths: list[int]) -> list[float]:
    """Where each part of a row begins."""
    found = [float(LEFT)]
    for length in lengths[:-1]:
        found.append(found[-1] + length * PITCH + GAP)
    return found


def cells(d: Drawing, x: float, y: float, votes: list[int], colour: tuple[str, str]) -> None:
    for i, count in enumerate(votes):
        d.box(x + i * PITCH, y, CELL, 34, colour, 2.6 if count > 1 else 1.3)
        d.text(x + i * PITCH + CELL / 2, y + 22, str(count), 14, "middle", count > 1)


def bracket(d: Drawing, x: float, y: float, length: int, tick: int, words: tuple[str, str], below: bool) -> None:
    """A part's name beside a line that spans its cells; tick: which way the ends point."""
    end = x + length * PITCH - PITCH + CELL
    d.line(x, y, end, y, GREY)
    for at in (x, end):
        d.line(at, y, at, y + tick, GREY)
    middle = (x + end) / 2
    for i, (line, bold) in enumerate(zip(words, (True, False), strict=True)):
        d.text(middle, y + (18 if below else -24) + 16 * i, line, 13, "middle", bold, INK if bold else GREY)


def row() -> str:
    """docs/row.svg."""
    d = Drawing(536)
    kept = [token for token, target in JOINS.items() if target == token]
    closed = [token for token in kept if token not in RECENT]
    votes = {token: sum(target == token for target in JOINS.values()) for token in kept}
    after = [VOTES[0], VOTES[1], VOTES[2] + [votes[t] for t in closed], [votes[t] for t in RECENT]]
    tokens, slots, left = sum(TOKENS), sum(map(len, VOTES)), sum(map(len, after))

    d.text(LEFT, 34, "One compression of a request's row, as one kv head of one layer sees it", 17, bold=True)
    d.text(
        LEFT,
        56,
        "A reply has grown by an interval of 10 tokens, behind the 2 that the last compression left raw.",
        13,
        ink=GREY,
    )

    y, places = 158, starts([len(v) for v in VOTES])
    d.text(LEFT, 88, f"before: {tokens} tokens in {slots} slots", 14, bold=True)
    for x, count, name, owner, colour in zip(places, VOTES, PARTS, OWNERS, COLOURS, strict=True):
        bracket(d, x, 136, len(count), 6, (name, owner), below=False)
        cells(d, x, y, count, colour)
    for token in JOINS:
        d.text(places[3] + (token - 1) * PITCH + CELL / 2, y - 4, str(token), 12, "middle", token in kept, GREY)

    y2, places2 = 314, starts([len(v) for v in after])
    d.text(LEFT, y2 - 14, f"after: {tokens} tokens in {left} slots", 14, bold=True)
    where = {t: places2[2] + (len(VOTES[2]) + i) * PITCH + CELL / 2 for i, t in enumerate(closed)}
    where |= {t: places2[3] + i * PITCH + CELL / 2 for i, t in enumerate(RECENT)}
    for token, target in JOINS.items():
        x = places[3] + (token - 1) * PITCH + CELL / 2
        if target is None:
            d.cross(x, y + 43, half=5)
        elif target == token:
            d.line(x, y + 35, where[token], y2 - 2, KEPT, 2.4)
        else:
            d.line(x, y + 35, where[target], y2 - 2, JOINED, 1.6, "5 3")
    for x, count, name, owner, colour in zip(places2, after, PARTS, OWNERS, COLOURS, strict=True):
        cells(d, x, y2, count, colour)
        bracket(d, x, y2 + 60, len(count), -6, (name, owner), below=True)
    for token, x in where.items():
        d.text(x, y2 + 49, str(token), 12, "middle", True, GREY)
    end = places2[3] + len(RECENT) * PITCH
    for i in range(slots - left):
        d.box(end + GAP + i * PITCH, y2, CELL, 34, FREE, 1.3, "4 3")
    d.text(end + GAP + (slots - left) * PITCH / 2, y2 + 78, f"{slots - left} slots are free again", 13, "middle", True)

    y3 = 446
    d.line(LEFT, y3 - 4, LEFT + 34, y3 - 4, KEPT, 2.4)
    d.text(LEFT + 42, y3, "keeps a slot")
    d.line(LEFT + 150, y3 - 4, LEFT + 184, y3 - 4, JOINED, 1.6, "5 3")
    d.text(LEFT + 192, y3, "joins a kept token")
    d.cross(LEFT + 345, y3 - 4)
    d.text(LEFT + 360, y3, "is dropped")
    d.box(LEFT + 460, y3 - 16, 24, 22, OWN, 2.6)
    d.text(LEFT + 472, y3, "3", 13, "middle", True)
    d.text(LEFT + 494, y3, "votes: here, the tokens that a slot stands for")
    notes = (
        "Only slots of the raw tail are written. The anchor and the cached spans are shared: they are only read.",
        "Tokens 11 and 12 are recent: each keeps a slot and is compressed with what follows.",
        "Token 6 scored highest, so nothing joins it. The default rule fits votes to queries: they are fractions then.",
    )
    for i, note in enumerate(notes):
        d.text(LEFT, y3 + 28 + 20 * i, note, 13, ink=GREY)
    return d.svg("A request's row before and after a compression, with votes")


# -- the prefix tree -------------------------------------------------------------------------------------------------

PANEL_W, PANEL_H, BOX_W, BOX_H, LEVEL = 456, 366, 138, 40, 58
COLUMN = (78, 228, 378)


@dataclass(frozen=True)
class Node:
    """A box of a panel. held: a running request locks it. fresh: it is new in this panel."""

    name: str
    size: str
    column: int
    level: int
    colour: tuple[str, str]
    parent: int | None
    held: bool = False
    fresh: bool = False


def panel(d: Drawing, x: float, y: float, title: str, notes: tuple[str, str], nodes: list[Node]) -> None:
    d.box(x, y, PANEL_W, PANEL_H, ("#ffffff", "#c9cdd4"), 1)
    d.text(x + 14, y + 24, title, 14, bold=True)
    for i, note in enumerate(notes):
        d.text(x + 14, y + 44 + 17 * i, note, 13, ink=GREY)

    def corner(node: Node) -> tuple[float, float]:
        return x + COLUMN[node.column] - BOX_W / 2, y + 80 + node.level * LEVEL

    for node in nodes:
        if node.parent is not None:
            (px, py), (cx, cy) = corner(nodes[node.parent]), corner(node)
            middle, turn = px + BOX_W / 2, cy - 9
            points = [(middle, py + BOX_H), (middle, turn), (cx + BOX_W / 2, turn), (cx + BOX_W / 2, cy)]
            for (x1, y1), (x2, y2) in itertools.pairwise(points):
                if (x1, y1) != (x2, y2):
                    d.line(x1, y1, x2, y2, GREY)
    for node in nodes:
        bx, by = corner(node)
        d.box(bx, by, BOX_W, BOX_H, node.colour, 2.8 if node.fresh else 1.2)
        d.text(bx + 10, by + 17, node.name, 13, bold=True)
        d.text(bx + 10, by + 33, node.size, 12)
        if node.held:
            d.dot(bx + BOX_W - 11, by + 12)


def tree() -> str:
    """docs/tree.svg."""
    d = Drawing(886)
    d.text(20, 34, "The life of a turn in the prefix tree", 17, bold=True)
    d.text(
        20, 56, "A box is a node of SGLang's tree or a span of ours; a span matches whole or not at all.", 13, ink=GREY
    )
    system = Node("anchor", "4 tokens, 4 slots", 0, 0, ANCHOR, None)
    prompt = Node("prompt 1", "18 tokens, 6 slots", 0, 1, SPAN, 0)
    recent = Node("recent", "2 tokens, raw", 0, 2, RAW, 1)
    reply = Node("reply 1", "20 tokens, 8 slots", 1, 2, SPAN, 1)
    tail = [Node("recent", "2 tokens, raw", 1, 3, RAW, 3), Node("raw tail", "3 tokens, raw", 1, 4, RAW, 4)]

    def seen(node: Node, held: bool = False, fresh: bool = False) -> Node:
        return Node(node.name, node.size, node.column, node.level, node.colour, node.parent, held, fresh)

    panel(
        d,
        20,
        72,
        "1. The prompt of turn 1 is read and compressed",
        ("The new spans are in the tree before the first decode step.", "The reply gets slots of the request's own."),
        [seen(n, True, True) for n in (system, prompt, recent)],
    )
    beside = (
        "the system prompt, uncompressed",
        "found by twins, retries and later turns",
        "compressed together with the reply",
    )
    for level, words in enumerate(beside):
        d.text(20 + COLUMN[0] + BOX_W / 2 + 14, 72 + 80 + level * LEVEL + 25, words, ink=GREY)
    panel(
        d,
        484,
        72,
        "2. The reply ends",
        (
            "Its compressed part hangs below the prompt, then its raw tail.",
            "No lock is left: all of it may be evicted, ends first.",
        ),
        [system, prompt, recent, seen(reply, fresh=True), *(seen(n, fresh=True) for n in tail)],
    )
    panel(
        d,
        20,
        450,
        "3. Turn 2 goes on",
        (
            "It matches the whole chain. The raw tail is compressed with the",
            "new prompt; its old spans stay until they are evicted.",
        ),
        [
            seen(system, True),
            seen(prompt, True),
            recent,
            seen(reply, True),
            *tail,
            Node("turn 2", "24 tokens, 10 slots", 2, 3, SPAN, 3, True, True),
            Node("recent", "2 tokens, raw", 2, 4, RAW, 6, True, True),
        ],
    )
    panel(
        d,
        484,
        450,
        "4. Others share what they agree on",
        ("B has the same system prompt, C has KeepKV switched off.", "Whoever sends prompt 1 again finds its spans."),
        [
            Node(system.name, system.size, 1, 0, ANCHOR, None, True),
            Node("prompt 1", "18 tokens, 6 slots", 0, 1, SPAN, 0),
            Node("recent", "2 tokens, raw", 0, 2, RAW, 1),
            Node("prompt of B", "30 tokens, 11 slots", 1, 1, SPAN, 0, True, True),
            Node("recent", "2 tokens, raw", 1, 2, RAW, 3, True, True),
            Node("prompt of C", "25 tokens, 25 slots", 2, 1, ANCHOR, 0, True, True),
        ],
    )
    px, py = 484 + COLUMN[0] - BOX_W / 2, 450 + 80 + 3 * LEVEL + 16
    d.text(px, py, "Reply 1 and turn 2 hang below prompt 1 as in panel 3.", 13, ink=GREY)
    d.text(px, py + 19, "C is shown no span: it shares the system prompt alone.", 13, ink=GREY)

    y = 850
    for x, colour, words in (
        (20, ANCHOR, "node of SGLang's tree"),
        (220, SPAN, "compressed span"),
        (390, RAW, "raw span: one slot per token"),
    ):
        d.box(x, y - 15, 24, 20, colour)
        d.text(x + 32, y, words)
    d.dot(635, y - 5)
    d.text(648, y, "held by a request")
    d.box(790, y - 15, 24, 20, (PAPER, INK), 2.8)
    d.text(822, y, "new in the panel")
    return d.svg("The life of a turn in the prefix tree")


PICTURES = {"row.svg": row, "tree.svg": tree}


def main() -> None:
    """Writes both."""
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw())
        print(FOLDER / name)


if __name__ == "__main__":
    main()
