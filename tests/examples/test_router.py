"""examples/router.sh: two servers of KeepKV behind SGLang's router, smg of the dev extra."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from keepkv_sglang.settings.config import OPTIONS
from keepkv_sglang.start.flags import flag_name
from keepkv_sglang.tools.server_process import ServerProcess
from tests.support.client import STRICT
from tests.support.examples import EXAMPLES

SCRIPT = EXAMPLES / "router.sh"
BIN = Path(sys.executable).parent  # the script calls `python` and `smg`


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Fleet:
    """The router, and its servers' addresses."""

    def __init__(self, router: ServerProcess, ports: list[int]) -> None:
        self.servers = [f"http://127.0.0.1:{port}" for port in ports]
        self.client = openai.OpenAI(base_url=f"{router.base_url}/v1", api_key="none", max_retries=0)
        self.model = self.client.models.list().data[0].id

    def turn(self, messages: list[dict[str, str]], client: openai.OpenAI | None = None) -> Any:
        answer = (client or self.client).chat.completions.create(
            model=self.model,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=8,
            temperature=0,
            extra_body={"return_meta_info": True, "custom_params": {"keepkv": {"budget": 0.1}}},
        )
        return answer

    def home(self, answer: Any) -> str:
        """The one server that gave this answer."""
        import httpx  # openai's own; only here

        known = [url for url in self.servers if httpx.get(f"{url}/keepkv/requests/{answer.id}").status_code == 200]
        assert len(known) == 1, known
        return known[0]


@pytest.fixture(scope="module")
def fleet(model_path: Path) -> Iterator[Fleet]:
    metrics, *ports = free_ports(3)
    env = {
        **STRICT,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PORTS": " ".join(map(str, ports)),
        "SERVER_FLAGS": "--keepkv-budget 0.2 --max-total-tokens 3000",
    }
    command = ("bash", SCRIPT, model_path)
    flags = ["--prometheus-port", str(metrics)]
    with ServerProcess(flags, command=command, env=env, health_path="/readiness", timeout_s=300) as router:
        yield Fleet(router, ports)


@pytest.mark.server
def test_a_conversation_stays_where_it_is_compressed(fleet: Fleet) -> None:
    """Two conversations at once: each has a server of its own for all turns, and finds there what it compressed."""

    def talk(name: str) -> list[Any]:
        messages = [{"role": "system", "content": f"You take the minutes of the {name} committee. " * 4}]
        answers = []
        for turn in range(3):
            lines = " ".join(f"{name} item {turn}{n} was moved and carried." for n in range(25))
            messages.append({"role": "user", "content": lines})
            answers.append(fleet.turn(messages))
            messages.append({"role": "assistant", "content": answers[-1].choices[0].message.content})
        return [messages, *answers]

    with ThreadPoolExecutor(2) as threads:
        talks = list(threads.map(talk, ("harbour", "library")))
    homes = []
    for messages, *answers in talks:
        (home,) = {fleet.home(answer) for answer in answers}
        homes.append(home)
        infos = [answer.choices[0].meta_info["keepkv"] for answer in answers]
        assert [info["budget"] for info in infos] == [0.1] * 3, "custom_params pass the router"
        for before, answer, info in zip(answers, answers[1:], infos[1:], strict=False):
            cached = answer.usage.prompt_tokens_details.cached_tokens
            assert info["cached_compressed_tokens"] > 0 and cached > 0.9 * before.usage.prompt_tokens
        # Elsewhere there is nothing of it: that the router chose this server is what made it cheap.
        (other,) = set(fleet.servers) - {home}
        with openai.OpenAI(base_url=f"{other}/v1", api_key="none", max_retries=0) as direct:
            stranger = fleet.turn(messages[:-1], direct)
        assert stranger.choices[0].meta_info["keepkv"]["cached_compressed_tokens"] == 0
        assert stranger.usage.prompt_tokens_details.cached_tokens < 16  # how the template begins
    assert len(set(homes)) == 2


def test_what_it_starts_on_gpus(tmp_path: Path) -> None:
    """A python and an smg that only write their arguments down: each server has its GPUs, the router all servers."""
    for name in ("python", "smg"):
        fake = tmp_path / name
        fake.write_text(
            f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n[ {name} = python ] && exec sleep 60\nsleep 1\n'
        )
        fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PORTS": "1 2", "GPUS_EACH": "4"}
    done = subprocess.run(["bash", SCRIPT, "M", "--port", "30000"], env=env, capture_output=True, text=True, timeout=60)
    started = sorted((tmp_path / "calls").read_text().splitlines())
    assert done.returncode == 0 and len(started) == 3, done.stderr
    for n, line in enumerate(started[:2]):
        assert f"--model-path M --host 127.0.0.1 --port {n + 1} --enable-keepkv" in line
        assert f"--tp-size 4 --base-gpu-id {4 * n} --keepkv-budget 0.2" in line
    assert "--worker-urls http://127.0.0.1:1 http://127.0.0.1:2" in started[2] and started[2].endswith("--port 30000")
    known = {"--" + flag_name(field).replace("_", "-") for field in OPTIONS}
    assert set(re.findall(r"--(?:enable-)?keepkv-?[a-z-]*", SCRIPT.read_text())) <= known | {"--keepkv"}
    assert subprocess.run(["bash", SCRIPT], env=env, capture_output=True).returncode == 2
