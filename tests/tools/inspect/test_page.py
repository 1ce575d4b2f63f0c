"""The page of `keepkv inspect` as a file: nothing from elsewhere, harmless text, every token once, sums that agree."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import numpy as np
import pytest
import torch

from keepkv_sglang import cli
from keepkv_sglang.tools.inspect import command, page, records
from keepkv_sglang.tools.inspect.pieces import pieces
from keepkv_sglang.tools.places import REPO
from tests.support.recorded import compression, page_data, request

HOSTILE = ["</script>", "<script>alert(1)</script>", "<!--", "&lt;", "\u2028", "$data", "\r", "]]>", "\0", "\ufffd"]


def a_request(tokens=400, heads=3, layers=4, **more):
    """An anchor of 10 tokens, a prompt in a fifth of its slots, 50 tokens of a reply that is not compressed."""
    end = tokens - 50
    m = (end - 10) // 5
    event = compression(np.random.default_rng(1), 10, end, m, start=10, layers=layers, heads=heads)
    return request(tokens, tokens - (end - 10) + m, [event], anchor=10, **more)


def test_every_token_once_and_the_sums_of_every_head():
    asked = a_request(protected=[[0, 10], [100, 110]])
    texts = [f"{t} " for t in asked.tokens]
    data = page_data(page.render(asked, texts, "model"))
    assert data["texts"] == texts and data["rows"] == 400 and (data["layers"], data["heads"]) == (4, 3)
    event = asked.compressions[0]
    for number, codes in enumerate(data["into"]):
        layer, head = divmod(number, 3)
        slots, gone = (codes == page.SLOT).sum(), (codes == page.GONE).sum()
        assert slots == data["slots"][number] == asked.answer["slots_held"]
        owners = codes[codes >= page.FIRST] - page.FIRST
        assert slots + gone + len(owners) == 400
        assert (codes[owners] == page.SLOT).all(), "merged into a token that keeps its slot"
        kept, assign = event.kept[layer][head], event.assign[layer][head]
        np.testing.assert_array_equal(np.flatnonzero(codes[10:350] == page.SLOT), kept)
        np.testing.assert_array_equal(owners, 10 + kept[assign[(assign >= 0) & ~np.isin(np.arange(340), kept)]])
        votes = data["votes"][number] / page.VOTE_UNIT
        np.testing.assert_allclose(votes[10:-50], event.log_votes[layer][head], atol=0.5 / page.VOTE_UNIT)
        assert not votes[:10].any() and not votes[-50:].any()
    assert np.flatnonzero(data["flags"] & page.COMPRESSED).tolist() == list(range(10, 350))
    assert np.flatnonzero(data["flags"] & page.PROTECTED).tolist() == [*range(10), *range(100, 110)]


def test_text_is_only_ever_data():
    asked = a_request(tokens=100, rid='"><script>x</script>')
    texts = HOSTILE * 10
    html = page.render(asked, texts, "</title><b>")
    assert page_data(html)["texts"] == texts
    assert html.count("<script") == html.count("</script>") == 2 and "<!--" not in html and "alert(1)<" not in html
    assert html.count("<title>") == html.count("</title>") == 1 and "<b>" not in html


def test_nothing_is_loaded_from_elsewhere():
    html = page.render(a_request(tokens=100), ["x"] * 100, "model")
    assert not re.findall(r"\bsrc=|@import|url\(|\bfetch\(|XMLHttpRequest|import\(", html)
    assert set(re.findall(r'href="([^"]*)"', html)) == {"data:,"}
    assert set(re.findall(r"https?://[^\"' ]+", html)) == {"http://www.w3.org/2000/svg"}, "a name, not an address"
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    script = re.findall(r"<script>(.*?)</script>", html, re.S)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy


def test_four_thousand_tokens_are_small():
    """90 heads that choose by chance, which compresses worst: real ones, 0.32 MB (docs/usage.md)."""
    html = page.render(a_request(tokens=4000, layers=30), ["token "] * 4000, "model")
    assert len(html.encode()) < 2e6


def test_a_row_of_more_than_65_thousand_tokens():
    asked = a_request(tokens=70_000, layers=1, heads=1)
    data = page_data(page.render(asked, [""] * 70_000, "model"))
    assert data["wide"] and data["into"].max() > 1 << 16


def test_texts_joined_are_the_text(model_path):
    from transformers import AutoTokenizer  # start-up cost

    text = "Naïve: 你好, 🦊🇩🇪! </script>\r\n\ttab  end"
    ids = AutoTokenizer.from_pretrained(model_path).encode("<|im_start|>user\n" + text + "<|im_end|>")
    found = pieces(model_path, ids)
    assert "".join(found) == "<|im_start|>user\n" + text + "<|im_end|>" and len(found) == len(ids)
    assert "" in found, "a character of several tokens"


def test_a_model_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="name the model's folder with --model"):
        pieces(tmp_path, [1])


def test_a_server_that_does_not_record():
    with pytest.raises(ValueError, match="the server at URL runs without KeepKV; start it with --enable-keepkv"):
        command.recording("URL", {"internal_states": [{}]})
    off = {"internal_states": [{"keepkv": {"config": {"record": ""}}}]}
    with pytest.raises(ValueError, match="does not record: start it with --keepkv-record FOLDER"):
        command.recording("URL", off)


def test_prompts(tmp_path):
    text, messages = tmp_path / "a.txt", tmp_path / "b.json"
    text.write_text("[1]")
    assert command.body(text) == {"messages": [{"role": "user", "content": "[1]"}]}
    said = [{"role": "user", "content": "Hi"}]
    for content in (said, {"messages": said}):
        messages.write_text(json.dumps(content))
        assert command.body(messages)["messages"] == said
    messages.write_text("[")
    with pytest.raises(ValueError, match=r"b\.json: Expecting value"):
        command.body(messages)
    messages.write_text('{"prompt": "Hi"}')
    with pytest.raises(ValueError, match="neither a list of messages nor an object with messages"):
        command.body(messages)


def test_files_that_are_no_record(tmp_path):
    (tmp_path / "00001-r.json").write_text(json.dumps({"rid": "r", "time": 0, "answer": {"compressions": 1}}))
    (tmp_path / "00000-r.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="no whole record of a compression"):
        records.read([tmp_path])
    torch.save({"rid": "r", "rank": 0}, tmp_path / "00000-r.pt")
    with pytest.raises(ValueError, match=r"recorded by keepkv-sglang 0\.1"):
        records.read([tmp_path])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "use either a URL"),
        (("http://127.0.0.1:1", "--record", "x"), "use either a URL"),
        (("http://127.0.0.1:1",), "--prompt FILE"),
        (("http://127.0.0.1:1", "--prompt", __file__), "no server answers at"),
        (("http://127.0.0.1:1", "--prompt", "/nowhere"), "/nowhere"),
        (("--record", "/nowhere"), "--model"),
        (("--record", "/nowhere", "--model", "m"), "is not there"),
        (("--record", str(REPO / "docs"), "--model", "m"), "the answer of any request is not among these files"),
    ],
    ids=range(8),
)
def test_what_a_user_can_mend_is_one_line(arguments, said, capsys):
    assert cli.main(["inspect", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
