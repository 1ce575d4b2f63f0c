"""Every file of examples/ but router.sh runs as it says: the HTTP ones share one server, the engine starts its own."""

from __future__ import annotations

import math
import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from keepkv_sglang.settings.config import OPTIONS
from keepkv_sglang.start.flags import flag_name
from keepkv_sglang.tools.server_process import ServerProcess
from tests.support.examples import EXAMPLES, Fleet, calls, run_example


@pytest.fixture(scope="module")
def server(fleet: Fleet) -> ServerProcess:
    """One of them, without the router."""
    return fleet.servers[0]


@pytest.mark.server
def test_agent(server: ServerProcess) -> None:
    """Two questions of one conversation, each with a forced call and its result as `role: tool`."""
    options = ("--tool-choice", "required", "--steps", "1", "--max-tokens", "40", "--budget", "0.25")
    out, infos = run_example("agent_openai.py", "--base-url", server.base_url, *options)
    assert len(calls(out)) >= 2, "forced; and where it was not, the model may have made another"
    prompts = [int(count) for count in re.findall(r"^  prompt (\d+)", out, re.MULTILINE)]
    assert len(infos) == 4 and all(info["budget"] == 0.25 for info in infos)
    assert prompts == sorted(prompts) and sum(info["compressions"] for info in infos) >= 2
    # The first message with its tools: bit for bit in every turn, found in the cache from the second on.
    system = {info["protected_tokens"] for info in infos}
    assert len(system) == 1 and 250 < min(system) < prompts[0]
    last = infos[-1]
    assert last["cached_compressed_tokens"] + min(system) > 0.9 * prompts[2], "all that the turn before had"
    assert last["slots_held"] < min(system) + 0.5 * (last["logical_tokens"] - min(system))


@pytest.mark.server
def test_agent_of_langchain(server: ServerProcess) -> None:
    options = ("--tool-choice", "required", "--questions", "1", "--steps", "2", "--max-tokens", "40")
    out, infos = run_example("agent_langchain.py", "--base-url", server.base_url, *options)
    assert len(calls(out)) >= 2
    assert [info["budget"] for info in infos] == [0.2] * 3  # the server's
    assert infos[2]["cached_compressed_tokens"] > 150, "the first tool's result"
    assert infos[2]["slots_held"] < 0.7 * infos[2]["logical_tokens"]


@pytest.mark.server
def test_budgets(server: ServerProcess) -> None:
    """What each request holds, by the formula; what is protected comes on top of the budget."""
    out, _ = run_example("budgets.py", "--base-url", server.base_url, "--max-tokens", "4")
    system, rules = map(int, re.findall(r"tokens 0 to (\d+); house rules: to (\d+)", out)[0])
    rows = [[int(cell) for cell in row] for row in re.findall(r"^\{.*\}" + r" +(\d+)" * 5, out, re.MULTILINE)]
    settings = [(0.5, 0), (0.1, 0), (0.1, system), (0.1, rules), (1, 0)]  # budget, protected tokens
    for (prompt, logical, slots, protected, cached), (budget, kept) in zip(rows, settings, strict=True):
        whole = max(system, kept)  # the first message is left alone anyway
        held = whole + math.ceil(budget * (prompt - 1 - whole) - 1e-9)  # all but the prompt's last token
        assert protected == kept and slots == held + 1 + logical - prompt, (budget, kept)
        # Only the third finds a span, the second's: of the first message, where they differ, there is none.
        assert cached == (prompt - 1 - system if (budget, kept) == (0.1, system) else 0)


@pytest.mark.server
def test_frontend_program(server: ServerProcess) -> None:
    out, infos = run_example("frontend_program.py", "--base-url", server.base_url, "--max-tokens", "8")
    assert len(infos) == 3 and out.count("?") >= 3
    # The shared prefix was compressed once, when fork sent it ahead; every branch found it.
    assert all(info["cached_compressed_tokens"] > 0 for info in infos), infos
    assert all(info["slots_held"] < info["logical_tokens"] for info in infos)


@pytest.mark.server
def test_select_reads_the_compressed_prefix(server: ServerProcess) -> None:
    """Its log-probabilities are those of /generate behind the same compressed prefix, and not of the whole one."""
    import sglang  # start-up cost

    program = runpy.run_path(str(EXAMPLES / "frontend_program.py"))
    backend = sglang.RuntimeEndpoint(server.base_url, chat_template_name="chatml")
    values = {"report": program["REPORT"], "questions": program["QUESTIONS"][:2], "gates": program["GATES"]}
    state = program["review"].run(**values, max_tokens=1, backend=backend)
    found = state.get_meta_info("gate")
    means = found["normalized_prompt_logprobs"]
    assert state["gate"] == program["GATES"][means.index(max(means))]
    prompt = state.text().removesuffix(state["gate"])

    def direct(gate: str, keepkv: dict[str, bool]) -> tuple[float, int]:
        """(log-probability of the gate's number, tokens read from compressed spans)."""
        sampling = {"temperature": 0, "max_new_tokens": 1, "custom_params": {"keepkv": keepkv}}
        status, answer = server.post_json("/generate", {"text": prompt, "sampling_params": sampling})
        assert status == 200, answer
        from_here = answer["meta_info"]["prompt_tokens"] - 2  # what select asks for
        request = {"text": prompt + gate, "sampling_params": sampling, "return_logprob": True}
        status, answer = server.post_json("/generate", {**request, "logprob_start_len": from_here})
        assert status == 200, answer
        meta = answer["meta_info"]
        return meta["input_token_logprobs"][-1][0], meta["keepkv"]["cached_compressed_tokens"]

    gates = program["GATES"][:2]
    here = [direct(gate, {}) for gate in gates]  # before an uncompressed copy is cached
    whole = [direct(gate, {"enabled": False}) for gate in gates]
    for n, ((compressed, cached), (full, nothing)) in enumerate(zip(here, whole, strict=True)):
        assert cached > 400 and nothing == 0
        # float32; select computes its choices in one batch
        assert found["input_token_logprobs"][n][-1][0] == pytest.approx(compressed, abs=1e-4)
        assert abs(compressed - full) > 1e-2


@pytest.mark.server
def test_offline_engine(model_path: Path) -> None:
    _, infos = run_example("offline_engine.py", "--model", model_path, "--max-tokens", "8")
    default, off, half, slots = infos
    assert default["budget"] == 0.2 and default["slots_held"] < 0.4 * default["logical_tokens"]
    assert off["enabled"] is False and off["slots_held"] == off["logical_tokens"] and off["compressions"] == 0
    assert half["budget"] == 0.5 and default["slots_held"] < half["slots_held"] < half["logical_tokens"]
    assert slots["budget"] == 64 and slots["slots_held"] <= 64 + 8 + 1


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_gpu_server_is_valid_shell_and_names_flags_that_exist(tmp_path: Path) -> None:
    script = EXAMPLES / "gpu_server.sh"
    subprocess.run(["bash", "-n", script], check=True)
    known = {"--" + flag_name(field).replace("_", "-") for field in OPTIONS}
    used = set(re.findall(r"--(?:enable-)?keepkv[a-z-]*", script.read_text()))
    assert "--enable-keepkv" in used and used <= known, used - known

    # A python that only prints its arguments: what each mode would start.
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "[${CUDA_VISIBLE_DEVICES-unset}]" "$@"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0"}

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", script, *arguments], env=env, capture_output=True, text=True)

    plain, keepkv = start("plain", "some model"), start("keepkv", "some model", "31234", "--tp-size", "4")
    assert plain.stdout.startswith("[0] -m sglang.launch_server --model-path some model ")
    assert "keepkv" not in plain.stdout and "--port 30000" in plain.stdout
    assert keepkv.stdout.startswith("[0] -m sglang.launch_server") and "--port 31234" in keepkv.stdout
    assert "--enable-keepkv --keepkv-budget 0.2 --keepkv-merge attention_matching" in keepkv.stdout
    assert keepkv.stdout.endswith(" --tp-size 4\n")
    assert start().returncode == start("gpu", "model").returncode == 2
    assert set(re.findall(r"examples/(\w+\.sh)", script.read_text())) == {"gpu_server.sh", "router.sh"}


def test_every_example_is_listed_in_the_readme() -> None:
    listed = set(re.findall(r"^\| `([^`]+)`", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh", ".jinja")}
    assert listed == files | {
        f"{path.name}/" for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
