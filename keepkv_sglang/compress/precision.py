"""Products of float32 are float32's, whatever a model or a user switched on for its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

EXACT = "ieee"


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 on a GPU and no bfloat16 on a CPU inside: scores, fits and the search for the nearest key subtract
    numbers that are close to each other. Puts back what was set before."""
    places = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = EXACT
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
