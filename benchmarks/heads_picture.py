"""Draws docs/heads.png: how many of a document's tokens each layer and kv head keeps, over the mean.

    python benchmarks/heads_picture.py [--model NAME] [--budget 0.2] [--out docs/heads.png]

The mean over the development half of 16 documents of 1,536 tokens, with the server's default scorer and rule (needs the
texts that `keepkv eval` reads).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from matplotlib.figure import Figure

from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.settings.span_policy import span_policy
from keepkv_sglang.tools.evaluate.documents import documents
from keepkv_sglang.tools.evaluate.methods import compress_with, slots_of
from keepkv_sglang.tools.evaluate.probe import Probe
from keepkv_sglang.tools.models import cache
from keepkv_sglang.tools.places import REPO

TOKENS, ITEMS = 1536, 8


def shares(probe: Probe, ids: list[int], budget: float) -> torch.Tensor:
    """[layers, heads]: tokens that each keeps, over the mean."""
    row, config = probe.row(ids), KeepKVConfig(enabled=True, budget=budget)
    policy = span_policy(config, slots_of(budget, len(ids)), sinks=config.sinks)
    results = compress_with(row, config, policy)
    return torch.tensor([[result.kept.shape[1] for result in layer] for layer in results]) / policy.m


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--out", type=Path, default=REPO / "docs" / "heads.png")
    args = parser.parse_args()
    probe = Probe(str(cache.prepare(args.model)))
    folder = Path(os.environ.get("KEEPKV_DATA") or REPO.parent / "shared" / "data")
    found = [d for d in documents(probe.ids, folder, 2 * ITEMS, TOKENS, 1) if d.half == "dev"]
    mean = torch.stack([shares(probe, document.prompt, args.budget) for document in found]).mean(0).T
    figure = Figure(figsize=(9, 1.2 + 0.35 * len(mean)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(mean, aspect="auto", cmap="viridis", vmin=0)
    axes.set(xlabel="layer", ylabel="kv head", yticks=range(len(mean)))
    figure.colorbar(image, label="tokens kept / mean")
    figure.savefig(args.out, dpi=110)
    print(f"least {mean.min():.2f}, most {mean.max():.2f} of the mean; {args.out}")


if __name__ == "__main__":
    main()
