"""The dashboard and the alert rules name only metrics and labels that exist, and every metric has its panel."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import yaml
from sglang.srt.observability import metrics_collector

from keepkv_sglang.memory.votes import VOTE_BOUNDS
from keepkv_sglang.observe.families import GAUGES, NAMES, SECONDS, TOTALS, VOTES
from keepkv_sglang.runtime.watched import KINDS
from keepkv_sglang.tools.places import REPO
from tests.support.scrape import SGLANG

FOLDER = REPO / "examples" / "grafana"
DASHBOARD = json.loads((FOLDER / "keepkv.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]] + [rule["expr"] for rule in RULES]
OWN_LABELS = {family.full_name: {family.label} for family in (*TOTALS, *GAUGES)} | {SECONDS: {"kind", "le"}}
OWN_LABELS[VOTES] = {"gt", "le"}
SCRAPED = {"instance", *SGLANG}
SGLANGS_OWN = inspect.getsource(metrics_collector)


def metrics_in(expression: str) -> list[str]:
    """Names as they are in families.py: a histogram's three series are one metric."""
    return [re.sub(r"_(bucket|count|sum)$", "", name) for name in re.findall(r"\b(?:keepkv|sglang):\w+", expression)]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_names_and_labels_exist(expression):
    names = metrics_in(expression)
    assert names
    for name in names:
        if name.startswith("keepkv:"):
            assert name in NAMES
        else:
            assert f'name="{name}"' in SGLANGS_OWN, name
    known = SCRAPED.union(*(OWN_LABELS.get(name, set()) for name in names))
    asked = re.findall(r"(\w+)\s*(?:=~|!=|=)\s*\"", expression)
    for grouped in re.findall(r"by \(([^)]*)\)", expression):
        asked += [label.strip() for label in grouped.split(",")]
    assert set(asked) <= known
    assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")


def test_every_metric_has_a_panel():
    seen = {name for panel in PANELS for target in panel["targets"] for name in metrics_in(target["expr"])}
    assert set(NAMES) <= seen


def test_panels_have_a_place_of_their_own_and_the_variables():
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not mine & cells, panel["title"]
        cells |= mine
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS:
        assert panel["title"] and panel["description"] and panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["legendFormat"] and 'model_name=~"$model"' in target["expr"]
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "model"]


def test_label_values_in_queries_exist():
    values = {(family.full_name, family.label): set(family.reads) for family in (*TOTALS, *GAUGES)}
    values[SECONDS, "kind"] = set(KINDS)
    values[VOTES, "le"] = {*(f"{bound:g}" for bound in VOTE_BOUNDS), "+Inf"}
    asked = set()
    for expression in EXPRESSIONS:
        for name, selector in re.findall(r"(keepkv:\w+)\{([^}]*)\}", expression):
            asked |= {
                (*metrics_in(name), label, value) for label, value in re.findall(r"(\w+)!?=\"([^\"]*)\"", selector)
            }
    assert all(value in values[name, label] for name, label, value in asked)
    assert {value for name, _, value in asked if name == VOTES} == values[VOTES, "le"], "every bucket is shown"


def test_every_alert_says_what_it_is_and_what_to_do():
    assert len({rule["alert"] for rule in RULES}) == len(RULES) >= 8
    for rule in RULES:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"].startswith("KeepKV: ") and rule["annotations"]["description"].endswith(
            "."
        )


def test_every_metric_is_explained_in_usage():
    page = (REPO / "docs" / "usage.md").read_text()
    for name in NAMES:
        assert any(line.startswith("|") and f"`{name}`" in line for line in page.splitlines()), name
