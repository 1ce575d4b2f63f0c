"""Bad input at every endpoint: a clear HTTP 400 for that request alone; what is not compressed says so and why."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request

import pytest

from keepkv_sglang import cli
from keepkv_sglang.hooks.endpoints import ENDPOINTS
from keepkv_sglang.tools.inspect.page import CACHED, FIRST, GONE, SLOT
from tests.support import fuzz
from tests.support.bad_input import REQUESTS
from tests.support.client import body, flush, generate, numbers, tokens
from tests.support.recorded import page_data

pytestmark = pytest.mark.server
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    return tmp_path_factory.mktemp("record")


@pytest.fixture(scope="module")
def server(launch, record):
    return launch(
        *("--enable-keepkv", "--max-total-tokens", "1200", "--keepkv-configurations", "4", "--keepkv-references", "32"),
        *("--incremental-streaming-output", "--chunked-prefill-size", "256"),
        "--keepkv-record",
        str(record),
    )


@pytest.fixture(autouse=True)
def clean(server):
    flush(server)
    yield
    numbers(server)


def refused(server, path, request, said):
    status, answer = server.post_json(path, request)
    assert status == 400 and said in str(answer), (path, status, answer)
    assert len(str(answer)) < 1000


def stream(server, path, request):
    """(HTTP status, data of its events) of a streaming request."""
    call = urllib.request.Request(
        f"{server.base_url}{path}",
        json.dumps({**request, "stream": True}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(call, timeout=120) as answer:
            lines = [line.decode().strip() for line in answer if line.startswith(b"data: ")]
    except urllib.error.HTTPError as error:
        return error.code, [error.read().decode()]
    return 200, [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


BAD_CUSTOM = ["keepkv", ["x"], 5, True]


@pytest.mark.parametrize("bad", BAD_CUSTOM, ids=str)
def test_custom_params_that_are_no_object(server, bad):
    """Smallest input that ended the scheduler: /generate with custom_params "keepkv"."""
    request = {"text": "Hello", "sampling_params": {"max_new_tokens": 2, "custom_params": bad}}
    refused(server, "/generate", request, "custom_params must be an object")
    assert stream(server, "/generate", request)[0] == 400
    refused(server, "/generate", {**request, "sampling_params": [request["sampling_params"]], "text": ["a"]}, "object")
    for path, chat in (("/v1/completions", {"prompt": "Hello"}), ("/v1/chat/completions", {"messages": HELLO})):
        status, _ = server.post_json(path, {"model": "m", "max_tokens": 2, "custom_params": bad, **chat})
        assert status == 400
    for path, request in OTHERS:
        refused(server, path, {**request, "custom_params": bad}, "custom_params must be an object")


GENERATE = {"text": "Hello", "sampling_params": {"max_new_tokens": 2}}
CHAT = {"model": "m", "messages": HELLO, "max_tokens": 2}


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "request_"),
    [("/generate", GENERATE), ("/v1/chat/completions", CHAT), ("/v1/completions", {**CHAT, "prompt": "Hello"})],
    ids=["generate", "chat", "completions"],
)
def test_every_bad_value_is_refused_with_what_to_do(server, path, request_, streams):
    """The whole table of tests/support/bad_input.py: an HTTP 400 for that request, before a stream begins."""
    for bad, said in REQUESTS:
        custom = {"custom_params": {"keepkv": bad}}
        sampling = {"sampling_params": {**GENERATE["sampling_params"], **custom}} if path == "/generate" else custom
        status, answer = server.post_json(path, {**request_, **sampling, "stream": streams})
        assert status == 400, (bad, answer)
        assert len(str(answer)) < 1000
        if not isinstance(bad, dict) or not {repr(value) for value in bad.values()} & {"nan", "inf"}:  # no JSON
            message = answer.get("error", answer)["message"]
            assert re.search(said, message), (bad, message)


def test_custom_params_drawn_at_random(server):
    statuses, grown = fuzz.run(server, 220)
    assert statuses[200] > 10 and statuses[400] > 80, statuses
    assert grown < 24 << 20, f"{grown / 2**20:.0f} MiB"


@pytest.mark.soak
def test_custom_params_drawn_at_random_for_five_minutes(server):
    statuses, grown = fuzz.run(server, 6000)
    print(statuses, f"{grown / 2**20:.1f} MiB")
    assert grown < 24 << 20, f"{grown / 2**20:.0f} MiB"


OTHERS = [
    ("/v1/messages", {"model": "m", "max_tokens": 2, "messages": HELLO}),
    ("/api/chat", {"model": "m", "stream": False, "messages": HELLO, "options": {"num_predict": 2}}),
    ("/api/generate", {"model": "m", "stream": False, "prompt": "Hello", "options": {"num_predict": 2}}),
    ("/v1/score", {"model": "m", "query": "Hello", "items": [" you"], "label_token_ids": [9, 10]}),
]


@pytest.mark.parametrize(("path", "request_"), OTHERS, ids=[path for path, _ in OTHERS])
def test_endpoints_whose_parsers_drop_custom_params(server, path, request_):
    refused(server, path, {**request_, "custom_params": {"keepkv": {"budget": -1}}}, "budget -1")
    assert server.post_json(path, request_)[0] == 200
    assert server.post_json(path, {**request_, "custom_params": {"keepkv": {"budget": 0.5}}})[0] == 200
    text = "custom_params is a word in this prompt. "
    assert server.post_json(path, {**request_, **long_text(path, text)})[0] == 200, "only the key means something"


def long_text(path, text):
    if path in ("/v1/messages", "/api/chat"):
        return {"messages": [{"role": "user", "content": text}]}
    return {{"/api/generate": "prompt", "/v1/score": "query"}[path]: text}


@pytest.mark.parametrize("path", sorted(ENDPOINTS))
def test_each_endpoint_refuses_them_before_it_parses(server, path):
    """Also those that this machine cannot serve, such as /v1/responses without its vocabulary."""
    refused(server, path, {"model": "m", "custom_params": {"keepkv": {"budget": -1}}}, "budget -1")


@pytest.mark.parametrize("path", ["/v1/messages", "/api/chat", "/api/generate"])
def test_they_reach_the_request(server, path):
    """The same long prompt is compressed by default, and not where its custom_params switch it off."""
    request_ = dict(OTHERS)[path] | long_text(path, "The quick brown fox jumps over the lazy dog. " * 30)
    before = numbers(server)["counters"]["compressions"]
    assert server.post_json(path, {**request_, "custom_params": {"keepkv": {"enabled": False}}})[0] == 200
    assert numbers(server)["counters"]["compressions"] == before
    flush(server)
    assert server.post_json(path, request_)[0] == 200
    assert numbers(server)["counters"]["compressions"] == before + 1


def test_ollama_options_may_hold_them(server):
    path, request_ = OTHERS[1]
    options = {"num_predict": 2, "custom_params": {"keepkv": {"budget": 7.5}}}
    refused(server, path, {**request_, "options": options}, "neither a fraction nor a whole number")


@pytest.mark.parametrize("bad", [[49152], [-1], [5, 1 << 40], [5, -(1 << 62)]], ids=str)
def test_tokens_that_the_model_does_not_have(server, bad):
    """On a CPU they end the model's embedding, stock SGLang's too."""
    request = {"input_ids": bad, "sampling_params": {"max_new_tokens": 2}}
    refused(server, "/generate", request, "is no token of this model; use whole numbers from 0 to 49151")
    assert stream(server, "/generate", request)[0] == 400
    refused(server, "/generate", {**request, "input_ids": [[5, 6], bad]}, "no token")
    status, _ = server.post_json("/v1/completions", {"model": "m", "prompt": bad, "max_tokens": 2})
    assert status == 400
    assert server.get_json("/health")[0] == 200


def test_what_is_not_compressed_says_so_and_why(server):
    ids = tokens(100, 1)
    on = generate(server, ids, 2).keepkv
    assert on["enabled"] and "reason" not in on and on["protected_tokens"] == 0
    for wanted, reason in (({"enabled": False}, "request"), ({"budget": 1}, "budget 1"), ({"budget": 1.0}, "budget 1")):
        info = generate(server, ids, 2, wanted).keepkv
        assert set(info) - {"reason"} == set(on)
        assert (info["enabled"], info["reason"], info["slots_held"]) == (False, reason, info["logical_tokens"])
    status, session = server.post_json("/open_session", {"capacity_of_str_len": 1000})
    assert status == 200
    request = body(ids, 2, {"budget": 0.1}) | {"session_params": {"id": session}}
    status, answer = server.post_json("/generate", request)
    info = answer["meta_info"]["keepkv"]
    assert status == 200 and (info["enabled"], info["reason"], info["budget"]) == (False, "session", 0.1)
    too_long = body(tokens(2000, 2), 2, {"budget": 0.1})
    refused(server, "/generate", too_long | {"session_params": {"id": session}}, "without the session")
    server.post_json("/close_session", {"session_id": session})
    refused(server, "/generate", body(tokens(2000, 2), 2, {"enabled": False}), "enabled")
    refused(server, "/generate", body(tokens(2000, 2), 2, {"budget": 1}), "a smaller budget would let it in")


def test_reports_by_request_id(server):
    """OpenAI answers carry no meta_info in streams and completions: their id does."""
    prompt = "The quick brown fox jumps over the lazy dog. " * 20
    custom = {"custom_params": {"keepkv": {"budget": 0.3}}}
    _, answer = server.post_json("/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 2, **custom})
    status, info = server.get_json(f"/keepkv/requests/{answer['id']}")
    assert status == 200 and info["budget"] == 0.3 and info["compressions"] == 1
    chat = {"model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": 3, **custom}
    status, events = stream(server, "/v1/chat/completions", chat)
    assert status == 200
    status, info = server.get_json(f"/keepkv/requests/{events[0]['id']}")
    assert status == 200 and info["enabled"] and info["slots_held"] < info["logical_tokens"]
    assert server.get_json("/keepkv/requests/nobody")[0] == 404


def test_the_last_chunk_of_an_incremental_stream_says_it(server):
    status, events = stream(server, "/generate", body(tokens(200, 3), 5))
    assert status == 200 and len(events) >= 3
    assert all("keepkv" not in event["meta_info"] for event in events[:-1])
    assert events[-1]["meta_info"]["keepkv"]["enabled"]


def test_settings_beyond_the_bound_are_refused_and_counted(server):
    """Four settings at once; those without requests and without cached spans make room."""
    ids = tokens(100, 4)
    refused_before = numbers(server)["counters"]["refused_configurations"]
    for index in range(3):
        generate(server, ids, 1, {"budget": 0.3 + index / 100})
    generate(server, ids, 1)  # the server's own
    refused(server, "/generate", body(ids, 1, {"budget": 0.5}), "4 different settings are in use")
    assert generate(server, ids, 1, {"budget": 0.3}).keepkv["cached_compressed_tokens"] > 0, "those in use go on"
    assert generate(server, ids, 1, {"enabled": False}).keepkv["reason"] == "request"
    assert numbers(server)["counters"]["refused_configurations"] == refused_before + 1
    flush(server)
    assert generate(server, ids, 1, {"budget": 0.5}).keepkv["enabled"]


@pytest.mark.parametrize("rid", ["a/b/../c", "nul\0byte", "/etc/x"], ids=["slash", "nul", "absolute"])
def test_request_ids_are_no_paths(server, record, rid):
    before = {path.name for path in record.iterdir()}
    assert generate(server, tokens(150, 5), 2, rid=rid + "0" * 20).keepkv["compressions"] == 1
    made = {path.name for path in record.iterdir()} - before
    assert sorted(name.rpartition(".")[2] for name in made) == ["json", "pt"]
    assert all((record / name).stat().st_mode & 0o777 == 0o600 for name in made)


def test_the_log_says_nothing_of_what_was_sent(server):
    """Neither a good prompt nor a bad value, an id, or tokens. SGLang's own --log-requests is off."""
    secret = "xylophonic marmalade"
    ids = [31337, 31338, 31339] * 40
    custom = {"custom_params": {"keepkv": {"protect": secret}}}
    server.post_json("/generate", {"text": secret * 40, "sampling_params": {"max_new_tokens": 2}})
    server.post_json("/generate", {"text": secret, "sampling_params": {"max_new_tokens": 2, **custom}})
    generate(server, ids, 2, rid=f"{secret}\n[forged] a line")
    log = server.log_path.read_text(errors="replace")
    assert "KeepKV is on" in log
    assert not {part for part in (secret, "[forged]", "31337") if part in log}


def inspected(page, text):
    """The data of a page; its text holds `text`, and the tokens of every head add up to the answer's numbers."""
    data = page_data(page.read_text(encoding="utf-8"))
    said = dict(data["numbers"])
    held, tokens = (int(said[name].replace(",", "")) for name in ("slots held", "tokens"))
    assert text in "".join(data["texts"]) and data["rows"] == tokens
    assert sum(data["slots"]) == held * len(data["slots"]), "a mean over heads, which share their cells"
    return data, said


def test_keepkv_inspect_of_a_prompt_that_is_markup(server, model_path, tmp_path, capsys):
    """The server records, the command makes the page; meta_info's means are those of the page's heads."""
    text = "</script><script>alert(1)</script><!-- &lt; 你好 🦊\n" * 20
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    page = tmp_path / "page.html"
    asked = ["--prompt", str(tmp_path / "prompt.txt"), "--max-tokens", "8", "--keepkv", '{"protect": "40-60"}']
    assert cli.main(["inspect", server.base_url, *asked, "-o", str(page)]) == 0, capsys.readouterr().err
    assert page.read_text(encoding="utf-8").count("</script>") == 2
    data, said = inspected(page, text)
    assert float(said["merged"].replace(",", "")) == pytest.approx((data["into"] >= FIRST).sum(1).mean(), abs=0.01)
    assert float(said["dropped"].replace(",", "")) == pytest.approx((data["into"] == GONE).sum(1).mean(), abs=0.01)
    assert said["protected"] == "20" and (data["into"][:, 40:60] == SLOT).all()
    assert int(said["compressions"]) == len(data["steps"]) // 2 - 1


def test_keepkv_inspect_of_a_later_turn(server, record, model_path, tmp_path, capsys):
    """What the cache had is found in the earlier turns' record; without that it is said to be the cache's."""
    turn1 = generate(server, tokens(300, 31), 132)
    turn2 = tokens(300, 31) + turn1.ids + tokens(150, 32)
    rid = generate(server, turn2, 8).rid
    page, model = tmp_path / "page.html", ["--model", str(model_path), "-o", str(tmp_path / "page.html")]
    assert cli.main(["inspect", "--record", str(record), "--rid", rid, *model]) == 0
    data, said = inspected(page, "")
    cached = int(said["from the cache, compressed"])
    assert cached > 300 and not (data["into"] == CACHED).any()
    own = [str(path) for path in record.iterdir() if rid[:16] in path.name]
    assert cli.main(["inspect", "--record", *own, *model]) == 0
    part = page_data(page.read_text(encoding="utf-8"))
    unknown = (part["into"] == CACHED).sum(1)
    assert 0 < unknown[0] <= cached and (unknown == unknown[0]).all()
    first = unknown[0]  # no anchor: the tokens are random, without a message border
    assert (part["into"][:, first:] == data["into"][:, first:]).all()
    # A budget in slots merges the cached history again: whose slots these were is not known.
    again = generate(server, turn2, 2, {"budget": 60})
    more = generate(server, turn2 + again.ids + tokens(80, 33), 2, {"budget": 60})
    assert more.keepkv["cached_compressed_tokens"] > 400
    assert cli.main(["inspect", "--record", str(record), "--rid", more.rid, *model]) == 0
    merged_again = page_data(page.read_text(encoding="utf-8"))["into"]
    assert (merged_again[:, -30:] == SLOT).all() and (merged_again[:, :300] == CACHED).all()
    assert cli.main(["inspect", "--record", *(name for name in own if name.endswith(".json")), *model]) == 1
    assert "name all files with" in capsys.readouterr().err


def test_what_is_not_compressed_is_not_recorded(server, record, tmp_path, capsys):
    before = set(record.iterdir())
    (tmp_path / "prompt.txt").write_text("Hello")
    asked = ["--prompt", str(tmp_path / "prompt.txt"), "--max-tokens", "2", "-o", str(tmp_path / "page.html")]
    assert cli.main(["inspect", server.base_url, *asked]) == 1
    assert "nothing of this request was compressed: it is shorter" in capsys.readouterr().err
    assert cli.main(["inspect", server.base_url, *asked, "--keepkv", '{"budget": 7.5}']) == 1
    assert "HTTP 400" in capsys.readouterr().err and set(record.iterdir()) == before
