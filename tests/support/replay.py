"""The oracle of the server tests: transformers in float64, with KeepKV's row semantics written down plainly.

A `Replay` holds one row as the server should: per layer the keys, values and log votes of its slots. Tokens run through
the Hugging Face model with logical positions; an attention function of ours appends their K and V to the row and
attends with log votes added to the logits (Eq. 6). A compression recorded by the server (--keepkv-record) is applied
with the reference merge on float64 data. No code of keepkv_sglang is used but the reference equations.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from keepkv_sglang.kernels.merge import reference

_NAME = "keepkv_replay"


@dataclass
class Layer:
    """Slots of one layer, in row order: k, v [slots, Hkv, D], lv [slots, Hkv]; q [tokens, Hq, D] by position.

    cells: k, v, lv of what heads have in packed spans, in front of all that came later; the shorter heads are filled up
    with entries without a vote, and so are the slots of these spans in k, v and lv.
    """

    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor
    q: torch.Tensor
    cells: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    scale: float = 0.0

    def before(self, slots: int | None = None) -> list[torch.Tensor]:
        """k, v, lv of all cells and of the first `slots` slots."""
        return [torch.cat([c, x[:slots]]) for c, x in zip(self.cells, (self.k, self.v, self.lv), strict=True)]

    def append(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = torch.cat([self.k, k]), torch.cat([self.v, v])
        self.lv = torch.cat([self.lv, torch.zeros(k.shape[:2], dtype=torch.float64)])
        self.q = torch.cat([self.q, q])


@dataclass
class Replay:
    """One request's row. `tokens` counts logical tokens; the layers may hold fewer slots."""

    model: Any
    layers: list[Layer]
    tokens: int = 0
    applied: list[dict] = field(default_factory=list)

    @staticmethod
    def load(model_path: str) -> Replay:
        model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention)
        model.set_attn_implementation(_NAME)
        config = model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv = torch.zeros(0, config.num_key_value_heads, dim, dtype=torch.float64)
        q = torch.zeros(0, config.num_attention_heads, dim, dtype=torch.float64)
        lv = torch.zeros(0, config.num_key_value_heads, dtype=torch.float64)
        return Replay(model.eval(), [Layer(kv, kv, lv, q, (kv, kv, lv)) for _ in range(config.num_hidden_layers)])

    def clone(self) -> Replay:
        return Replay(self.model, [copy.copy(layer) for layer in self.layers], self.tokens, list(self.applied))

    @torch.no_grad()
    def feed(self, ids: list[int]) -> torch.Tensor:
        """Runs tokens behind the row; returns log-probabilities [len(ids), vocab] of the next token."""
        _attention.row = self  # type: ignore[attr-defined]
        positions = torch.arange(self.tokens, self.tokens + len(ids))[None]
        logits = self.model(input_ids=torch.tensor([ids]), position_ids=positions, use_cache=False).logits[0]
        self.tokens += len(ids)
        return torch.log_softmax(logits.double(), dim=-1)

    def truncate(self, tokens: int) -> None:
        """Keeps the row's first `tokens` logical tokens; what is cut off must be raw slots."""
        cut = self.tokens - tokens
        assert cut >= 0
        for layer in self.layers:
            keep = layer.k.shape[0] - cut
            assert torch.all(layer.lv[keep:] == 0)  # and no packed span is among them
            layer.k, layer.v, layer.lv, layer.q = layer.k[:keep], layer.v[:keep], layer.lv[:keep], layer.q[:tokens]
        self.tokens = tokens

    def inputs(self, event: dict, index: int) -> Any:
        """The fields of LayerInput for layer `index`, in float64."""
        layer, start, stop = self.layers[index], event["start"], event["start"] + event["slots"]
        positions, moved = event["window"], event["references"]
        q, index = layer.q[positions], [event["slots"] - (event["end"] - p) for p in positions]
        if moved:  # reference queries: rotated from where they stood to end, end + 1, ..., so they see the whole span
            at = torch.arange(event["end"], event["end"] + moved)
            q = torch.cat((self._rotate(self._rotate(q[:moved], positions[:moved], -1), at, 1), q[moved:]))
            index[:moved] = [event["slots"]] * moved
        k_ctx, _, lv_ctx = layer.before(start)
        return SimpleNamespace(
            q=q,
            q_index=torch.tensor(index),
            k_ctx=k_ctx,
            lv_ctx=lv_ctx,
            k=layer.k[start:stop],
            v=layer.v[start:stop],
            lv=layer.lv[start:stop],
            scale=layer.scale,
        )

    def _rotate(self, q: torch.Tensor, positions: Any, sign: int) -> torch.Tensor:
        """RoPE of the Hugging Face model on q [w, Hq, D], or (-1) its inverse; without its factor (YaRN), which queries
        have already."""
        rotary = self.model.model.rotary_emb
        cos, sin = (part[0][:, None] / rotary.attention_scaling for part in rotary(q, torch.as_tensor(positions)[None]))
        q, rest = q[..., : cos.shape[-1]], q[..., cos.shape[-1] :]
        a, b = q.chunk(2, dim=-1)
        return torch.cat((q * cos + sign * torch.cat((-b, a), dim=-1) * sin, rest), dim=-1)

    def compress(self, event: dict) -> None:
        """Applies one recorded compression through the reference merge."""
        start, stop = event["start"], event["start"] + event["slots"]
        for index, layer in enumerate(self.layers):
            if bool((event["kept"] < 0).any()):
                merged, packed = self._packed(event, index)
                layer.cells = tuple(torch.cat(pair) for pair in zip(layer.cells, packed, strict=True))
            else:
                merged = self._merged(self.inputs(event, index), event, event["kept"][index], event["assign"][index])
            for name, new in zip(("k", "v", "lv"), merged, strict=True):
                old = getattr(layer, name)
                setattr(layer, name, torch.cat([old[:start], new, old[stop:]]))
        self.applied.append(event)

    def _merged(self, x: Any, event: dict, kept: torch.Tensor, assign: torch.Tensor) -> Any:
        fixed = sum(end - start for start, end in event["whole"])
        return reference.merge_from_assignment(x, kept, assign, event["merge"], fixed=fixed)

    def _packed(self, event: dict, index: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """A layer of a packed span: its m slots, and what heads have beside whole and recent tokens; each k, v, lv."""
        x, m, left = self.inputs(event, index), event["m"], event["left"]
        whole, most = sum(end - start for start, end in event["whole"]), event["kept"].shape[2]
        heads, group = x.k.shape[1], x.q.shape[1] // x.k.shape[1]
        slots, cells = [], []
        for h in range(heads):
            one = SimpleNamespace(
                q=x.q[:, h * group : (h + 1) * group],
                q_index=x.q_index,
                scale=x.scale,
                **{name: getattr(x, name)[:, h : h + 1] for name in ("k_ctx", "lv_ctx", "k", "v", "lv")},
            )
            kept = event["kept"][index, h]
            merged = self._merged(one, event, kept[kept >= 0][None], event["assign"][index, h : h + 1])
            ends = [torch.cat([y[:whole], y[len(y) - left :]]) for y in merged]
            inner = [y[whole : len(y) - left] for y in merged]
            gaps = [_empty(y, m - whole - left, i) for i, y in enumerate(merged)]
            slots.append([torch.cat([y[:whole], gap, y[whole:]]) for y, gap in zip(ends, gaps, strict=True)])
            cells.append([torch.cat([y, _empty(y, most - whole - left - len(y), i)]) for i, y in enumerate(inner)])
        return [torch.cat(p, 1) for p in zip(*slots, strict=True)], [torch.cat(p, 1) for p in zip(*cells, strict=True)]

    def follow(self, ids: list[int], events: list[dict]) -> list[float]:
        """Feeds ids; before position p every event that ends at or before p is applied, as the server does.

        Tokens between two events run as one batch: under a causal mask that is the same as one by one. Returns the
        log-probabilities of ids[1:]; that of ids[0] comes with the prompt.
        """
        applied = {id(event) for event in self.applied}
        pending = [event for event in events if id(event) not in applied]
        out: list[float] = []
        at = 0
        while at < len(ids):
            while pending and pending[0]["end"] <= self.tokens:
                self.compress(pending.pop(0))
            stop = len(ids) if not pending else min(len(ids), at + pending[0]["end"] - self.tokens)
            rows = self.feed(ids[at:stop])
            following = ids[at + 1 : stop + 1]
            out += [row[token].item() for row, token in zip(rows, following, strict=False)]
            at = stop
        return out


def _empty(like: torch.Tensor, count: int, part: int) -> torch.Tensor:
    """Entries of k, v or lv (part 0, 1, 2) that no head has."""
    return like.new_full((count, *like.shape[1:]), -torch.inf if part == 2 else 0.0)


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] of the new tokens -> ([1, T, Hq, D], None)."""
    row: Replay = _attention.row  # type: ignore[attr-defined]
    layer = row.layers[module.layer_idx]
    layer.scale = scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    layer.append(q, k, v)
    keys, values, votes = layer.before()
    count, slots = q.shape[0], keys.shape[0]
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("thd,shd->hts", q, keys.repeat_interleave(group, 1)) * scaling
    logits = logits + votes.repeat_interleave(group, 1).T[:, None, :]
    visible = torch.arange(slots)[None, :] <= torch.arange(slots - count, slots)[:, None]
    weights = torch.softmax(logits.masked_fill(~visible, -torch.inf), dim=-1)
    return torch.einsum("hts,shd->thd", weights, values.repeat_interleave(group, 1))[None], None


def events_of(folder: Path, rid: str) -> list[dict]:
    """Recorded compressions of one request, in order."""
    paths = sorted(folder.glob(f"*-{rid[:16]}.pt"))
    return [event for path in paths if (event := torch.load(path))["rid"] == rid]
