"""/metrics of a server that keeps originals: several conversations at once, some of them off, add up with what their
answers say; and `keepkv top` shows the same server."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest

from keepkv_sglang.observe.families import NAMES, VOTES
from tests.support.client import Answer, flush, generate, numbers, tokens
from tests.support.scrape import SGLANG, Scrape
from tests.support.terminal import Terminal

pytestmark = pytest.mark.server
KINDS = (None, {"budget": 0.1}, {"enabled": False}, {"budget": 1}, {"unpack": 0})
TURNS = 2
TOP = (sys.executable, "-m", "keepkv_sglang.cli", "top")


@pytest.fixture(scope="module")
def server(launch):
    return launch(
        *("--enable-keepkv", "--keepkv-budget", "0.2", "--keepkv-interval", "16", "--max-total-tokens", "4000"),
        *("--keepkv-host-ratio", "1", "--enable-metrics", "--enable-cache-report", "--log-level", "debug"),
    )


@dataclass
class Talk:
    """All answers, /metrics before the first and behind the last, and what `keepkv top` showed meanwhile."""

    answers: list[Answer]
    before: Scrape
    after: Scrape
    screen: str

    def new(self, name: str) -> float:
        return self.after[name] - self.before[name]

    def said(self, key: str) -> float:
        return sum(answer.keepkv[key] for answer in self.answers)


@pytest.fixture(scope="module")
def talk(server) -> Talk:
    """Conversations at once. Each scrapes when it has an answer: what was said by then is in there already."""
    before = Scrape(server.base_url)
    answers: list[Answer] = []
    late: list[str] = []
    lock = threading.Lock()

    def converse(seed: int, keepkv) -> None:
        history = tokens(200, seed)
        for turn in range(TURNS):
            answer = generate(server, history, 20, keepkv)
            with lock:
                answers.append(answer)
                known = sum(one.keepkv["logical_tokens"] for one in answers)
            if Scrape(server.base_url)["keepkv:logical_tokens_total"] < known:
                late.append(f"conversation {seed}, turn {turn}")
            history = history + answer.ids + tokens(100, 100 * seed + turn)

    threads = [threading.Thread(target=converse, args=(seed, kind)) for seed, kind in enumerate(KINDS)]
    with Terminal([*TOP, server.base_url, "--every", "0.3"]) as top:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        top.wait_for("rates over")
        top.wait_for(f"{len(KINDS) * TURNS + 1}: ")  # all of them have ended, and SGLang's own request at its start
        assert top.type("q") == 0
    assert not late and len(answers) == TURNS * len(KINDS)
    return Talk(answers, before, Scrape(server.base_url), top.screen)


def test_every_metric_is_there_with_sglangs_labels(server):
    scrape = Scrape(server.base_url)
    theirs = scrape.labels("sglang:num_running_reqs")[0]
    for name in NAMES:
        sample = f"{name}_count" if name.endswith("compression_seconds") else name
        assert scrape.labels(sample), name
        for labels in scrape.labels(sample):
            assert {key: labels[key] for key in SGLANG} == {key: theirs[key] for key in SGLANG}


def test_what_the_answers_say_adds_up(talk):
    infos = [answer.keepkv for answer in talk.answers]
    compressed = sum(info["slots_held"] < info["logical_tokens"] for info in infos)
    off = sum(not info["enabled"] for info in infos)
    assert off == 2 * TURNS and compressed >= 3
    results = talk.after.by("keepkv:requests_total", "result")
    for result, count in talk.before.by("keepkv:requests_total", "result").items():
        results[result] -= count
    assert results == {"compressed": compressed, "off": off, "whole": len(infos) - compressed - off}
    assert talk.new("keepkv:logical_tokens_total") == talk.said("logical_tokens")
    assert talk.new("keepkv:saved_slots_total") == talk.said("logical_tokens") - talk.said("slots_held") > 0
    assert talk.new("keepkv:hit_tokens_total") == talk.said("cached_compressed_tokens") > 0
    assert talk.new("keepkv:unpacked_tokens_total") == talk.said("unpacked_tokens") > 0
    assert talk.new("keepkv:compression_seconds_count") == talk.said("compressions") > 0
    assert round(talk.new("keepkv:merged_tokens_total"), 2) == round(talk.said("merged"), 2) > 0
    assert round(talk.new("keepkv:dropped_tokens_total"), 2) == round(talk.said("dropped"), 2)
    assert talk.new("keepkv:prompt_tokens_total") == sum(answer.meta["prompt_tokens"] for answer in talk.answers)
    assert talk.new("keepkv:cached_tokens_total") == sum(answer.cached for answer in talk.answers)


def test_the_rest_agrees_with_server_info(server, talk):
    state, scrape = numbers(server), talk.after
    counters = state["counters"]
    assert scrape["keepkv:archived_tokens_total"] == counters["archived_tokens"] > 0
    assert scrape["keepkv:compression_seconds_sum"] == pytest.approx(counters["seconds"])
    assert scrape.by("keepkv:skipped_total", "reason") == {
        "no_room": counters["skipped_no_room"],
        "no_window": counters["skipped_no_window"],
        "reply_window": counters["skipped_reply_window"],
    }
    host, rows = scrape.by("keepkv:host_bytes", "state"), scrape.by("keepkv:arena_rows", "state")
    assert host["used"] + host["free"] == pytest.approx(state["memory"]["originals_bytes"]) and host["used"] > 0
    assert rows == {"used": 0, "free": state["memory"]["arena_rows"]}
    assert (scrape["keepkv:entries"], scrape["keepkv:entry_slots"]) == (state["entries"], state["entry_slots"])


def test_the_log_has_a_line_for_each_compression(server, talk):
    lines = [line for line in server.log_path.read_text(errors="replace").splitlines() if " slots and have " in line]
    assert len(lines) == talk.said("compressions")
    # Every slot that was written has its votes in some bucket, in every layer and head.
    written = sum(int(line.split(" slots and have ")[1].split(",")[0]) for line in lines)
    assert talk.new(VOTES) == pytest.approx(written, rel=1e-5)


def test_top_showed_it_in_a_terminal_of_80_columns(talk):
    lines = talk.screen.splitlines()
    assert lines[0].startswith("KeepKV ") and all(len(line.rstrip()) <= 80 for line in lines)
    compressed = sum(answer.keepkv["slots_held"] < answer.keepkv["logical_tokens"] for answer in talk.answers)
    assert any(f"{len(talk.answers) + 1}: {compressed} compressed, " in line for line in lines), talk.screen
    assert any("median at most " in line for line in lines)


def test_top_once_is_for_scripts(server, talk):
    """No colours, no cursor, 80 columns; the same numbers."""
    done = subprocess.run([*TOP, server.base_url, "--once"], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and not done.stderr and "\x1b" not in done.stdout
    assert max(map(len, lines)) <= 80 and len(lines) == 16
    held = talk.after["keepkv:logical_tokens_total"] - talk.after["keepkv:saved_slots_total"]
    assert any(f" {held:,.0f} for {talk.after['keepkv:logical_tokens_total']:,.0f} tokens" in line for line in lines)
    flush(server)
