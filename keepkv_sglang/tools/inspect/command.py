"""`keepkv inspect`: one request becomes a page that shows which tokens kept a slot.

With a URL it sends the request itself, to a server that records (--keepkv-record); its prompt is computed anew, so that
the record is complete. With --record it reads what was recorded, of any request, without a network.
"""

from __future__ import annotations

import argparse
import json
import uuid
from pathlib import Path
from typing import Any

from keepkv_sglang.tools.remote import Remote, add_api_key, keepkv_states

FLAG = "--keepkv-record"
TIMEOUT_S = 3600.0  # a long prompt on a CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `keepkv inspect`."""
    parser.add_argument("url", nargs="?", help=f"a server that was started with {FLAG}, such as http://127.0.0.1:30000")
    prompt = "text for one user message, or .json: a list of messages, or the body of a chat completion"
    parser.add_argument("--prompt", type=Path, metavar="FILE", help=prompt)
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of the answer (default: 64)")
    parser.add_argument("--keepkv", type=_object, default={}, metavar="JSON", help="such as '{\"budget\": 0.1}'")
    add_api_key(parser)
    record = "files of a record, or its folder, instead of a URL"
    parser.add_argument("--record", type=Path, nargs="+", metavar="PATH", help=record)
    parser.add_argument("--rid", help="which request of the record (default: the last)")
    parser.add_argument("--model", help="folder or name of the model's tokenizer (default: the server's)")
    parser.add_argument("-o", "--output", type=Path, default=Path("inspect.html"), help="default: inspect.html")


def run(args: argparse.Namespace) -> int:
    """Writes the page and prints where it is. Returns the exit code; raises ValueError for what a user can mend."""
    from keepkv_sglang.tools.inspect import page, pieces, records  # start-up cost: numpy

    if (args.url is None) == (args.record is None):
        raise ValueError("use either a URL with --prompt FILE, or --record PATH with --model M")
    if args.record is None:
        if args.prompt is None:
            raise ValueError("name the request's text with --prompt FILE")
        paths, rid, model = _ask(args)
    else:
        paths, rid, model = args.record, args.rid, args.model
        if model is None:
            raise ValueError("name the model's folder with --model: the record holds token numbers, not their text")
    request = records.read(paths, rid)
    text = page.render(request, pieces.pieces(model, request.tokens), Path(model).name)
    try:
        args.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{args.output}: {error.strerror}; name another file with -o") from None
    print(f"{args.output}: {len(request.tokens):,} tokens, {len(text.encode()) / 1e6:.2f} MB")
    return 0


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return value


def body(prompt: Path) -> dict[str, Any]:
    """A chat completion's body from a file. ValueError for a file or JSON that is none."""
    try:
        text = prompt.read_text(encoding="utf-8")
        content = json.loads(text) if prompt.suffix == ".json" else [{"role": "user", "content": text}]
    except (OSError, ValueError) as error:
        raise ValueError(f"{prompt}: {error}") from None
    content = {"messages": content} if isinstance(content, list) else content
    if not isinstance(content, dict) or "messages" not in content:
        raise ValueError(f"{prompt} is neither a list of messages nor an object with messages")
    return content


def _ask(args: argparse.Namespace) -> tuple[list[Path], str, str]:
    """Sends the request: (the record's folder, the request's id, the tokenizer's place)."""
    content = body(args.prompt)
    with Remote(args.url, args.api_key, TIMEOUT_S) as remote:
        info = remote.get("/server_info")
        folder = recording(args.url, info)
        asked = {"model": "default", "max_tokens": args.max_tokens, "temperature": 0, **content}
        asked |= {"stream": False, "return_meta_info": True}
        asked["cache_salt"] = uuid.uuid4().hex  # nothing of it is in the prefix cache
        custom = asked.get("custom_params") or {}
        asked["custom_params"] = {**custom, "keepkv": {**custom.get("keepkv", {}), **args.keepkv}}
        said = remote.post("/v1/chat/completions", asked)
    numbers, rid = said["choices"][0]["meta_info"]["keepkv"], said["id"]
    if not numbers.get("compressions"):
        why = numbers.get("reason") or "it is shorter than --keepkv-min-tokens, or the pool had no room"
        raise ValueError(f"nothing of this request was compressed: {why}")
    model = args.model or info.get("tokenizer_path") or info["model_path"]
    if not folder.is_dir():
        raise ValueError(
            f"the record lies in {folder} on the server's machine: copy its files with {rid[:16]} in their names, and"
            f" run: keepkv inspect --record FILES --model {model} -o {args.output}"
        )
    return [folder], rid, model


def recording(url: str, info: dict[str, Any]) -> Path:
    """The folder that a server records into, from its /server_info. ValueError that says how to start one."""
    folder = keepkv_states(url, info)[0]["config"].get("record")
    if not folder:
        raise ValueError(f"this server does not record: start it with {FLAG} FOLDER")
    return Path(folder)
