"""The same agent with LangChain, unchanged: only base_url says where KeepKV is.

    pip install langchain-openai==1.1.9    # in SGLang's environment: newer ones replace the openai that SGLang pins
    python examples/agent_langchain.py --base-url http://127.0.0.1:30000

Settings per request go through `extra_body`; leave it out, and the server's flags apply. LangChain drops meta_info: the
numbers are asked for by the answer's id.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from typing import Any

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from workshop import QUESTIONS, SYSTEM, TOOLS

tools = {name: tool(function) for name, function in TOOLS.items()}  # schemas from signatures and docstrings


def numbers(base_url: str, answer: Any) -> dict[str, Any]:
    """What KeepKV says of one of the last 1,024 answers."""
    with urllib.request.urlopen(f"{base_url}/keepkv/requests/{answer.response_metadata['id']}", timeout=60) as reply:
        return json.load(reply)


def main() -> None:
    parser = argparse.ArgumentParser(description="A LangChain agent on a KeepKV server.")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="the server, without /v1")
    parser.add_argument("--model", default="default", help="model name to send")
    parser.add_argument("--budget", type=float, help="KeepKV budget of these requests; else the server's")
    parser.add_argument("--tool-choice", choices=("auto", "required"), default="auto", help="required: must call one")
    parser.add_argument("--questions", type=int, default=2, help="how many turns the user has")
    parser.add_argument("--steps", type=int, default=3, help="requests with tools for each question at most")
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()

    base_url = args.base_url.rstrip("/")
    model = ChatOpenAI(
        base_url=f"{base_url}/v1",
        api_key="none",
        model=args.model,
        temperature=0,
        max_tokens=args.max_tokens,
        extra_body=None if args.budget is None else {"custom_params": {"keepkv": {"budget": args.budget}}},
    )
    agent = {  # not "none": SGLang would take the tools out of the prompt, and nothing cached would be found
        choice: model.bind_tools(list(tools.values()), tool_choice=choice, strict=True)
        for choice in {args.tool_choice, "auto"}
    }
    messages: list[Any] = [SystemMessage(SYSTEM)]
    for question in QUESTIONS[: args.questions]:
        messages.append(HumanMessage(question))
        print(f"user: {question}")
        for step in range(args.steps + 1):
            answer = agent[args.tool_choice if step < args.steps else "auto"].invoke(messages)
            messages.append(answer)
            print(f"  keepkv {json.dumps(numbers(base_url, answer))}")
            if not answer.tool_calls:
                print(f"  answer: {' '.join(str(answer.content).split())[:100]}")
                break
            for call in answer.tool_calls:
                print(f"  tool: {call['name']} {json.dumps(call['args'])}")
                messages.append(tools[call["name"]].invoke(call))  # a ToolMessage


if __name__ == "__main__":
    main()
