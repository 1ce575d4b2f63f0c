"""Live servers for tests/server: one at a time, strict memory checks on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from keepkv_sglang.tools.places import REPO
from keepkv_sglang.tools.server_process import LAUNCH_SERVER, ServerProcess
from tests.support.client import STRICT

Launch = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def launch(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Starts servers for one module: launch(*flags, env={}, command=...) -> ServerProcess; all end with the module."""
    with ExitStack() as stack:

        def start(
            *flags: str, env: dict[str, str] | None = None, command: tuple[str, ...] = LAUNCH_SERVER
        ) -> ServerProcess:
            stack.close()  # two cores: never two servers
            log = Path(os.environ.get("KEEPKV_TEST_LOGS", tmp_path_factory.mktemp("server"))) / "server.log"
            server = ServerProcess(
                ["--model-path", model_path, "--log-level", "info", *flags],
                env={**STRICT, **(env or {})},
                command=command,
                log_path=log,
                timeout_s=300,
            )
            return stack.enter_context(server)

        yield start


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for --keepkv-record of this module's servers."""
    return tmp_path_factory.mktemp("record")


@pytest.fixture(scope="session")
def oracle(model_path: Path):
    """The empty float64 replay row; clone it. Loaded once."""
    import torch  # start-up cost: most modules need no oracle

    from tests.support.replay import Replay

    torch.set_num_threads(2)
    return Replay.load(str(model_path))


@pytest.fixture(scope="session")
def text_tokens(model_path: Path) -> list[int]:
    """Tokens of real English prose (this project's licence), without message borders."""
    from transformers import AutoTokenizer  # start-up cost

    licence = (REPO / "LICENSE").read_text()
    return AutoTokenizer.from_pretrained(model_path).encode(licence)
