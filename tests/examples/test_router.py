"""examples/router.sh: what it starts, and what two servers of KeepKV behind SGLang's router do for conversations."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from keepkv_sglang.settings.config import OPTIONS
from keepkv_sglang.start.flags import flag_name
from keepkv_sglang.tools.server_process import ServerProcess
from tests.support.examples import EXAMPLES, Fleet

SCRIPT = EXAMPLES / "router.sh"


def turn(client: openai.OpenAI, model: str, messages: list[Any]) -> Any:
    return client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=8,
        temperature=0,
        extra_body={"return_meta_info": True, "custom_params": {"keepkv": {"budget": 0.1}}},
    )


def home(fleet: Fleet, answer: Any) -> ServerProcess:
    """The one server that gave this answer."""
    (known,) = [server for server in fleet.servers if server.get_json(f"/keepkv/requests/{answer.id}")[0] == 200]
    return known


@pytest.mark.server
def test_a_conversation_stays_where_it_is_compressed(fleet: Fleet) -> None:
    """Two conversations at once: each has a server of its own for all turns, and finds there what it compressed."""
    client = openai.OpenAI(base_url=f"{fleet.router.base_url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id

    def talk(name: str) -> list[Any]:
        messages = [{"role": "system", "content": f"You take the minutes of the {name} committee. " * 4}]
        answers = []
        for n in range(3):
            lines = " ".join(f"{name} item {n}{k} was moved and carried." for k in range(25))
            messages.append({"role": "user", "content": lines})
            answers.append(turn(client, model, messages))
            messages.append({"role": "assistant", "content": answers[-1].choices[0].message.content})
        return [messages, *answers]

    with ThreadPoolExecutor(2) as threads:
        talks = list(threads.map(talk, ("harbour", "library")))
    homes = []
    for messages, *answers in talks:
        (here,) = {home(fleet, answer).port for answer in answers}
        homes.append(here)
        infos = [answer.choices[0].meta_info["keepkv"] for answer in answers]
        assert [info["budget"] for info in infos] == [0.1] * 3, "custom_params pass the router"
        for before, answer, info in zip(answers, answers[1:], infos[1:], strict=False):
            cached = answer.usage.prompt_tokens_details.cached_tokens
            assert info["cached_compressed_tokens"] > 0 and cached > 0.9 * before.usage.prompt_tokens
        # Elsewhere there is nothing of it: that the router chose this server is what made it cheap.
        (other,) = {server.port for server in fleet.servers} - {here}
        with openai.OpenAI(base_url=f"http://127.0.0.1:{other}/v1", api_key="none", max_retries=0) as direct:
            stranger = turn(direct, model, messages[:-1])
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
