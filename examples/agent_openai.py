"""A tool-calling agent in several turns, with the official openai client, against a KeepKV server.

    python -m sglang.launch_server --model-path MODEL --tool-call-parser qwen25 --enable-keepkv
    python examples/agent_openai.py --base-url http://127.0.0.1:30000

The server's --tool-call-parser turns what the model writes into `tool_calls`; which one a model needs, and what a model
needs that has no tools in its chat template (the demo model): examples/README.md. Results go back as messages of the
role `tool`. The whole history is sent each time, and the server finds it, compressed, in its prefix cache.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from openai import OpenAI
from workshop import QUESTIONS, SYSTEM, run_tool

PART = {"type": "string", "enum": ["brake pad", "chain", "tube 28", "cassette"]}


def function(name: str, description: str, **properties: dict[str, Any]) -> dict[str, Any]:
    """A tool as the API wants it. strict: where a call is forced, its arguments follow the schema to the letter."""
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": schema, "strict": True},
    }


TOOLS: Any = [
    function("orders", "open repair orders of the next days", days={"type": "integer", "minimum": 1, "maximum": 7}),
    function("stock", "pieces of a part on each shelf, and its reorder level", part=PART),
    function("suppliers", "price, delivery time and minimum order of each supplier of a part", part=PART),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="A tool-calling agent on a KeepKV server.")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="the server, without /v1")
    parser.add_argument("--model", default="default", help="model name to send")
    parser.add_argument("--budget", type=float, default=0.2, help="KeepKV budget of these requests")
    parser.add_argument("--tool-choice", choices=("auto", "required"), default="auto", help="required: must call one")
    parser.add_argument("--questions", type=int, default=2, help="how many turns the user has")
    parser.add_argument("--steps", type=int, default=3, help="requests with tools for each question at most")
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url.rstrip("/") + "/v1", api_key="none", timeout=600)
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    for question in QUESTIONS[: args.questions]:
        messages.append({"role": "user", "content": question})
        print(f"user: {question}")
        for step in range(args.steps + 1):
            answer = client.chat.completions.create(
                model=args.model,
                messages=messages,
                tools=TOOLS,
                # Never "none" or a name: SGLang takes the other tools out of the prompt, and a prompt that begins
                # differently finds nothing in the cache.
                tool_choice=args.tool_choice if step < args.steps else "auto",
                temperature=0,
                max_tokens=args.max_tokens,
                extra_body={
                    # These requests' own settings: their budget, and tools and rules bit for bit.
                    "custom_params": {"keepkv": {"budget": args.budget, "protect": "system"}},
                    "return_meta_info": True,  # SGLang: meta_info beside the message
                },
            )
            reply: Any = answer.choices[0]
            print(f"  prompt {answer.usage.prompt_tokens} keepkv {json.dumps(reply.meta_info['keepkv'])}")
            calls = reply.message.tool_calls or []
            messages.append({"role": "assistant", "content": reply.message.content or ""})
            if not calls:
                print(f"  answer: {' '.join((reply.message.content or '').split())[:100]}")
                break
            messages[-1]["tool_calls"] = [call.model_dump() for call in calls]
            for call in calls:
                print(f"  tool: {call.function.name} {call.function.arguments}")
                result = run_tool(call.function.name, call.function.arguments)
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


if __name__ == "__main__":
    main()
