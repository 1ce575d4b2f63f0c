"""What a GPU machine without a network and without SGLang needs to run a real SGLang server with KeepKV.

    python scripts/sglang_server.py [FOLDER]     default: build/gpu_server, which git ignores

For a machine that has torch, Triton, transformers and nvcc. Written, 27 MB:
  wheels/            of what SGLang imports and such a machine lacks, for Python 3.12 on x86-64
  sglang.tar.xz      the installed SGLang without its diffusion models, and the metadata of it and of KeepKV
  shim/              sitecustomize.py: empty stand-ins for packages that are imported and not needed
  model/             the demo model without its weights
The wheel with SGLang's own CUDA kernels has 1 GB and is a stand-in too: a call of one of them raises. With
SGLANG_FORCE_FUSED_OP_BACKEND=torch and Triton attention nothing calls them. Such a server costs more than SGLang's.
All of it is other projects' work: carried along, never committed.

scripts/sglang_server.sh unpacks it there.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePath

REPO = Path(__file__).resolve().parent.parent
# fmt: off
WHEELS = (
    "annotated-types", "apache-tvm-ffi", "compressed-tensors", "dill", "distro", "fastapi", "gguf", "jiter",
    "jsonschema", "jsonschema-specifications", "loguru", "msgspec", "openai", "openai-harmony", "opentelemetry-api",
    "orjson", "partial-json-parser", "pybase64", "pydantic", "pydantic-core", "python-multipart", "pyzmq",
    "referencing", "rpds-py", "setproctitle", "sniffio", "starlette", "tabulate", "typing-inspection", "uvicorn",
    "xgrammar",
)
# fmt: on
PLATFORMS = ("2_28", "2_27", "2_26", "2_24", "2_17", "2_5")
METADATA = ("sglang", "sglang-kernel", "keepkv-sglang")
LEFT_OUT = ("multimodal_gen", "__pycache__", "*.so")  # the last are for this Python, and SGLang runs without
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
STAND_INS = ("IPython", "sgl_kernel", "soundfile")
SHIM = f'''
"""Empty stand-ins for packages that SGLang imports and this server does not use."""

import importlib.abc
import importlib.machinery
import sys
import types

ABSENT = {STAND_INS!r}


class Absent:
    """Whatever an absent package holds: importable, an error when called."""

    def __init__(self, name="?"):
        self.name = name

    def __call__(self, *args, **kwargs):
        raise RuntimeError(f"{{self.name}} is not here: its package was not carried along (scripts/sglang_server.py)")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{{self.name}}.{{name}}")


class Module(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "weak_ref_tensor":  # a CUDA graph then keeps its tensors: memory, not results
            return lambda tensor: tensor
        if name == "is_arch_support_pdl":  # launches that overlap: speed, not results
            return lambda: False
        return type(name, (), {{}}) if name[:1].isupper() else Absent(f"{{self.__name__}}.{{name}}")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(Finder())
# SGLang's fused MLP of small models, in a language of NVIDIA's that is not carried along: not for these weights.
name = "sglang.kernels.ops.gemm.cutedsl_dual_gemm"
fused = sys.modules[name] = types.ModuleType(name)
fused.MAX_DUAL_GEMM_DECODE_TOKENS = 0
fused.DualGemmQuantMode = types.SimpleNamespace(UNQUANT=None)
fused.can_use_dual_gemm = lambda *args, **kwargs: False
'''


def _wheels(folder: Path) -> None:
    """The installed version of each, or the newest that is there for that Python."""
    common = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    common += ["--python-version", "3.12", "--implementation", "cp"]
    common += [part for tag in PLATFORMS for part in ("--platform", f"manylinux_{tag}_x86_64")]
    common += ["--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64"]
    for name in WHEELS:
        try:
            wanted = [f"{name}=={importlib.metadata.version(name)}", name]
        except importlib.metadata.PackageNotFoundError:
            wanted = [name]
        if not any(subprocess.run([*common, one], capture_output=True).returncode == 0 for one in wanted):
            raise SystemExit(f"sglang_server: no wheel of {name} for Python 3.12 on x86-64")


def assemble(folder: Path) -> Path:
    """Writes FOLDER anew and returns it. PackageNotFoundError without SGLang or KeepKV."""
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("wheels", "shim", "model"):
        (folder / part).mkdir(parents=True)
    _wheels(folder / "wheels")
    (folder / "shim" / "sitecustomize.py").write_text(SHIM.lstrip())
    with tarfile.open(folder / "sglang.tar.xz", "w:xz") as archive:
        for name in METADATA:
            found = importlib.metadata.distribution(name)
            info = Path(str(found.locate_file(f"{name.replace('-', '_')}-{found.version}.dist-info")))
            archive.add(info, info.name)
        source = Path(str(importlib.metadata.distribution("sglang").locate_file("sglang")))
        archive.add(source, "sglang", filter=lambda one: None if any(map(PurePath(one.name).match, LEFT_OUT)) else one)
    model = subprocess.run(
        [sys.executable, "-m", "keepkv_sglang.cli", "model"], stdout=subprocess.PIPE, text=True, check=True, cwd=REPO
    )
    for name in MODEL_FILES:
        shutil.copy(Path(model.stdout.strip().splitlines()[-1]) / name, folder / "model")
    return folder


if __name__ == "__main__":
    print(assemble(Path(sys.argv[1]) if len(sys.argv) > 1 else REPO / "build" / "gpu_server"))
