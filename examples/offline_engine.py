"""Offline batch with sgl.Engine: no server, each request with its own KeepKV budget.

python examples/offline_engine.py --model MODEL
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import sglang as sgl

TEXT = " ".join(
    f"On day {day} the {bird} was seen {count} times near the {place}, mostly in the {hour}."
    for day, (bird, count, place, hour) in enumerate(
        [
            ("heron", 4, "upper lake", "morning"),
            ("kingfisher", 1, "old bridge", "late afternoon"),
            ("lapwing", 17, "wet meadow", "evening"),
            ("black kite", 2, "quarry", "hot hours"),
        ]
        * 4,
        start=1,
    )
)
# None: the engine's own budget. A whole number from 2 up counts KV slots.
REQUESTS: list[dict[str, Any] | None] = [
    None,
    {"enabled": False},
    {"budget": 0.5},
    {"budget": 64, "merge": "tangent"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description="sgl.Engine with a KeepKV budget per request.")
    parser.add_argument("--model", required=True, help="model folder; `keepkv model` prints the demo model's")
    parser.add_argument("--budget", type=float, default=0.2, help="budget of requests that do not ask for one")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    engine = sgl.Engine(
        model_path=args.model,
        enable_keepkv=True,
        keepkv_budget=args.budget,
        max_total_tokens=8000,
        log_level="error",
    )
    try:
        prompts = [f"Field notes {n}. {TEXT}\nSummary of the notes:" for n in range(len(REQUESTS))]
        params = [
            {
                "temperature": 0,
                "max_new_tokens": args.max_tokens,
                "custom_params": None if keepkv is None else {"keepkv": keepkv},
            }
            for keepkv in REQUESTS
        ]
        for keepkv, out in zip(REQUESTS, engine.generate(prompts, params), strict=True):
            print(f"request {json.dumps(keepkv)} keepkv {json.dumps(out['meta_info']['keepkv'])}")
            print(f"  {' '.join(out['text'].split())[:100]}")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the engine starts its workers with spawn: they import this file again
    main()
