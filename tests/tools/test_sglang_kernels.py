"""scripts/sglang_kernels.py: SGLang's kernel files for a GPU machine without SGLang."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

from keepkv_sglang.tools.places import REPO


def test_sglang_kernels_without_sglang(tmp_path):
    """The files are SGLang's own, the rest of it is not there, and our score_mod computes Equation 6 with them."""
    command = [sys.executable, str(REPO / "scripts" / "sglang_kernels.py"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    installed = importlib.metadata.distribution("sglang")
    for name in ("decode_attention.py", "extend_attention.py", "score_mod.py"):
        path = f"sglang/kernels/ops/attention/{name}"
        assert (tmp_path / path).read_bytes() == installed.locate_file(path).read_bytes()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPO}", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_score_mod_triton.py", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
    look = "import sglang, importlib.util as u; print(sglang.__file__, u.find_spec('sglang.srt.server_args'))"
    where = subprocess.check_output([sys.executable, "-c", look], env=environment, cwd=tmp_path, text=True)
    assert where.split() == [str(tmp_path / "sglang" / "__init__.py"), "None"]
