"""An error of ours on the scheduler's thread fails a request or skips a round: the server lives and leaks nothing."""

from __future__ import annotations

import os
import threading

import pytest

from keepkv_sglang.tools.places import REPO
from tests.support.client import body, flush, generate, numbers, tokens

pytestmark = pytest.mark.server
LIVES = 200  # the request does not notice
FAILS = 500  # it alone fails
OUTCOMES = {
    "before_update_running_batch": LIVES,
    "before_prepare_for_decode": LIVES,
    "before_admission": LIVES,
    "runtime.pressure.relieve": LIVES,
    "after_stash_chunked_request": FAILS,
    "runtime.due.compress_due": FAILS,
    "runtime.compressor.packed_pieces": FAILS,  # only what the pool cannot hold uncompressed
    "around_release": LIVES,
    "runtime.step.publish_rest": LIVES,
    "around_init_req_max_new_tokens": FAILS,
    "around_prefix_kv_indices": FAILS,
    "around_alloc_for_extend": FAILS,
    "runtime.due.begin_row": FAILS,
    "runtime.due.plan_chunk": LIVES,
    "after_prepare_for_extend": FAILS,
    "after_init_new": FAILS,
    "hooks.extend.capture": LIVES,
    "_propose": LIVES,
    "_withdraw": LIVES,
    "_give_up": LIVES,
    "runtime.stream.propose": LIVES,
    "runtime.stream.readings": LIVES,
    "runtime.unpack._fill": LIVES,
    "runtime.unpack._archive": LIVES,
    "_will_hold": LIVES,
    "_charge": LIVES,
    "_total": FAILS,
    "_waits": LIVES,
    "_info": LIVES,
    "answered": LIVES,
    "between_steps": LIVES,
    "_match_spans": LIVES,
    "_touch_spans": LIVES,
    "_note_checkpoint": LIVES,
    "after_get_internal_state": LIVES,
}


@pytest.fixture(scope="module")
def fault(tmp_path_factory):
    return tmp_path_factory.mktemp("fault") / "name"


@pytest.fixture(scope="module")
def server(launch, fault):
    faults = str(REPO / "tests" / "support" / "faults")
    path = os.pathsep.join(filter(None, [faults, os.environ.get("PYTHONPATH")]))
    return launch(
        *("--enable-keepkv", "--keepkv-interval", "16", "--max-total-tokens", "600", "--chunked-prefill-size", "128"),
        *("--keepkv-pressure", "merge", "--keepkv-references", "32", "--keepkv-host-ratio", "2"),
        env={"KEEPKV_FAULT": str(fault), "PYTHONPATH": path},
    )


@pytest.fixture(scope="module")
def quiet(server):
    """What the server answers without KeepKV when nothing else runs."""
    return generate(server, tokens(60, 3), 8, {"enabled": False}).ids


def post(server, ids, new, keepkv=None):
    status, data = server.post_json("/generate", body(ids, new, keepkv))
    return status, data


def test_every_guarded_hook_is_listed():
    """A new hook on the scheduler's thread needs an outcome here."""
    # here, since importing the hooks is what registers them as guarded
    from keepkv_sglang.faults import guard
    from keepkv_sglang.hooks import adder, admission, answers, extend, scheduler  # noqa: F401
    from keepkv_sglang.radix.adapter import cache  # noqa: F401

    assert set(guard.GUARDED) <= set(OUTCOMES)


@pytest.mark.parametrize("name", OUTCOMES)
def test_an_injected_error_does_not_take_the_server_down(server, fault, quiet, name):
    flush(server, faults=True)
    prompt, shared = tokens(150, 1), tokens(120, 2)
    generate(server, shared, 2)  # a compressed prefix that the next turn hits
    results = {}

    def run(key, ids, new, keepkv=None):
        results[key] = post(server, ids, new, keepkv)

    fault.write_text(name)
    calls = [
        ("new", prompt, 24),
        ("next turn", shared + tokens(80, 4), 8, {"unpack": 0.001 if ".stream." in name else 0.5}),
        ("too long for the pool", tokens(700, 5), 4, {"budget": 0.1}),
        ("off", tokens(60, 3), 8, {"enabled": False}),
    ]
    threads = [threading.Thread(target=run, args=call) for call in calls]
    for thread in threads:
        thread.start()
    server.get_json("/server_info")
    for thread in threads:
        thread.join()
    fault.write_text("")
    statuses = {key: status for key, (status, _) in results.items()}
    assert set(statuses.values()) <= {200, OUTCOMES[name]}, (statuses, results)
    if OUTCOMES[name] == FAILS:
        assert FAILS in statuses.values(), "nothing was injected"
        failed = [data for status, data in results.values() if status == FAILS]
        assert all("KeepKV failed" in str(data) for data in failed), failed
        if name.endswith("packed_pieces"):
            assert statuses == {key: FAILS if key.startswith("too long") else LIVES for key, *_ in calls}
    # What follows is as if nothing had happened.
    assert generate(server, prompt, 24).keepkv["compressions"] >= 1  # the reply at interval 16, whatever the cache has
    assert generate(server, tokens(60, 3), 8, {"enabled": False}).ids == quiet
    flush(server, faults=True)
    errors = numbers(server, faults=True)["errors"]
    known = name.split(".")[-1].replace("compress_due", "compression").replace("relieve", "before_admission")
    known = (
        known.replace("packed_pieces", "compression")
        .replace("begin_row", "around_alloc_for_extend")
        .replace("publish_rest", "finish")
    )
    known = known.replace("_fill", "unpack").replace("_archive", "archive").replace("readings", "unpack")
    if name == "runtime.stream.propose":
        known = "_propose"
    if name not in ("_touch_spans", "_withdraw", "_give_up"):  # of requests that wait; whether one did is chance
        assert any(key.startswith(known) for key in errors), (name, errors)
