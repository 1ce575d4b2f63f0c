"""An SGLang frontend program on a KeepKV server: one long shared prefix, forked into several questions, and one choice.

    python -m sglang.launch_server --model-path MODEL --enable-keepkv --keepkv-budget 0.2
    python examples/frontend_program.py --base-url http://127.0.0.1:30000

`fork` first sends the shared prefix alone; the server computes and compresses it once, and every branch then
finds it in the prefix cache. `select` compares the log-probabilities of its choices behind the same compressed prefix.
sgl.gen and sgl.select have no field for custom_params: the server's --keepkv flags apply.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import sglang as sgl
from sglang.lang.chat_template import get_chat_template

ENTRIES = (
    "the night shift moved pallet {n} from gate {gate} to aisle {aisle}, scale reading {kg} kg, no damage",
    "forklift {gate} asked for service after {kg} hours, battery replaced, back in aisle {aisle}",
    "delivery {n} arrived {gate} minutes late with {kg} boxes, signed for and stored in aisle {aisle}",
)
REPORT = "\n".join(
    f"{6 + n // 4:02d}:{15 * (n % 4):02d} "
    + ENTRIES[n % 3].format(n=700 + n, gate=n % 5 + 1, aisle=n % 9, kg=80 + 7 * n)
    for n in range(16)
)
GATES = tuple(str(gate) for gate in range(1, 6))
QUESTIONS = ("Which gate was busiest?", "What happened to the forklifts?", "Which delivery was late?")


@sgl.function
def review(s: Any, report: str, questions: tuple[str, ...], gates: tuple[str, ...], max_tokens: int) -> None:
    """One branch per question, then a choice among gates; all share the system prompt and the report."""
    s += sgl.system("You answer questions about a warehouse log in one sentence, with the time of the entry.")
    s += sgl.user_begin() + f"The log of today:\n{report}\n"
    s.sync()  # fork sends the prefix ahead only when its text is there, and += works in the background
    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += question + sgl.user_end()
        branch += sgl.assistant_begin() + sgl.gen("answer", max_tokens=max_tokens, temperature=0)
    branches.join()
    s["answers"] = [(b["answer"], b.get_meta_info("answer")) for b in branches]
    s += "At which gate was forklift service asked for?" + sgl.user_end()
    s += sgl.assistant_begin() + "At gate " + sgl.select("gate", choices=list(gates))


def main() -> None:
    parser = argparse.ArgumentParser(description="Fork and gen over a shared prefix on a KeepKV server.")
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument("--chat-template", default="chatml", help="SGLang's name of the model's chat template")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    backend = sgl.RuntimeEndpoint(args.base_url)
    backend.chat_template = get_chat_template(args.chat_template)
    state = review.run(report=REPORT, questions=QUESTIONS, gates=GATES, max_tokens=args.max_tokens, backend=backend)
    for question, (answer, meta_info) in zip(QUESTIONS, state["answers"], strict=True):
        print(f"{question} keepkv {json.dumps(meta_info['keepkv'])}")
        print(f"  {' '.join(answer.split())[:100]}")
    scores = state.get_meta_info("gate")["normalized_prompt_logprobs"]  # mean log-probability per token of each choice
    print(f"gate {state['gate']} of {json.dumps(dict(zip(GATES, scores, strict=True)))}")


if __name__ == "__main__":
    main()
