"""Quality of compressed spans: selection without queries, and long turns cut into pieces.

    python benchmarks/bench_span_quality.py [--documents 16] [--only cold|cut] [--all] [--json OUT] [--data FOLDER]

`cold`: a cached span of 1,024 tokens is compressed while no request runs over it, so that no queries are at
hand. `cut`: a prompt of 1,536 tokens is compressed in pieces, each by its own last 32 queries, against in one
piece. In both, 128 tokens are then teacher-forced on the compressed cache at their logical positions: KL to the full
cache (geometric mean over documents), equal top-1 tokens, and the ratio of KL to a base line with a 95 %
bootstrap interval over documents. Half of the documents are for choosing (dev), half for reporting (held-out).
16 documents take about 10 minutes on two free cores.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from span_quality import FOLLOWING, Layer, SpanProbe
from tqdm import tqdm

from keepkv_sglang.compress.layer import LayerInput, compress_layer, merge_from_assignment
from keepkv_sglang.compress.queries.pseudo import PseudoQueries, calibration_rows
from keepkv_sglang.compress.queries.rotary import Rotary
from keepkv_sglang.compress.select import SpanPolicy, match, select
from keepkv_sglang.memory.calibration import CALIBRATION
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.settings.span_policy import span_policy
from keepkv_sglang.tools.evaluate.documents import Document, documents
from keepkv_sglang.tools.evaluate.future import half_turn
from keepkv_sglang.tools.evaluate.probe import Slots
from keepkv_sglang.tools.places import data_folder
from keepkv_sglang.tools.report import tables
from keepkv_sglang.tools.report.statistics import geometric_mean, paired_ratio

COLD_TOKENS, CUT_TOKENS = 1024, 1536
BUDGETS = (0.1, 0.2)
WINDOW, FUTURE, SINKS = 32, 512, 4
EPSILON = 0.01  # Expected Attention, added to the normalised expectation
BASE = {"cold": "keydiff evict", "cut": "uncut"}
# What was left after the dev half; everything else runs with --all.
MAIN = (
    "random evict", "keydiff evict", "keydiff pooled mean", "pseudo 32 evict", "pseudo 32 mean",
    "pseudo 32 least_squares", "snapkv true window evict", "snapkv true window least_squares",
    "uncut least_squares", "1024, recent in each least_squares", "512, recent in each least_squares",
    "256, recent in each least_squares", "512, recent in the last least_squares",
    "256, recent in the last least_squares", "uncut evict", "512, recent in each evict", "256, recent in each evict",
)  # fmt: skip


# Scores without queries. Each takes one layer's span, k and v [H, n, D], and returns [H, n]


def keydiff(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """KeyDiff, arXiv 2504.15364."""
    anchor = F.normalize(k, dim=2).mean(dim=1, keepdim=True)
    return -F.cosine_similarity(k, anchor, dim=2)


def pooled(score: torch.Tensor) -> torch.Tensor:
    """The default policy's pooling."""
    return F.avg_pool1d(score[:, None], 7, 1, 3, count_include_pad=False)[:, 0]


def lagkv(k: torch.Tensor, v: torch.Tensor, lag: int = 128) -> torch.Tensor:
    """LagKV, arXiv 2504.04704: spread over channels, after scaling by the range of the next `lag` tokens. The
    last partition is scaled by its own range."""

    def spread(x: torch.Tensor) -> torch.Tensor:
        parts = x.view(x.shape[0], -1, lag, x.shape[2])
        after = torch.cat((parts[:, 1:], parts[:, -1:]), 1)
        low, high = after.amin(2, keepdim=True), after.amax(2, keepdim=True)
        return ((parts - low) / (high - low)).std(dim=3).softmax(dim=2).flatten(1)

    score = spread(k) + spread(v)
    return score.view(score.shape[0], -1, lag).argsort(2).argsort(2).flatten(1).to(k.dtype)


def leverage(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Ridge leverage of keys (Compactor, arXiv 2507.08143), exact, lambda = 0.01 x mean diagonal of K^T K."""
    gram = k.mT @ k
    ridge = 0.01 * gram.diagonal(dim1=1, dim2=2).mean(1)
    gram = gram + ridge[:, None, None] * torch.eye(k.shape[2])
    return (k * torch.linalg.solve(gram, k.mT).mT).sum(2)


def at_random(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(round(float(k[0, 0, 0]) * 1e6) % 2**31)
    return torch.rand(k.shape[:2], generator=generator)


class Moments(NamedTuple):
    """Of one layer's queries before RoPE: mu [Hq, D], sigma [Hq, D, D]."""

    mu: torch.Tensor
    sigma: torch.Tensor


@dataclass
class Calibration:
    """What the fixed text gives: per layer, queries before RoPE [T, Hq, D] and their moments."""

    queries: list[torch.Tensor]
    moments: list[Moments]
    product: dict[int, PseudoQueries]

    @staticmethod
    def of(probe: SpanProbe) -> Calibration:
        tokens = probe.tokenizer(CALIBRATION)["input_ids"]
        layers, _ = probe.prefill(tokens, 1)
        positions = torch.arange(len(tokens))
        queries = [probe.rotate(layer.q, positions, back=True)[SINKS:] for layer in layers]
        moments = []
        for q in queries:
            centred = q - q.mean(0)
            moments.append(Moments(q.mean(0), torch.einsum("thd,the->hde", centred, centred) / len(q)))
        rows = torch.tensor(calibration_rows(len(tokens), WINDOW))
        cos, sin = probe.model.model.rotary_emb(layers[0].q, torch.arange(8192)[None])
        half = cos.shape[2] // 2
        table = torch.cat((cos[0, :, :half], sin[0, :, :half]), 1)
        product = PseudoQueries(torch.stack([layer.q[rows] for layer in layers]), rows, Rotary(table))
        return Calibration(queries, moments, {WINDOW: product})

    def pseudo(self, probe: SpanProbe, layer: int, start: int, count: int, step: int = 1) -> torch.Tensor:
        """[count, Hq, D]: queries spread evenly over the text, at positions start, start + step, ..."""
        if step == 1:
            return self.product[count].behind(layer, start)
        q = self.queries[layer]
        index = torch.arange(count) * len(q) // count
        return probe.rotate(q[index], start + step * torch.arange(count))


def expected_attention(probe: SpanProbe, m: Moments, k: torch.Tensor, v: torch.Tensor, start: int, scale: float):
    """[H, n]: (softmax over tokens of mu.k + k' Sigma k / 2, + EPSILON) |v|, mean over the group's heads; mu and
    Sigma under the mean rotation of the FUTURE positions from `start` (arXiv 2510.00636, as kvpress has it)."""
    cos, sin = probe.model.model.rotary_emb(k, torch.arange(start, start + FUTURE)[None])
    identity = torch.eye(k.shape[2])
    rotation = (cos[0].mean(0) * identity + sin[0].mean(0) * half_turn(identity)).T  # acts on column vectors
    mu, sigma = m.mu @ rotation.T, rotation @ m.sigma @ rotation.T
    heads, group = k.shape[0], mu.shape[0] // k.shape[0]
    mu, sigma = mu.view(heads, group, -1), sigma.view(heads, group, *sigma.shape[1:])
    logits = torch.einsum("hgd,hnd->hgn", mu, k) * scale
    logits += torch.einsum("hnd,hgde,hne->hgn", k, sigma, k) * (scale * scale / 2)
    return (logits.softmax(-1).mean(1) + EPSILON) * v.norm(dim=2)


class Cold(NamedTuple):
    """scores(layer index, layer) -> [H, n] or None for the window score of `queries`; queries(layer index,
    layer) -> [w, Hq, D] placed behind the span, or None."""

    rule: str
    scores: Callable[[int, Layer], torch.Tensor] | None
    queries: Callable[[int, Layer], torch.Tensor] | None = None
    behind: bool = True  # False: the queries are the span's own last ones


# Candidates for a cold span


def cold_candidates(probe: SpanProbe, calibration: Calibration, scale: float) -> dict[str, Cold]:
    """Every selection and merge rule that is compared on cold spans."""

    def plain(score):
        return lambda i, x: score(x.k.transpose(0, 1), x.v.transpose(0, 1))

    def expected(i: int, x: Layer) -> torch.Tensor:
        k, v = x.k.transpose(0, 1), x.v.transpose(0, 1)
        return expected_attention(probe, calibration.moments[i], k, v, x.k.shape[0], scale)

    def pseudo(count: int, step: int = 1):
        return lambda i, x: calibration.pseudo(probe, i, x.k.shape[0], count, step)

    def true(i: int, x: Layer) -> torch.Tensor:
        return x.q[-WINDOW:]

    agnostic = {
        "random": at_random,
        "keydiff": keydiff,
        "keydiff pooled": lambda k, v: pooled(keydiff(k, v)),
        "keydiff x |v|": lambda k, v: (1 + keydiff(k, v)) * v.norm(dim=2),
        "value norm": lambda k, v: v.norm(dim=2),
        "key norm": lambda k, v: -k.norm(dim=2),
        "key norm pooled": lambda k, v: pooled(-k.norm(dim=2)),
        "lagkv": lagkv,
        "leverage": leverage,
    }
    out = {}
    for name, score in agnostic.items():
        for rule in ("evict", "mean"):
            out[f"{name} {rule}"] = Cold(rule, plain(score))
    for rule in ("evict", "mean"):
        out[f"expected attention {rule}"] = Cold(rule, expected)
    out["expected attention, pooled evict"] = Cold("evict", lambda i, x: pooled(expected(i, x)))
    out["expected attention, pooled mean"] = Cold("mean", lambda i, x: pooled(expected(i, x)))
    for rule in ("tangent", "least_squares"):
        out[f"expected attention {rule} on pseudo"] = Cold(rule, expected, pseudo(WINDOW, 16))
    for rule in ("evict", "mean", "tangent", "least_squares"):
        out[f"pseudo 32 {rule}"] = Cold(rule, None, pseudo(WINDOW))
    for rule in ("evict", "mean", "least_squares"):
        out[f"pseudo 128 over 512 {rule}"] = Cold(rule, None, pseudo(128, 4))
    for rule in ("least_squares", "tangent"):
        out[f"keydiff {rule} on pseudo"] = Cold(rule, plain(keydiff), pseudo(128, 4))
    for rule in ("evict", "mean", "least_squares"):
        out[f"snapkv true window {rule}"] = Cold(rule, None, true, behind=False)
    return out


def compress_cold(layers: list[Layer], cold: Cold, m: int, scale: float) -> list[Slots]:
    """`layers` hold the span only."""
    out = []
    for i, layer in enumerate(layers):
        n, heads, _ = layer.k.shape
        q = cold.queries(i, layer) if cold.queries else layer.q[:0]
        index = torch.full((len(q),), n - 1) if cold.behind else torch.arange(n - len(q), n)
        lv = torch.zeros(n, heads)
        x = LayerInput(q, index, layer.k[:0], lv[:0], layer.k, layer.v, lv, scale)
        p = fixed_policy(m, cold.rule)
        if cold.scores is None:
            r = compress_layer(x, p)
            out.append(Slots(r.k, r.v, r.lv))
        else:
            out.append(by_scores(x, p, cold.scores(i, layer)))
    return out


def by_scores(x: LayerInput, p: SpanPolicy, scores: torch.Tensor) -> Slots:
    """compress_layer with scores from outside."""
    kept, absorbs = select(scores, p)
    assign = torch.full(scores.shape, -1).scatter_(1, kept, torch.arange(p.m).expand_as(kept))
    if p.merge != "evict":
        assign = match(x.k.transpose(0, 1).contiguous(), kept, absorbs, assign, p, 64 << 20)
    return Slots(*merge_from_assignment(x, kept, assign, p.merge, guard=True))


def fixed_policy(m: int, rule: str) -> SpanPolicy:
    """SnapKV's scores and a threshold of 0.6 for every rule; sinks and recent tokens as a server has them."""
    config = KeepKVConfig(scorer="snapkv", merge=rule, threshold=0.6)
    return span_policy(config, m, sinks=config.sinks)


# Cutting


class Cut(NamedTuple):
    """tokens: length of a piece, 0 for one piece. recent_inside: every piece keeps its own recent window."""

    rule: str
    tokens: int
    recent_inside: bool


def cut_candidates() -> dict[str, Cut]:
    out = {}
    for rule in ("least_squares", "evict"):
        out[f"uncut {rule}"] = Cut(rule, 0, True)
        for tokens in (1024, 512, 256):
            out[f"{tokens}, recent in each {rule}"] = Cut(rule, tokens, True)
            out[f"{tokens}, recent in the last {rule}"] = Cut(rule, tokens, False)
    return out


def compress_cut(layers: list[Layer], cut: Cut, budget: float, scale: float) -> list[Slots]:
    """Piece by piece, the earlier pieces already compressed when a later one is scored, as in the server."""
    config = KeepKVConfig(budget=budget)
    out = []
    for layer in layers:
        n, heads, _ = layer.k.shape
        zero, done = torch.zeros(n, heads), Slots(layer.k[:0], layer.v[:0], torch.zeros(0, heads))
        for start in range(0, n, cut.tokens or n):
            end = min(n, start + (cut.tokens or n))
            size, last = end - start, end == n
            window = min(WINDOW, size)
            x = LayerInput(
                layer.q[end - window : end], torch.arange(size - window, size), done.k, done.lv,
                layer.k[start:end], layer.v[start:end], zero[start:end], scale,
            )  # fmt: skip
            p = fixed_policy(config.kept_slots(start, end), cut.rule)
            p = replace(p, sinks=p.sinks if start == 0 else 0, recent=p.recent if last or cut.recent_inside else 0)
            r = compress_layer(x, p)
            done = Slots(*(torch.cat(pair) for pair in zip(done, (r.k, r.v, r.lv), strict=True)))
        out.append(done)
    return out


# Measuring


def measure(probe: SpanProbe, docs: list[Document], kind: str, only: set[str]) -> Iterator[dict]:
    """One row per document, candidate and budget."""
    config = probe.model.config
    scale = (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) ** -0.5
    cold = cold_candidates(probe, Calibration.of(probe), scale) if kind == "cold" else {}
    names = [name for name in (cold or cut_candidates()) if not only or name in only]
    cuts = cut_candidates()
    with tqdm(total=len(docs) * len(names) * len(BUDGETS), desc=kind, mininterval=2.0) as bar:
        for number, doc in enumerate(docs):
            n = len(doc.prompt)
            layers, full = probe.prefill(doc.prompt + doc.following, FOLLOWING)
            span = [Layer(*(t[:n] for t in layer)) for layer in layers]
            for budget in BUDGETS:
                for name in names:
                    began = time.perf_counter()
                    if kind == "cold":
                        past = compress_cold(span, cold[name], math.ceil(budget * n), scale)
                    else:
                        past = compress_cut(span, cuts[name], budget, scale)
                    seconds = time.perf_counter() - began
                    got = probe.score(past, n, doc.following, full)
                    yield dict(
                        kind=kind, document=number, source=doc.source, half=doc.half, budget=budget,
                        name=name, slots=past[0].k.shape[0], kl=got.kl, top1=got.top1, seconds=seconds,
                    )  # fmt: skip
                    bar.update()


def table(rows: list[dict], kind: str, half: str, budget: float) -> str:
    """Markdown, in the candidates' order."""
    chosen = [r for r in rows if r["kind"] == kind and r["budget"] == budget and half in (r["half"], "all")]
    by_name: dict[str, dict[int, dict]] = {}
    for r in chosen:
        by_name.setdefault(r["name"], {})[r["document"]] = r
    if not by_name:
        return ""
    lines = []
    for name, mine in by_name.items():
        base = by_name.get(BASE["cold"] if kind == "cold" else f"uncut {name.rsplit(' ', 1)[1]}")
        kl = [row["kl"] for row in mine.values()]
        ratio = paired_ratio(kl, [base[document]["kl"] for document in mine]).text() if base else "-"
        top1 = fmean(row["top1"] for row in mine.values())
        lines.append((name, f"{geometric_mean(kl).mean:.3f}", ratio, f"{100 * top1:.1f}"))
    head = f"{kind}, {half}, budget {budget:.0%}, {len(next(iter(by_name.values())))} documents"
    columns = "selection and merge", "KL gm", "ratio [95 %]", "top-1 %"
    return f"\n{head}\n\n{tables.markdown(columns, lines)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--documents", type=int, default=16, help="up to 40; half of them are held out")
    parser.add_argument("--only", choices=["cold", "cut"])
    parser.add_argument("--half", choices=["dev", "held-out"], help="documents of one half only")
    parser.add_argument("--all", action="store_true", help="also the candidates that lost (three times as many)")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        folder = data_folder(options.data, "SOURCES.md")
        probe, rows = SpanProbe(options.model), []
        for kind, tokens in (("cold", COLD_TOKENS), ("cut", CUT_TOKENS)):
            if options.only in (None, kind):
                docs = documents(probe.ids, folder, options.documents, tokens, FOLLOWING)
                docs = [d for d in docs if options.half in (None, d.half)]
                for row in measure(probe, docs, kind, set() if options.all else set(MAIN)):
                    rows.append(row)
                    if options.json:
                        options.json.write_text(json.dumps(rows))
    except ValueError as error:
        print(f"bench_span_quality: {error}", file=sys.stderr)
        return 2
    for kind in ("cold", "cut"):
        for half in ("dev", "held-out", "all"):
            for budget in BUDGETS:
                print(table(rows, kind, half, budget))
    return 0


if __name__ == "__main__":
    sys.exit(main())
