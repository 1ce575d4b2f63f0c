"""Everything wrong that somebody has thought of saying, and the message for it: one table for each way in.

A message says what to do instead: SAYS_WHAT_TO_DO matches it. tests/start/test_refusals.py reads all tables without a
server; tests/server/test_hostile.py sends REQUESTS to one.
"""

from __future__ import annotations

import re
from typing import Any

SAYS_WHAT_TO_DO = re.compile(
    r"\b(use|leave out|write|join|name every|must be an object|start (it|the server)|known keys)\b|--\w+"
)
NAN, INF = float("nan"), float("inf")
HUGE = 10**5000  # Python reads no such number from text, so no client sends it as JSON; the Engine's may
FRACTION = r"use a fraction in \(0, 1\]"
RANGE = "is not a range; use start-end"
ENDS = "use an end that is larger than the start"
WHOLE = "is not a whole number; use a whole number from"
OUT = "is out of range; use"
MANY_RANGES = ",".join(f"{3 * i}-{3 * i + 1}" for i in range(65))

# custom_params["keepkv"] of a request to a server with the defaults of its window, interval and so on.
REQUESTS: list[tuple[Any, str]] = [
    ("keepkv", "must be an object"),
    (["x"], "must be an object"),
    (5, "must be an object"),
    (True, "must be an object"),
    ({"bugdet": 0.1}, "unknown key bugdet; known keys: enabled, budget"),
    ({"Budget": 0.2}, "unknown key Budget; known keys"),
    ({"budget ": 0.2}, "unknown key 'budget '; known keys"),
    ({"": 1}, "unknown key ''; known keys"),
    ({"x" * 10_000: 1}, "unknown key 'x"),
    ({f"k{i}": 1 for i in range(20_000)}, "and 19995 more"),
    ({"enabled": 1}, "not a boolean; use true or false"),
    ({"enabled": None}, "not a boolean"),
    ({"enabled": "yes"}, "not a boolean"),
    ({"budget": 0}, FRACTION),
    ({"budget": -1}, FRACTION),
    ({"budget": 1.5}, "neither a fraction nor a whole number"),
    ({"budget": 2.5}, "neither a fraction nor a whole number"),
    ({"budget": NAN}, FRACTION),
    ({"budget": INF}, FRACTION),
    ({"budget": True}, "not a number"),
    ({"budget": None}, "not a number"),
    ({"budget": "0.2"}, "not a number"),
    ({"budget": " 0.2 "}, "not a number"),
    ({"budget": "1_0"}, "not a number"),
    ({"budget": "\u0660.\u0662"}, "not a number"),
    ({"budget": [1]}, "a list is not a number"),
    ({"budget": {"a": 1}}, "an object is not a number"),
    ({"budget": 1 << 31}, "at most 1073741824"),
    ({"budget": 10**300}, OUT),
    ({"merge": 5}, "not a name; use one of"),
    ({"merge": ""}, "unknown merge rule ''; use one of"),
    ({"merge": "sum"}, "unknown merge rule 'sum'; use one of least_squares"),
    ({"merge": "a.b:c"}, "must not import code"),
    ({"scorer": ["snapkv"]}, "not a name"),
    ({"scorer": None}, "not a name"),
    ({"heads": 5}, "not a name"),
    ({"heads": "both"}, "use one of uniform, layer, all"),
    ({"heads": "package.module:function"}, "--keepkv-heads"),
    ({"scorer": "expected_attention_full"}, "unknown scorer"),
    ({"chunk": 0}, OUT),
    ({"chunk": 3}, "use one of 1, 2, 4"),
    ({"chunk": 1.0}, WHOLE),
    ({"window": 0}, OUT),
    ({"window": -1}, OUT),
    ({"window": 33}, "use at most 32, or start the server with --keepkv-request-keys window"),
    ({"window": "32"}, WHOLE),
    ({"window": 32.0}, WHOLE),
    ({"window": "9" * 5000}, WHOLE),
    ({"references": -1}, OUT),
    ({"references": 257}, "use at most"),
    ({"references": True}, WHOLE),
    ({"recent": -1}, OUT),
    ({"recent": 1 << 21}, OUT),
    ({"sinks": "4"}, WHOLE),
    ({"threshold": "0.5"}, "not a number; use a cosine similarity"),
    ({"threshold": True}, "not a number"),
    ({"threshold": 3}, OUT),
    ({"threshold": NAN}, OUT),
    ({"interval": 1}, OUT),
    ({"interval": 127}, "use at least 128"),
    ({"min_tokens": 2}, "use at least 64"),
    ({"min_tokens": 10**300}, "use a whole number from 2"),
    ({"span_tokens": 63}, r"use 0 \(turns stay whole\) or at least 64"),
    ({"span_tokens": 64}, "use 0"),
    ({"protect": "9-5"}, ENDS),
    ({"protect": "5-5"}, ENDS),
    ({"protect": "0-999999999"}, ENDS),
    ({"protect": "0-9999999999"}, RANGE),
    ({"protect": "0-9,5-12"}, "overlap; name every token once"),
    ({"protect": ["0-9"]}, "not text; use a text such as"),
    ({"protect": None}, "not text"),
    ({"protect": "-5"}, RANGE),
    ({"protect": "0\u20139"}, RANGE),
    ({"protect": "system:9"}, "or 'system' for the first message"),
    ({"protect": ","}, RANGE),
    ({"protect": "x" * 100_000}, RANGE),
    ({"protect": MANY_RANGES}, "use at most 64: join neighbours"),
    ({"fair": "first"}, RANGE),
    ({"fair": "system"}, "use protect for that"),
    ({"fair": 5}, "not text"),
    ({"fair": "0-9", "budget": 50}, "fair needs a budget that is a fraction"),
    ({"unpack": 2}, OUT),
    ({"unpack": "no"}, "use false, or a fraction of the KV pool"),
    ({"unpack": True}, "use false, or a fraction of the KV pool"),
    ({"unpack": 0.6}, "use at most 0.5"),
    ({"pressure": "merge"}, "start it with --keepkv-pressure instead"),
    ({"step_tokens": 64}, "start it with --keepkv-step-tokens instead"),
    ({"piece_tokens": 64}, "start it with --keepkv-piece-tokens instead"),
    ({"request_keys": "all", "host_ratio": 4}, "start it with --keepkv-host-ratio, --keepkv-request-keys instead"),
]

# Values that only a Python program can give: the Engine's sampling parameters.
PYTHON_REQUESTS: list[tuple[Any, str]] = [
    ({"min_tokens": HUGE}, "out of range"),
    ({"budget": HUGE}, "out of range"),
    ({"protect": HUGE}, "not text"),
    ({"budget": object()}, "a object is not a number"),
    ({1: 2}, "unknown key '1'"),
]

# Keyword arguments of the Engine and of KeepKVConfig.
CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    ({"enabled": "true"}, "use true or false"),
    ({"budget": None}, FRACTION),
    ({"window": None}, WHOLE),
    ({"merge": None}, "use one of"),
    ({"record": 5}, "is not a path"),
    ({"scorer": "os.path"}, "use one of"),
    ({"heads": "both"}, "use one of uniform, layer, all"),
    ({"pressure": "on"}, "use one of off, merge"),
    ({"pressure_free": 0.95}, OUT),
    ({"pressure_tokens": 63}, OUT),
    ({"step_tokens": 0}, OUT),
    ({"piece_tokens": -1}, OUT),
    ({"host_ratio": -1}, OUT),
    ({"host_ratio": NAN}, OUT),
    ({"host_size": "4GB"}, "not a number; use gigabytes"),
    ({"host_dtype": "fp8"}, "use one of auto, int8, int4"),
    ({"unpack_overflow": "drop"}, "use one of stream, view"),
    ({"configurations": 0}, OUT),
    ({"request_keys": "budget"}, "use all or some of merge"),
    ({"request_keys": ["window"]}, "use names such as"),
    ({"span_tokens": 100, "min_tokens": 200}, "use a larger span_tokens or 0"),
    ({"fair": "0-9", "budget": 100}, "leave out fair"),
]

# Arguments of launch_server beside --enable-keepkv.
COMMAND_LINES: list[tuple[tuple[str, ...], str]] = [
    (("--page-size", "16"), "--page-size 1"),
    (("--enable-hierarchical-cache",), "--enable-hierarchical-cache"),
    (("--disaggregation-mode", "decode"), "--disaggregation-mode"),
    (("--enable-streaming-session",), "--enable-streaming-session"),
    (("--attention-backend", "triton"), "--attention-backend triton"),
    (("--enable-deterministic-inference",), "leave out --enable-deterministic-inference"),
    (("--enable-torch-compile",), "leave out --enable-torch-compile"),
    (("--cuda-graph-backend-prefill", "full"), "--cuda-graph-backend-prefill breakable"),
    (("--kv-canary", "log"), "leave out --kv-canary"),
    (("--enable-lora",), "leave out --enable-lora"),
    (("--tokenizer-worker-num", "2"), "--tokenizer-worker-num 1"),
    (("--json-model-override-args", '{"layer_types": ["linear_attention"]}'), "linear_attention layers"),
    (("--preferred-sampling-params", '{"custom_params": {"keepkv": {"bugdet": 0.05}}}'), "unknown key bugdet"),
    (("--preferred-sampling-params", '{"custom_params": "keepkv"}'), "custom_params must be an object"),
    (("--enable-keepkv=true",), "write --enable-keepkv alone"),
    (("--keepkv-bugdet", "0.2"), "--keepkv-bugdet"),
    (("--keepkv-budget", "1.5"), "use a fraction"),
    (("--keepkv-budget", ""), "use a fraction"),
    (("--keepkv-budget", "nan"), "use a fraction"),
    (("--keepkv-merge", "sum"), "use one of least_squares"),
    (("--keepkv-scorer", "best"), "use one of snapkv"),
    (("--keepkv-heads", "both"), "use one of uniform"),
    (("--keepkv-window", "0"), "use a whole number from 1 to 256"),
    (("--keepkv-window", "1_0"), "use a whole number"),
    (("--keepkv-interval", "12.5"), "use a whole number"),
    (("--keepkv-span-tokens", "100", "--keepkv-min-tokens", "200"), "below min_tokens"),
    (("--keepkv-protect", "9-5"), ENDS),
    (("--keepkv-fair", "0-10", "--keepkv-budget", "100"), "fair needs a budget that is a fraction"),
    (("--keepkv-pressure", "on"), "use one of"),
    (("--keepkv-host-size", "4GB"), "use gigabytes"),
    (("--keepkv-host-dtype", "fp8"), "use one of"),
    (("--keepkv-unpack", "2"), "use false, or a fraction"),
    (("--keepkv-configurations", "0"), "use a whole number"),
    (("--keepkv-request-keys", "budget"), "use all or some of"),
]
