"""What /metrics says, as numbers by name and labels."""

from __future__ import annotations

import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

SGLANG = ("model_name", "engine_type", "tp_rank", "pp_rank", "moe_ep_rank")
"""Labels that SGLang's scheduler puts on each of its metrics, and we on each of ours."""


class Scrape:
    """One look at a server's /metrics."""

    def __init__(self, base_url: str) -> None:
        with urllib.request.urlopen(f"{base_url}/metrics", timeout=60) as answer:
            self.families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
        self._samples = [sample for family in self.families.values() for sample in family.samples]

    def __getitem__(self, name: str) -> float:
        """Sum of a sample over all its labels; KeyError where there is none."""
        found = [sample.value for sample in self._samples if sample.name == name]
        if not found:
            raise KeyError(name)
        return sum(found)

    def by(self, name: str, label: str) -> dict[str, float]:
        """A sample's values by one of its labels."""
        values: dict[str, float] = {}
        for sample in self._samples:
            if sample.name == name:
                values[sample.labels[label]] = values.get(sample.labels[label], 0) + sample.value
        return values

    def labels(self, name: str) -> list[dict[str, Any]]:
        """The labels of each of a sample's series."""
        return [sample.labels for sample in self._samples if sample.name == name]
