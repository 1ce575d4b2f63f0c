"""/metrics of a server that keeps originals: several conversations at once, some of them off, add up with what their
answers say; and `keepkv top` shows the same server."""

from __future__ import annotations

import threading

import pytest

from keepkv_sglang.observe.families import NAMES, VOTES
from tests.support.client import Answer, flush, generate, numbers, tokens
from tests.support.scrape import SGLANG, Scrape

pytestmark = pytest.mark.server
KINDS = (None, {"budget": 0.1}, {"enabled": False}, {"budget": 1}, {"unpack": 0}, None)
TURNS = 3


@pytest.fixture(scope="module")
def server(launch):
    return launch(
        *("--enable-keepkv", "--keepkv-budget", "0.2", "--keepkv-interval", "16", "--max-total-tokens", "4000"),
        *("--keepkv-host-ratio", "1", "--enable-metrics", "--enable-cache-report", "--log-level", "debug"),
    )


@pytest.fixture(scope="module")
def answers(server) -> list[Answer]:
    """Of all requests. Each thread scrapes when it has an answer: what was said by then is in there already."""
    said: list[Answer] = []
    short: list[str] = []
    lock = threading.Lock()

    def talk(seed: int, keepkv) -> None:
        history = tokens(300, seed)
        for turn in range(TURNS):
            answer = generate(server, history, 24, keepkv)
            with lock:
                said.append(answer)
                known = sum(one.keepkv["logical_tokens"] for one in said)
            if Scrape(server.base_url)["keepkv:logical_tokens_total"] < known:
                short.append(f"conversation {seed}, turn {turn}")
            history = history + answer.ids + tokens(150, 100 * seed + turn)

    threads = [threading.Thread(target=talk, args=(seed, kind)) for seed, kind in enumerate(KINDS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not short and len(said) == TURNS * len(KINDS)
    return said


def test_every_metric_is_there_with_sglangs_labels(server):
    scrape = Scrape(server.base_url)
    theirs = scrape.labels("sglang:num_running_reqs")[0]
    for name in NAMES:
        sample = f"{name}_count" if name.endswith("seconds") else name
        assert scrape.labels(sample), name
        for labels in scrape.labels(sample):
            assert {key: labels[key] for key in SGLANG} == {key: theirs[key] for key in SGLANG}


def test_what_the_answers_say_adds_up(server, answers):
    scrape = Scrape(server.base_url)
    infos = [answer.keepkv for answer in answers]

    def total(key: str) -> float:
        return sum(info[key] for info in infos)

    compressed = sum(info["slots_held"] < info["logical_tokens"] for info in infos)
    off = sum(not info["enabled"] for info in infos)
    assert off == 2 * TURNS and compressed >= 3 * TURNS
    assert scrape.by("keepkv:requests_total", "result") == {
        "compressed": compressed,
        "off": off,
        "whole": len(infos) - compressed - off,
    }
    assert scrape["keepkv:logical_tokens_total"] == total("logical_tokens")
    assert scrape["keepkv:saved_slots_total"] == total("logical_tokens") - total("slots_held")
    assert scrape["keepkv:hit_tokens_total"] == total("cached_compressed_tokens") > 0
    assert scrape["keepkv:unpacked_tokens_total"] == total("unpacked_tokens") > 0
    assert scrape["keepkv:compression_seconds_count"] == total("compressions") > 0
    assert round(scrape["keepkv:merged_tokens_total"], 2) == round(total("merged"), 2) > 0
    assert round(scrape["keepkv:dropped_tokens_total"], 2) == round(total("dropped"), 2)
    assert scrape["keepkv:prompt_tokens_total"] == sum(answer.meta["prompt_tokens"] for answer in answers)
    assert scrape["keepkv:cached_tokens_total"] == sum(answer.cached for answer in answers)


def test_the_rest_agrees_with_server_info(server, answers):
    state, scrape = numbers(server), Scrape(server.base_url)
    counters = state["counters"]
    assert scrape["keepkv:archived_tokens_total"] == counters["archived_tokens"] > 0
    assert scrape["keepkv:compression_seconds_sum"] == pytest.approx(counters["seconds"])
    assert sum(scrape.by("keepkv:skipped_total", "reason").values()) == sum(
        counters[key] for key in ("skipped_no_room", "skipped_no_window", "skipped_reply_window")
    )
    host, rows = scrape.by("keepkv:host_bytes", "state"), scrape.by("keepkv:arena_rows", "state")
    assert host["used"] + host["free"] == pytest.approx(state["memory"]["originals_bytes"]) and host["used"] > 0
    assert rows["used"] + rows["free"] == state["memory"]["arena_rows"]
    assert (scrape["keepkv:entries"], scrape["keepkv:entry_slots"]) == (state["entries"], state["entry_slots"])
    # Every slot that a compression wrote has its votes in some bucket, in every layer and head.
    debug = [line.split(" slots and have ")[1] for line in log(server) if " slots and have " in line]
    assert len(debug) == counters["compressions"], "one line for each compression"
    assert scrape[VOTES] == pytest.approx(sum(int(text.split(",")[0]) for text in debug), rel=1e-5)
    flush(server)


def log(server) -> list[str]:
    return server.log_path.read_text(errors="replace").splitlines()
