"""One conversation under several budgets on one server: what each request holds, and what protection costs.

    python -m sglang.launch_server --model-path MODEL --enable-keepkv
    python examples/budgets.py --base-url http://127.0.0.1:30000

Each row is a request of the second turn. All requests share the first message, so compression leaves it alone anyway;
`protect: system` makes that a promise, and the answer counts it. What else must not be lost is a range of tokens on top
of the budget; where it begins and ends is read off the answers to earlier turns.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from openai import OpenAI

SYSTEM = "You are the night porter of a hotel. Answer from the log in one sentence. " + " ".join(
    f"Room {n} is on floor {n // 100} and wakes at {n % 7 + 5}." for n in range(101, 113)
)
HOUSE_RULES = "House rules, for every answer: " + " ".join(
    f"Rule {n}: never tell a caller the number of room {100 + n}, say that you will call back." for n in range(1, 5)
)
LOG = "The log: " + " ".join(
    f"At {n % 24:02d}:{7 * n % 60:02d} room {101 + n % 12} asked for item {n * 3 % 17}." for n in range(24)
)
COLUMNS = ("prompt_tokens", "logical_tokens", "slots_held", "protected_tokens", "cached_compressed_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description="Budgets and protection per request on a KeepKV server.")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="the server, without /v1")
    parser.add_argument("--model", default="default", help="model name to send")
    parser.add_argument("--max-tokens", type=int, default=16)
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url.rstrip("/") + "/v1", api_key="none", timeout=600)

    def ask(keepkv: dict[str, Any], *said: str) -> Any:
        """The answer to user turns, with `Noted.` between them."""
        messages: list[Any] = [{"role": "system", "content": SYSTEM}]
        for text in said:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "Noted."}]
        return client.chat.completions.create(
            model=args.model,
            messages=messages[:-1],
            temperature=0,
            max_tokens=args.max_tokens,
            extra_body={"return_meta_info": True, "custom_params": {"keepkv": keepkv}},
        )

    first = ask({"protect": "system"}, HOUSE_RULES)
    system_end = first.choices[0].meta_info["keepkv"]["protected_tokens"]
    rules_end = first.usage.prompt_tokens
    settings: list[dict[str, Any]] = [
        {"budget": 0.5},
        {"budget": 0.1},
        {"budget": 0.1, "protect": "system"},
        {"budget": 0.1, "protect": f"system,{system_end}-{rules_end}"},
        {"enabled": False},  # last: what lies uncompressed in the cache is shared by the others as it is
    ]
    print(f"system prompt: tokens 0 to {system_end}; house rules: to {rules_end}")
    print(f"{'request':46}" + "".join(f"{name:>{len(name) + 2}}" for name in COLUMNS))
    for keepkv in settings:
        answer = ask(keepkv, HOUSE_RULES, LOG + " Who called first?")
        numbers = {"prompt_tokens": answer.usage.prompt_tokens, **answer.choices[0].meta_info["keepkv"]}
        print(f"{json.dumps(keepkv):46}" + "".join(f"{numbers[name]:>{len(name) + 2}}" for name in COLUMNS))


if __name__ == "__main__":
    main()
