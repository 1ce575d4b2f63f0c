"""What docs/method.md says is exact, beyond test_properties.py; and the files that it names exist."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from keepkv_sglang.compress.layer import merge_from_assignment
from keepkv_sglang.tools.places import REPO
from tests.support.layers import F64, log_masses, output, random_layer

MERGING = ("mean", "zip", "tangent", "least_squares", "value_refit", "attention_matching")
KEPT = torch.arange(4)[None]
ASSIGN = (torch.arange(12) % 4)[None]  # nothing is dropped
# One kv head, votes from 1 to e; every query sees all tokens.
layer = partial(random_layer, 12, heads=1, dim=6, noise=1.0, votes=1.0, sees_all=True)


@pytest.mark.parametrize("rule", ["least_squares", "value_refit"])
@pytest.mark.parametrize("seed", range(5))
def test_the_one_query_of_least_squares_gets_its_output_back(rule, seed):
    """What the key leaves is one number per cluster, which the votes take up; the clamp is far."""
    x = layer(1, group=1, seed=seed)
    merged = merge_from_assignment(x, KEPT, ASSIGN, rule)
    expected = output(x.q[:, 0], x, x.k, x.v, x.lv)
    torch.testing.assert_close(output(x.q[:, 0], x, *merged), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", MERGING)
def test_members_with_equal_keys_are_one_slot_for_every_query(rule):
    x = layer(5)
    x = replace(x, k=x.k[:4].repeat(3, 1, 1))
    merged = merge_from_assignment(x, KEPT, ASSIGN, rule)
    later = torch.randn(50, 6, dtype=F64, generator=torch.Generator().manual_seed(1)) * 3
    expected = output(later, x, x.k, x.v, x.lv)
    torch.testing.assert_close(output(later, x, *merged), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_mean_gives_the_query_it_is_built_on_too_much_of_each_cluster(seed):
    x = layer(1, group=1, seed=seed)
    k, _, lv = merge_from_assignment(x, KEPT, ASSIGN, "mean")
    before, after = (log_masses(x.q[:, 0], *one, x.scale) for one in ((x.k[:, 0], x.lv[:, 0]), (k[:, 0], lv[:, 0])))
    true = torch.stack([torch.logsumexp(before[:, ASSIGN[0] == c], 1) for c in range(4)], 1)
    assert (after > true).all()


@pytest.mark.parametrize("rule", ["mean", "zip", "tangent", "least_squares"])
def test_a_vector_added_to_all_keys_changes_zip_alone(rule):
    """It adds one number to all logits of a query, which attention does not notice."""
    x, u = layer(5), torch.linspace(-2, 3, 6, dtype=F64)
    here = merge_from_assignment(x, KEPT, ASSIGN, rule)
    there = merge_from_assignment(replace(x, k=x.k + u), KEPT, ASSIGN, rule)
    moved = float((there[0] - u - here[0]).abs().max())
    if rule == "zip":
        assert moved > 0.1
    else:
        assert moved < 1e-9
        torch.testing.assert_close(there[1:], here[1:])


@pytest.mark.parametrize("page", ["method.md", "seams.md"])
def test_the_files_it_names_exist(page):
    paths = re.findall(r"`([\w/]+(?:/|\.py))`", (REPO / "docs" / page).read_text())
    roots = (REPO, REPO / "keepkv_sglang")
    missing = {path for path in paths if not any((root / path).exists() for root in roots)}
    assert paths and not missing
