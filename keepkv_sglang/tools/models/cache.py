"""Folders of converted models under ``${KEEPKV_CACHE:-~/.cache/keepkv}/models``, each made once.

A folder appears whole or not at all; one process makes it under a lock file while the others wait.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from keepkv_sglang.tools.models.catalogue import DEFAULT, MODELS, Model
from keepkv_sglang.tools.models.convert import convert
from keepkv_sglang.tools.models.download import fetch
from keepkv_sglang.tools.models.say import ModelError, gigabytes, say
from keepkv_sglang.tools.places import cache_folder
from keepkv_sglang.tools.report import tables

MANIFEST = "keepkv-model.json"
RECIPE = 2  # raise it when convert() writes something else, so that cached folders are made again


def default_cache_dir() -> Path:
    """Folder that holds converted models."""
    return cache_folder() / "models"


def prepare(name: str | None = None, cache_dir: Path | None = None, force: bool = False) -> Path:
    """The folder of a model, made first when needed.

    name: of catalogue.MODELS (None: the default), a GGUF file, or a Hugging Face folder, which is returned as it is.
    Progress goes to stderr. ModelError (a ValueError) with one clear line.
    """
    cache_dir = Path(cache_dir).absolute() if cache_dir else default_cache_dir()
    model = MODELS.get((name or DEFAULT).lower())
    if model is not None:
        return made_once(
            cache_dir / model.folder, model.sha256, lambda work: _from_parts(model, cache_dir, work), force
        )
    path = Path(name or "").expanduser().absolute()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} holds no config.json: it is no Hugging Face model folder")
        return path
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path} is no GGUF file")
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
        return made_once(cache_dir / f"{path.stem}-{found[:8]}", found, lambda work: convert(path, work, None), force)
    known = ", ".join(MODELS)
    raise ModelError(f"unknown model {name!r}: use one of {known}, a Hugging Face folder or a GGUF file")


def resolve(name: str | None = None) -> str:
    """As prepare(), but a model hub's name ("organisation/model") is returned as it is, for SGLang or transformers."""
    if name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists():
        return name
    return str(prepare(name))


def listing(cache_dir: Path | None = None) -> str:
    """A table of the catalogue and of what is there already."""
    cache_dir = Path(cache_dir).absolute() if cache_dir else default_cache_dir()
    lines = [
        (
            model.name, *map(gigabytes, (model.bytes, model.folder_bytes, model.disk_bytes)), model.licence,
            f"{model.seconds} s", "yes" if is_complete(cache_dir / model.folder, model.sha256) else "no",
        )
        for model in MODELS.values()
    ]  # fmt: skip
    columns = ("name", "download", "folder", "disk while made", "licence", "time", "here")
    return tables.markdown(columns, lines, text=(0, 4, 6))


def is_complete(folder: Path, sha256: str) -> bool:
    """True when `folder` holds this recipe's conversion of that GGUF file, with every file at its full size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if (manifest["recipe"], manifest["gguf_sha256"]) != (RECIPE, sha256):
            return False
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False  # no manifest, or not one of ours: convert again


def made_once(target: Path, sha256: str, make: Callable[[Path], None], force: bool) -> Path:
    """`target`, filled by make(an empty folder beside it) unless it is complete."""
    if not force and is_complete(target, sha256):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f".{target.name}.lock"):
            if not force and is_complete(target, sha256):  # made by another process while this one waited
                return target
            for left in target.parent.glob(f".{target.name}.work.*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f".{target.name}.work.", dir=target.parent))
            try:
                start = time.monotonic()
                made = work / target.name
                made.mkdir()
                make(made)
                _write_manifest(made, sha256)
                _publish(made, target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            say(f"done in {time.monotonic() - start:.0f} s: {gigabytes(_total_bytes(target))}")
    except Exception as error:
        if not _disk_full(error):
            raise
        where = f"the disk of {target.parent} is full"
        raise ModelError(f"{where}; nothing half made was left: free some and run the command again") from error
    return target


def _disk_full(error: Exception) -> bool:
    """Also as safetensors says it, which raises an error of its own."""
    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in str(error)


def _from_parts(model: Model, cache_dir: Path, work: Path) -> None:
    free = shutil.disk_usage(cache_dir).free
    disk, folder = gigabytes(model.disk_bytes), gigabytes(model.folder_bytes)
    needs = f"{model.name} needs {disk} of disk while it is made, {folder} afterwards"
    say(f"{needs}; {gigabytes(free)} are free; about {model.seconds} s")
    parts = cache_dir / f".{model.folder}.parts"
    there = _total_bytes(parts)
    if free + there < model.disk_bytes:
        raise ModelError(f"{needs}, and {cache_dir} has {gigabytes(free)}: free some, or choose another --cache-dir")
    joined = fetch(model, parts)
    try:
        convert(joined, work, model.end_of_turn)
    finally:
        joined.unlink(missing_ok=True)
    shutil.rmtree(parts, ignore_errors=True)


def _write_manifest(folder: Path, sha256: str) -> None:
    """Last file of a conversion: what was made, from what, by what."""
    files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    versions = {}
    for name in ("torch", "transformers", "gguf"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    manifest = {"model": folder.name, "recipe": RECIPE, "gguf_sha256": sha256, "versions": versions, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _publish(made: Path, target: Path) -> None:
    """Puts `made` in the place of `target`. A reader of an old folder keeps its open files."""
    if target.exists():
        # os.replace cannot replace a folder that is not empty: move the old one aside first, into what is removed.
        os.replace(target, made.parent / "old")
    os.replace(made, target)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`. The kernel drops it when the process dies, so none is ever stale."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is making the model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _total_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
