"""What the two agents share: their system prompt, the questions of a user, and three tools of a bicycle workshop."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

SYSTEM = """You are the stock assistant of a bicycle workshop. Answer in one or two sentences.
Rules: look things up with the tools, quote numbers exactly as a tool returned them, never invent a part, propose an
order only when the stock falls below the reorder level, and name the supplier with the lowest price that delivers
in time."""
QUESTIONS = ("Which part runs out first this week, and how many are left?", "Who sells it for the lowest price?")

Part = Literal["brake pad", "chain", "tube 28", "cassette"]
Days = Annotated[int, Field(ge=1, le=7)]


def stock(part: Part) -> Any:
    """Pieces of a part on each shelf, and its reorder level."""
    shelves = [{"shelf": f"{row}{n}", "part": part, "pieces": 3 * n % 5} for row in "AB" for n in range(1, 5)]
    return {"part": part, "total": sum(s["pieces"] for s in shelves), "reorder_level": 20, "shelves": shelves}


def orders(days: Days) -> Any:
    """Open repair orders of the next days, with the parts they need."""
    parts = ("brake pad", "chain", "tube 28", "brake pad", "cassette")
    return [
        {"order": 4100 + n, "day": n % 5 + 1, "bike": f"city {n}", "needs": [{"part": parts[n % 5], "pieces": 2}]}
        for n in range(2 * days)
    ]


def suppliers(part: Part) -> Any:
    """Price, delivery time and minimum order of each supplier of a part."""
    names = ("Nord Parts", "Velo Sud", "Spoke & Co", "Ritzel AG")
    return [
        {"supplier": name, "part": part, "price": 4.2 + 0.35 * n, "delivery_days": 4 - n, "minimum": 5 * (n + 1)}
        for n, name in enumerate(names)
    ]


TOOLS: dict[str, Callable[..., Any]] = {tool.__name__: tool for tool in (stock, orders, suppliers)}


def run_tool(name: str, arguments: str) -> str:
    """The result as JSON; a wrong name or argument is told to the model, not raised."""
    try:
        return json.dumps(TOOLS[name](**json.loads(arguments)))
    except (KeyError, TypeError, ValueError) as error:
        return json.dumps({"error": f"{type(error).__name__}: {error}"})
