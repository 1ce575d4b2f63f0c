"""A tool-calling agent in several turns, with the official openai client, against a KeepKV server.

    python -m sglang.launch_server --model-path MODEL --enable-keepkv --keepkv-budget 0.2
    python examples/agent_openai.py --base-url http://127.0.0.1:30000

Each step the model may answer with a JSON tool call. A model as small as the demo's rarely makes a good one,
so a scripted call is the fallback, and every line printed says which of the two it was. Tool results go back
as user turns: the whole history is sent each time, and the server finds it, compressed, in its prefix cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from openai import OpenAI

SYSTEM = """You are the stock assistant of a bicycle workshop. Answer in one or two sentences. To use a tool,
answer with one JSON object on one line and nothing else, for example
{"tool": "stock", "arguments": {"part": "chain"}}
Tools:
- stock {"part": str}: how many pieces are on which shelf, and the reorder level.
- orders {"days": int}: open repair orders of the next days, with the parts they need.
- suppliers {"part": str}: price, delivery time and minimum order of each supplier.
Rules: quote numbers exactly as a tool returned them, never invent a part, propose an order only when the
stock falls below the reorder level, and name the supplier with the lowest price that delivers in time."""

QUESTION = "Which part runs out first this week, and what should we order?"


def stock(part: str = "brake pad") -> Any:
    """Tool: pieces per shelf."""
    shelves = [{"shelf": f"{row}{n}", "part": part, "pieces": 3 * n % 5} for row in "AB" for n in range(1, 5)]
    return {"part": part, "total": sum(s["pieces"] for s in shelves), "reorder_level": 20, "shelves": shelves}


def orders(days: int = 5) -> Any:
    """Tool: repair orders with the parts they need."""
    parts = ("brake pad", "chain", "tube 28", "brake pad", "cassette")
    return [
        {
            "order": 4100 + n,
            "day": n % 5 + 1,
            "bike": f"city {n}",
            "needs": [{"part": parts[n % 5], "pieces": 2}],
        }
        for n in range(min(int(days), 7) * 2)
    ]


def suppliers(part: str = "brake pad") -> Any:
    """Tool: who sells a part."""
    names = ("Nord Parts", "Velo Sud", "Spoke & Co", "Ritzel AG")
    return [
        {
            "supplier": name,
            "part": part,
            "price": 4.2 + 0.35 * n,
            "delivery_days": 4 - n,
            "minimum": 5 * (n + 1),
        }
        for n, name in enumerate(names)
    ]


TOOLS: dict[str, Callable[..., Any]] = {"stock": stock, "orders": orders, "suppliers": suppliers}
FALLBACK: list[tuple[str, dict[str, Any]]] = [
    ("orders", {"days": 5}),
    ("stock", {"part": "brake pad"}),
    ("suppliers", {"part": "brake pad"}),
]


def tool_call(reply: str) -> tuple[str, dict[str, Any]] | None:
    """The tool and arguments of a reply that holds one JSON tool call with a known name; otherwise None."""
    start, end = reply.find("{"), reply.rfind("}")
    try:
        call = json.loads(reply[start : end + 1])
        name, arguments = call["tool"], call.get("arguments", {})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return (name, arguments) if name in TOOLS and isinstance(arguments, dict) else None


def run_tool(name: str, arguments: dict[str, Any]) -> str:
    """The result as text for the next user turn; a wrong argument is told to the model, not raised."""
    try:
        result = TOOLS[name](**arguments)
    except (TypeError, ValueError) as error:
        result = {"error": str(error)}
    return f"Result of {name} {json.dumps(arguments)}:\n{json.dumps(result)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="A tool-calling agent on a KeepKV server.")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="the server, without /v1")
    parser.add_argument("--model", default="default", help="model name to send")
    parser.add_argument("--budget", type=float, default=0.2, help="KeepKV budget of these requests")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url.rstrip("/") + "/v1", api_key="none", timeout=600)
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    for turn in range(1, args.turns + 1):
        answer = client.chat.completions.create(
            model=args.model,
            messages=messages,
            temperature=0,
            max_tokens=args.max_tokens,
            extra_body={
                "custom_params": {"keepkv": {"budget": args.budget}},  # this request's own settings
                "return_meta_info": True,  # SGLang: meta_info beside the message
            },
        )
        choice: Any = answer.choices[0]
        reply = choice.message.content or ""
        print(f"turn {turn} keepkv {json.dumps(choice.meta_info['keepkv'])}")
        print(f"  reply: {' '.join(reply.split())[:100]}")
        messages.append({"role": "assistant", "content": reply})
        if turn < args.turns:
            call = tool_call(reply)
            name, arguments = call or FALLBACK[(turn - 1) % len(FALLBACK)]
            print(f"  tool:  {name} {json.dumps(arguments)} ({'called by the model' if call else 'scripted'})")
            messages.append({"role": "user", "content": run_tool(name, arguments)})


if __name__ == "__main__":
    main()
