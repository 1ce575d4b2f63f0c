"""keepkv eval on a GPU machine without a network, to which only some 60 MB can be brought at a time.

Here:    python scripts/gpu_eval.py pack MODEL...     build/gpu_eval: texts, the library's texts of this Python, wheels;
                                                      build/gpu_eval-MODEL-KK: the model's GGUF file in pieces
There, in the repository's root, one call after the other, each of which carries build/gpu_eval or one piece:
         python3 scripts/gpu_eval.py start STAGES     leaves workers running that wait for their models
         python3 scripts/gpu_eval.py say              rows per task, failures; packs the rows into $OUT/gpu_eval.tgz
Here:    keepkv eval --report --device cuda --model MODEL --out gpu_eval/MODEL      of the unpacked file

STAGES: lines `MODEL OPTIONS of keepkv eval`; each of WORKERS processes does its --part of every line, in order.
Ten workers kept an H200 at 100 %, and a call that carries a piece took 7 s there: seen with the draft of this script.
This form has run on a CPU only (start --device cpu). build/ is ignored by git.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PIECE = 61_000_000  # bytes: with the checkout below 64 MiB
WORKERS = 10
THERE = Path("/tmp/gpu_eval")  # a copy of the checkout, the models and the rows: later calls replace the checkout
SHIM = '''"""Texts of Python's library are those of the machine that packed them."""
import sys
import sysconfig
from pathlib import Path

installed = sysconfig.get_path


def get_path(name, *args, **kwargs):
    if name == "stdlib" and sys._getframe(1).f_globals.get("__name__", "").endswith("evaluate.documents"):
        return str(Path(__file__).resolve().parent.parent / "library")
    return installed(name, *args, **kwargs)


sysconfig.get_path = get_path
'''


def pack(names: list[str]) -> None:
    # The package is imported where it is used: `start` and `say` run where it is not installed.
    from keepkv_sglang.tools.evaluate.documents import LIBRARY
    from keepkv_sglang.tools.models.catalogue import MODELS
    from keepkv_sglang.tools.models.download import fetch
    from keepkv_sglang.tools.places import data_folder

    folder = REPO / "build" / "gpu_eval"
    shutil.rmtree(folder, ignore_errors=True)
    unused = shutil.ignore_patterns("mooncake", "azure*", "agent_traces")
    shutil.copytree(data_folder(None, "SOURCES.md"), folder / "data", ignore=unused)
    library = Path(sysconfig.get_path("stdlib"))
    for name in LIBRARY:
        target = folder / "library" / f"{name}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library / f"{name}.py", target)
    shutil.copytree(library / "pydoc_data", folder / "shim" / "pydoc_data", ignore=shutil.ignore_patterns("*.pyc"))
    (folder / "shim" / "sitecustomize.py").write_text(SHIM)
    wheels = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder / "wheels"), "gguf"]
    subprocess.run(wheels, check=True)
    for name in names:
        with fetch(MODELS[name], REPO / "build" / f"parts-{name}").open("rb") as file:
            for number, piece in enumerate(iter(lambda file=file: file.read(PIECE), b"")):
                part = REPO / "build" / f"gpu_eval-{name}-{number:02d}"
                part.mkdir(exist_ok=True)
                (part / "piece").write_bytes(piece)
        shutil.rmtree(REPO / "build" / f"parts-{name}")
        print(f"{name}: {number + 1} pieces")


def start(stages: Path, device: str) -> None:
    """Copies the checkout away, and leaves one process running that makes models, and WORKERS that evaluate."""
    tree = THERE / "tree"
    tree.mkdir(parents=True)
    for name in ("keepkv_sglang", "kernels", "radix", "scripts"):
        shutil.copytree(REPO / name, tree / name, symlinks=True)
    shutil.copytree(REPO / "build" / "gpu_eval", THERE / "packed")
    shutil.copy(stages, THERE / "stages")
    (THERE / "rows").mkdir()
    wheels = [str(wheel) for wheel in (THERE / "packed" / "wheels").glob("*.whl")]
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(THERE / "site")]
    subprocess.run([*install, *wheels], check=True)
    paths = [THERE / "packed" / "shim", tree, THERE / "site"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "KEEPKV_CACHE": str(THERE / "cache"), "HF_HUB_OFFLINE": "1",
        "KEEPKV_DATA": str(THERE / "packed" / "data"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for number in range(WORKERS + 1):
        command = [sys.executable, str(tree / "scripts" / "gpu_eval.py"), "work", str(number)]
        command += ["--device", device, "--pieces", str(REPO / "build")]
        with (THERE / f"log-{number}").open("w") as log:
            subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def work(number: int, device: str, pieces: Path) -> None:
    """Worker 0 makes the models of the stages; worker I does part I of each stage."""
    stages = [line.split(None, 1) for line in (THERE / "stages").read_text().splitlines() if line.strip()]
    if number == 0:
        for name in dict.fromkeys(name for name, _ in stages):
            _make(name, pieces)
        return
    # As in pack().
    from keepkv_sglang.tools.models import cache
    from keepkv_sglang.tools.models.catalogue import MODELS

    for name, options in stages:
        model = MODELS[name]
        while not cache.is_complete(cache.default_cache_dir() / model.folder, model.sha256):
            time.sleep(1)
        command = [sys.executable, "-m", "keepkv_sglang.cli", "eval", "--model", name, "--device", device]
        command += ["--part", f"{number}/{WORKERS}", "--threads", "1", "--out", str(THERE / "rows" / name)]
        began = time.monotonic()
        done = subprocess.run([*command, *shlex.split(options)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        with (THERE / "rows" / f"worker-{number}.log").open("a") as log:
            log.write(f"exit status {done.returncode}, {time.monotonic() - began:.0f} s: {name} {options}\n")
            log.write(done.stderr.decode()[-1500:] if done.returncode else "")


def _make(name: str, pieces: Path) -> None:
    # As in pack().
    from keepkv_sglang.tools.models import cache
    from keepkv_sglang.tools.models.catalogue import MODELS
    from keepkv_sglang.tools.models.convert import convert

    model, joined, data = MODELS[name], THERE / f"{name}.gguf", b""
    while hashlib.sha256(data).hexdigest() != model.sha256:
        time.sleep(1)
        parts = sorted(pieces.glob(f"gpu_eval-{name}-*/piece"))
        whole = sum(part.stat().st_size for part in parts) >= model.bytes
        data = b"".join(part.read_bytes() for part in parts) if whole else b""
    joined.write_bytes(data)
    target = cache.default_cache_dir() / model.folder
    cache.made_once(target, model.sha256, lambda folder: convert(joined, folder, model.end_of_turn), force=False)


def say() -> None:
    for folder in sorted((THERE / "rows").glob("*/")):
        rows = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()[1:]]
        print(folder.name, dict(collections.Counter(json.loads(row)["task"] for row in rows if row.endswith("}"))))
    for log in sorted((THERE / "rows").glob("worker-*.log")):
        failed = [line for line in log.read_text().splitlines() if not line.startswith("exit status 0")]
        print(log.name, log.read_text().count("exit status"), "stages", *failed[-8:], sep="\n  " if failed else " ")
    if out := os.environ.get("OUT"):
        with tarfile.open(Path(out) / "gpu_eval.tgz", "w:gz") as archive:
            archive.add(THERE / "rows", "gpu_eval")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pack").add_argument("models", nargs="+")
    commands.add_parser("start").add_argument("stages", type=Path)
    commands.add_parser("work").add_argument("number", type=int)
    commands.add_parser("say")
    for name in ("start", "work"):
        commands.choices[name].add_argument("--device", default="cuda")
    commands.choices["work"].add_argument("--pieces", type=Path)
    args = parser.parse_args()
    if args.command == "pack":
        pack(args.models)
    elif args.command == "start":
        start(args.stages, args.device)
    elif args.command == "work":
        work(args.number, args.device, args.pieces)
    else:
        say()


if __name__ == "__main__":
    main()
