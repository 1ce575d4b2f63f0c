"""SGLang's Triton attention kernels alone, from the installed package, for a GPU machine where SGLang is not installed.

    python scripts/sglang_kernels.py [FOLDER]     default: build/sglang_kernels, which git ignores

Copies three files under sglang/kernels/ops/attention, unchanged, into empty packages, and writes what they import from
the rest of SGLang: functions about the hardware (NVIDIA or no GPU) and environment variables, whose use raises.
With FOLDER in PYTHONPATH, scripts/gpu_check.sh runs them with our score_mod. The files are SGLang's (Apache-2.0):
carried along, never committed.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
KERNELS = "kernels/ops/attention"
FILES = ("decode_attention.py", "extend_attention.py", "score_mod.py")
WRITTEN = {
    "srt/environ.py": '''
class envs:
    """SGLang's environment variables; the kernels ask for one on AMD only."""

    def __getattr__(self, name):
        raise AttributeError(f"{name}: scripts/sglang_kernels.py carries no environment variables")


envs = envs()
''',
    "srt/utils.py": """
import torch


def is_cuda():
    return torch.cuda.is_available()


def is_hip():
    return False


is_gfx95_supported = is_gfx1250_supported = is_hip


def get_device_core_count(device_id=0):
    return torch.cuda.get_device_properties(device_id).multi_processor_count
""",
}


def assemble(folder: Path) -> Path:
    """Writes FOLDER/sglang anew and returns FOLDER. ModuleNotFoundError without SGLang."""
    source = importlib.metadata.distribution("sglang")  # read, not imported: importing SGLang takes seconds
    root = folder / "sglang"
    shutil.rmtree(root, ignore_errors=True)
    for part in (KERNELS, "srt"):
        (root / part).mkdir(parents=True)
    for package in (root, *(path for path in root.rglob("*") if path.is_dir())):
        (package / "__init__.py").write_text("")
    (root / "__init__.py").write_text(f'"""Three kernel files of SGLang {source.version}."""\n')
    for name in FILES:
        shutil.copyfile(source.locate_file(f"sglang/{KERNELS}/{name}"), root / KERNELS / name)
    for name, text in WRITTEN.items():
        (root / name).write_text(text.lstrip())
    return folder


if __name__ == "__main__":
    print(assemble(Path(sys.argv[1]) if len(sys.argv) > 1 else REPO / "build" / "sglang_kernels"))
