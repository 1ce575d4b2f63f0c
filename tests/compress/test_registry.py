"""Scorers and merge rules by name, path and entry point: what is refused, and by whom it may be asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from keepkv_sglang.compress import registry
from keepkv_sglang.compress.layer import compress_layer
from keepkv_sglang.compress.rules.base import Clusters, Merged
from keepkv_sglang.compress.select import SpanPolicy
from keepkv_sglang.settings import config as config_module
from keepkv_sglang.settings.config import OPTIONS, ConfigError, KeepKVConfig
from keepkv_sglang.tools.places import REPO
from tests.support.layers import random_layer

NUMBER = 7


def shortest_key(window, pool_kernel):
    return -window.k.norm(dim=2)


shortest_key.needs_queries = False  # type: ignore[attr-defined]


def no_arguments():
    raise AssertionError


def one_score_per_head(window, pool_kernel):
    return window.k.sum(dim=(1, 2))


def not_a_number(window, pool_kernel):
    return window.lv * torch.nan


def first_only(c: Clusters) -> Merged:
    return Merged(*c.means(c.members(c.lv)))


def not_merged(c):
    return c.k


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """This file under a fixed name: pytest's import mode gives it one of its own."""
    monkeypatch.setitem(sys.modules, "policies_of_a_test", sys.modules[__name__])
    registry._get.cache_clear()
    yield
    registry._get.cache_clear()


layer = partial(random_layer, 40, group=2, votes=0.0, dtype=torch.float32)


@pytest.mark.parametrize("name", config_module.SCORERS)
@pytest.mark.parametrize("chunk", [1, 4])
def test_every_named_scorer_runs(name, chunk):
    config = KeepKVConfig(enabled=True, scorer=name, chunk=chunk)
    assert name in OPTIONS["scorer"].help
    result = compress_layer(layer(), SpanPolicy(10, config.merge, 4, 2, 0.5, scorer=config.scorer, chunk=config.chunk))
    assert result.kept.shape == (2, 10) and result.k.isfinite().all()


def test_names_are_part_of_the_entrys_key():
    keys = {KeepKVConfig(enabled=True, scorer=s).fingerprint() for s in config_module.SCORERS}
    keys |= {KeepKVConfig(enabled=True, chunk=c).fingerprint() for c in (2, 8)}
    keys |= {KeepKVConfig(enabled=True, merge=m).fingerprint() for m in config_module.MERGE_RULES}
    assert len(keys) == len(config_module.SCORERS) + 2 + len(config_module.MERGE_RULES) - 1  # the default, twice


def test_a_path_by_flag_but_not_by_request():
    config = KeepKVConfig(enabled=True, scorer="policies_of_a_test:shortest_key", merge="policies_of_a_test:first_only")
    x, p = layer(), SpanPolicy(10, config.merge, 0, 0, 0.3, scorer=config.scorer, strong_fraction=0.0)
    result = compress_layer(x, p)
    expected = (-x.k.norm(dim=2)).T.topk(10).indices.sort(dim=1).values
    assert torch.equal(result.kept, expected)
    x = replace(x, q=x.q[:0], q_index=x.q_index[:0])
    mean = compress_layer(x, SpanPolicy(10, "mean", 0, 0, 0.3, scorer=config.scorer, strong_fraction=0.0))
    assert torch.equal(mean.kept, expected)  # it needs no queries, and says so
    assert config.with_request({"budget": 0.5}).scorer == config.scorer
    assert config.with_request({"scorer": "tova", "merge": "mean", "chunk": 8}).scorer == "tova"
    for key, value in (("scorer", config.scorer), ("merge", "os:system"), ("scorer", "policies_of_a_test:layer")):
        with pytest.raises(ConfigError, match=f"{key} is a path, and a request must not import code.*--keepkv-{key}"):
            config.with_request({key: value})


def test_a_request_imports_nothing(monkeypatch):
    imported = []
    monkeypatch.setattr(registry, "import_module", imported.append)
    for bad in ("os:system", "os.path", "x", "h2o", "", 3, None, ["snapkv"], "keepkv_sglang.compress.scorers.snapkv"):
        with pytest.raises(ConfigError, match="scorer"):
            KeepKVConfig(enabled=True).with_request({"scorer": bad})
    assert not imported


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scorer", "sum", "unknown scorer 'sum': use one of snapkv, .* or a path package.module:function"),
        ("scorer", "h2o", "'h2o' needs the attention of every query"),
        ("scorer", "no_such_module:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("scorer", "policies_of_a_test:f", "cannot be imported: AttributeError"),
        ("scorer", "policies_of_a_test:NUMBER", "is not a function"),
        ("scorer", "policies_of_a_test:no_arguments", "failed on a trial of eight tokens: TypeError"),
        ("scorer", "policies_of_a_test:one_score_per_head", r"must return a float tensor \[H, n\] = \(2, 8\), not \(2"),
        ("scorer", "policies_of_a_test:not_a_number", "returned NaN"),
        ("scorer", ":", "cannot be imported"),
        ("merge", "sum", "unknown merge rule 'sum': use one of least_squares, tangent"),
        ("merge", "policies_of_a_test:not_merged", "must return keepkv_sglang.policy.Merged, not Tensor"),
        ("chunk", 0, "chunk 0 is out of range"),
        ("chunk", "x", "chunk 'x' is not a whole number"),
    ],
)
def test_what_cannot_work_stops_the_start(field, value, message):
    with pytest.raises(ConfigError, match=message):
        KeepKVConfig(enabled=True, **{field: value})


EXAMPLES = REPO / "examples"
SCRIPT = """
import torch
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.compress.layer import LayerInput, compress_layer
from keepkv_sglang.compress.select import SpanPolicy
import sys
config = KeepKVConfig(enabled=True, request_keys="scorer")
config = config.with_request({"scorer": sys.argv[1]}) if sys.argv[2:] else None
config = config or KeepKVConfig(enabled=True, scorer=sys.argv[1])
k = torch.randn(40, 2, 8, generator=torch.Generator().manual_seed(0))
v = torch.zeros_like(k)
v[[3, 17]] = 5.0  # two values unlike all others
x = LayerInput(k[-4:], torch.arange(36, 40), k[:0], k[:0, :, 0], k, v, torch.zeros(40, 2), 0.1)
print(compress_layer(x, SpanPolicy(2, config.merge, 0, 0, 0.6, scorer=config.scorer)).kept.tolist())
"""


def run_script(path: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], env=env, cwd=EXAMPLES.parent, text=True,
                          capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_example_by_path():
    assert len((EXAMPLES / "new_policy.py").read_text().splitlines()) == 15
    assert run_script(EXAMPLES, "new_policy:unusual") == "[[3, 17], [3, 17]]"


def test_the_example_as_an_installed_entry_point(tmp_path):
    """An installed package gives it a name, and a name may come from a request where the server opens the key."""
    (tmp_path / "new_policy.py").write_text((EXAMPLES / "new_policy.py").read_text())
    info = tmp_path / "new_policy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: new-policy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[keepkv_sglang.scorers]\nunusual = new_policy:unusual\n")
    assert run_script(tmp_path, "unusual", "by request") == "[[3, 17], [3, 17]]"
