"""What is said in `keepkv demo`: an agent's system prompt, tool results as user turns, a question about the second."""

from __future__ import annotations

SYSTEM = """\
You are Harbor, the on-call assistant of the payments platform team. You investigate incidents together \
with an engineer. You work step by step: look at one source, say what it shows, then choose the next one. \
You never change anything in production yourself.

Tools. To use one, answer with a single JSON object on one line and nothing else:
- query_metrics {"service": str, "metric": str, "minutes": int}: a time series, one row per minute. Metrics: \
requests, error_rate, p50_ms, p99_ms, cpu, memory_mb, db_pool_in_use, db_pool_waiting.
- search_logs {"service": str, "query": str, "limit": int}: the newest matching log lines, newest last.
- list_changes {"hours": int}: deployments, feature flags and configuration changes of all services.
- db_activity {"cluster": str}: the longest running statements, their state and what they wait for.
- read_runbook {"name": str}: a page of the runbook.

Example: {"tool": "query_metrics", "arguments": {"service": "checkout", "metric": "p99_ms", "minutes": 15}}

Rules:
1. Quote numbers and identifiers exactly as a tool returned them. Never invent a metric, a host or a commit.
2. Keep every answer under three sentences. Say first what is known, then what to look at next.
3. A cause needs evidence from two sources that agree in time. Until then call it a suspicion.
4. Customer data is confidential: never repeat card numbers, e-mail addresses or names from logs.
5. A rollback is proposed to the engineer with the exact version to go back to, and is theirs to decide.

Services: gateway (public API), checkout (orders, owns cluster orders-db), ledger (double-entry \
bookkeeping, owns ledger-db), notifier (mail and push), fraud (scoring, calls an outside provider). \
Checkout calls fraud and ledger in the request path, and notifier through a queue. Times are UTC."""

TURNS = (
    """\
The pager went off. What do you make of this alert, and where do you look first?

{"alert": "CheckoutErrorBudgetBurn", "severity": "page", "fired_at": "2026-03-11T14:22:40Z",
 "service": "checkout", "region": "eu-west-1", "slo": "99.9 % of POST /v2/orders below 800 ms",
 "burn_rate": {"5m": 31.4, "1h": 6.2}, "budget_left": "61 %",
 "labels": {"team": "payments", "tier": "1", "runbook": "checkout-latency"},
 "samples": [
  {"at": "14:19", "requests": 8123, "errors": 41, "p99_ms": 940},
  {"at": "14:20", "requests": 8077, "errors": 212, "p99_ms": 2810},
  {"at": "14:21", "requests": 7904, "errors": 655, "p99_ms": 5020},
  {"at": "14:22", "requests": 7411, "errors": 901, "p99_ms": 5030}]}""",
    """\
Tool result of query_metrics {"service": "checkout", "metric": "*", "minutes": 10}:

time   requests  error_rate  p50_ms  p99_ms  cpu   db_pool_in_use  db_pool_waiting
14:13      8210       0.001      84     412  0.41              22                0
14:14      8188       0.001      83     405  0.41              21                0
14:15      8240       0.001      86     431  0.42              24                0
14:16      8201       0.001      88     455  0.42              27                0
14:17      8176       0.002      97     590  0.41              38                0
14:18      8150       0.003     121     733  0.40              49                2
14:19      8123       0.005     188     940  0.38              60               37
14:20      8077       0.026     410    2810  0.33              60              188
14:21      7904       0.083     977    5020  0.27              60              402
14:22      7411       0.122    1460    5030  0.22              60              611

The pool limit is 60 connections per host. What does this tell us?""",
    """\
Tool result of search_logs {"service": "checkout", "query": "level>=WARN", "limit": 9}:

14:18:07 WARN  checkout-7f9c-2xkqp pool orders-db: acquire took 214 ms (in use 52, idle 8)
14:18:51 WARN  checkout-7f9c-9dz4m pool orders-db: acquire took 655 ms (in use 60, idle 0)
14:19:22 WARN  checkout-7f9c-2xkqp slow statement 1873 ms: SELECT * FROM order_items WHERE voucher_code = $1
14:19:48 WARN  checkout-7f9c-lw8rt slow statement 2240 ms: SELECT * FROM order_items WHERE voucher_code = $1
14:20:15 ERROR checkout-7f9c-9dz4m POST /v2/orders 503 in 5001 ms: pool orders-db: timeout after 5000 ms
14:20:16 ERROR checkout-7f9c-2xkqp POST /v2/orders 503 in 5002 ms: pool orders-db: timeout after 5000 ms
14:20:58 WARN  checkout-7f9c-lw8rt slow statement 3115 ms: SELECT * FROM order_items WHERE voucher_code = $1
14:21:30 ERROR checkout-7f9c-lw8rt POST /v2/orders 503 in 5001 ms: pool orders-db: timeout after 5000 ms
14:21:44 WARN  checkout-7f9c-9dz4m slow statement 3920 ms: SELECT * FROM order_items WHERE voucher_code = $1

Which statement holds the connections?""",
    """\
Tool result of list_changes {"hours": 6}:

[{"at": "09:02", "kind": "deploy", "service": "notifier", "version": "5.4.1", "by": "release-bot"},
 {"at": "11:37", "kind": "config", "service": "gateway", "key": "rate_limit.partner", "from": 200, "to": 250},
 {"at": "12:15", "kind": "deploy", "service": "ledger", "version": "3.18.0", "commit": "b41d7e0"},
 {"at": "13:48", "kind": "deploy", "service": "checkout", "version": "8.31.0", "commit": "e07c2aa",
  "previous": "8.30.2", "notes": "voucher rules: look up earlier redemptions by code"},
 {"at": "14:15", "kind": "flag", "service": "checkout", "flag": "voucher_rules_v2",
  "from": "5 %", "to": "100 %"},
 {"at": "14:16", "kind": "mail", "service": "notifier", "campaign": "SPRING11", "recipients": 412000}]

What changed shortly before 14:17, and does it fit the logs?""",
    """\
Tool result of db_activity {"cluster": "orders-db"}:

  pid  state   seconds  wait           statement
40112  active     4.41  IO:DataRead    SELECT * FROM order_items WHERE voucher_code = $1
40127  active     4.02  IO:DataRead    SELECT * FROM order_items WHERE voucher_code = $1
40131  active     3.77  IO:DataRead    SELECT * FROM order_items WHERE voucher_code = $1
40090  active     3.30  IO:DataRead    SELECT * FROM order_items WHERE voucher_code = $1
40145  active     0.02  -              INSERT INTO orders (id, account, total) VALUES ($1, $2, $3)

EXPLAIN: Seq Scan on order_items (rows=48120344), Filter: (voucher_code = $1), Rows Removed: 48120291
Indexes on order_items: order_items_pkey (id), order_items_order_id_idx (order_id)

Is a cause proved now? Name both sources.""",
    """\
Flag voucher_rules_v2 was set back to 5 % at 14:29. Tool result of query_metrics, the last minutes:

time   requests  error_rate  p99_ms  db_pool_in_use  db_pool_waiting
14:28      7020       0.131    5030              60              644
14:29      7388       0.090    4410              60              305
14:30      7951       0.012     980              41                4
14:31      8165       0.001     421              24                0
14:32      8204       0.001     409              22                0

Write the closing note for the incident channel: what happened, when, which change, what next.""",
)

# Chosen by looking: of sixteen questions about earlier turns the demo model answers three with the full cache, this one
# with originals, none without.
QUESTION, ANSWER = "What is the pool limit per host?", "60"
ASKED_FROM = 3  # turns from which on it is about something long gone
