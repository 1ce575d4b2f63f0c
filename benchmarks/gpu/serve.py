"""One server, asked what a first server on a new kind of machine should be asked; all answers in OUT/NAME.json.

    python -m benchmarks.gpu.serve [--out OUT] NAME FLAGS...     FLAGS: of sglang.launch_server

A conversation of five turns with replies of one token, the twenty most probable tokens of each: with native originals
in float32 they are those of stock SGLang, turn by turn, to 1e-4 (--compare ORIGINALS.json STOCK.json). The same
without unpacking, where originals are on. Six requests at once. Then KeepKV's part of
/server_info, whose accounting must be whole.
SGLang's strict memory checks and ours are on. Exit status 0 when the server answered everything and lives.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.server_process import ServerProcess
from tests.support.client import STRICT, generate, numbers

TURNS, FIRST, LATER, TOP = 5, 600, 350, 20
_random = random.Random(5)
TEXT = [_random.randrange(1000, 40000) for _ in range(4000)]
REPLIES = [7000 + turn for turn in range(TURNS)]  # the same for all servers, whatever they say


def ask(server: ServerProcess, ids: list[int], new: int, **keepkv: Any) -> dict[str, Any]:
    """Tokens, log-probabilities and KeepKV's numbers of one greedy answer. AssertionError unless it is HTTP 200."""
    began = time.perf_counter()
    answer = generate(server, ids, new, keepkv or None, top_logprobs_num=TOP)
    return {
        "ids": answer.ids,
        "top": [(token, logprob) for logprob, token, _ in answer.meta["output_top_logprobs"][0]],
        "cached": answer.cached,
        "keepkv": answer.keepkv,
        "seconds": time.perf_counter() - began,
    }


def conversation(server: ServerProcess, **keepkv: Any) -> list[dict[str, Any]]:
    prompt: list[int] = []
    answers = []
    for turn in range(TURNS):
        prompt = prompt + TEXT[500 * turn : 500 * turn + (LATER if turn else FIRST)]
        answers.append(ask(server, prompt, 1, **keepkv))
        prompt = [*prompt, REPLIES[turn]]
    return answers


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference in log-probability over the five most probable tokens of the other."""
    first, second = dict(one["top"]), dict(other["top"])
    least = min(first.values())
    return max(abs(first.get(token, least) - second[token]) for token in sorted(second, key=second.get)[-5:])


def run(name: str, flags: list[str], out: Path, found: dict[str, Any]) -> None:
    began = time.perf_counter()
    command = ["--log-level", "info", *flags]
    with ServerProcess(command, timeout_s=280, log_path=out / f"{name}.log", env=STRICT) as server:
        found["seconds to start"] = time.perf_counter() - began
        found["conversation"] = conversation(server)
        if any(flag.startswith("--keepkv-host") for flag in flags):
            server.post_json("/flush_cache", {})
            found["read compressed"] = conversation(server, unpack=False)
        server.post_json("/flush_cache", {})
        began = time.perf_counter()
        with ThreadPoolExecutor(6) as pool:
            found["six"] = list(pool.map(lambda i: ask(server, TEXT[100 * i : 100 * i + 700], 40), range(6)))
        found["seconds of six"] = time.perf_counter() - began
        if "--enable-keepkv" in flags:
            found["state"] = numbers(server)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar="FILE", help="print how far two conversations are apart"
    )
    parser.add_argument("name", nargs="?")
    args, flags = parser.parse_known_args()
    if args.compare:
        one, other = (json.loads(path.read_text())["conversation"] for path in args.compare)
        print([round(apart(a, b), 6) for a, b in zip(one, other, strict=True)])
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"name": args.name, "flags": flags}
    try:
        run(args.name, flags, args.out, found)
    except Exception as error:  # whatever it is: what was found so far is what was paid for
        found["failed"] = repr(error)[-3000:]
    (args.out / f"{args.name}.json").write_text(json.dumps(found, indent=1))
    said = {key: value for key, value in found.items() if isinstance(value, float) or key == "failed"}
    print(args.name, json.dumps(said), flush=True)
    for key in ("conversation", "read compressed"):
        for answer in found.get(key, []):
            keepkv = answer["keepkv"] or {}
            numbers = answer["cached"], keepkv.get("slots_held"), keepkv.get("unpacked_tokens")
            print(f"{args.name} {key}: cached, slots, unpacked {numbers}, {answer['seconds']:.2f} s")
    return 1 if "failed" in found else 0


if __name__ == "__main__":
    raise SystemExit(main())
