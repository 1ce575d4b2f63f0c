"""A Hugging Face model whose attention reads rows of slots with votes, as KeepKV's server does.

A `Row` is what the server keeps for one request: fewer slots than tokens, log votes beside keys and values, logical
positions. `feed` appends tokens, `replace_span` puts merged slots in the place of a span.

transformers is imported where it is used: start-up cost.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from keepkv_sglang.compress.queries.rotary import Rotary

_numbers = itertools.count()  # attention functions are registered by name, for the whole process: one per probe


class Slots(NamedTuple):
    """One layer of a row: k, v [s, Hkv, D] after RoPE, lv [s, Hkv] log votes, -inf where a head has no slot."""

    k: torch.Tensor
    v: torch.Tensor
    lv: torch.Tensor

    def cut(self, start: int, stop: int) -> Slots:
        """Slots [start, stop), not copied."""
        return Slots(*(t[start:stop] for t in self))


def joined(*parts: Slots) -> Slots:
    """One behind the other."""
    return Slots(*(torch.cat(part) for part in zip(*parts, strict=True)))


class Row:
    """Slots of all layers and how many logical tokens they stand for.

    queries: one [t, Hq, D] per layer, after RoPE, unscaled: of the t tokens fed last, that is of logical positions
    tokens - t .. tokens - 1. cells: one per layer, what heads have in packed spans: in front of everything that is fed
    later; the slots of these spans are in `layers` without a vote. Tensors are never written in place, so `clone` is
    cheap.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.layers = [Slots(probe.empty_kv, probe.empty_kv, probe.empty_lv)] * probe.layer_count
        self.cells = list(self.layers)
        self.queries: list[torch.Tensor] = [probe.empty_q] * probe.layer_count
        self.tokens = 0

    @property
    def slots(self) -> int:
        """KV slots held."""
        return self.layers[0].k.shape[0]

    @property
    def held(self) -> int:
        """Mean over layers and kv heads of the slots and cells that are no padding (log votes -inf)."""
        votes = [torch.cat((cells.lv, layer.lv)) for cells, layer in zip(self.cells, self.layers, strict=True)]
        return round(sum(float((lv > -math.inf).sum(0).float().mean()) for lv in votes) / len(votes))

    def clone(self) -> Row:
        """An independent row on the same tensors."""
        other = copy.copy(self)
        other.layers, other.queries, other.cells = list(self.layers), list(self.queries), list(self.cells)
        return other

    def feed(self, ids: Sequence[int], last: int | None = None) -> torch.Tensor:
        """Appends tokens, one slot each. Returns log-probabilities [min(last, len(ids)), vocabulary] of what follows
        each of the last `last` tokens (all of them when None)."""
        return self.probe.run(self, ids, len(ids) if last is None else last)

    def replace_span(self, layers: Sequence[Slots], start: int = 0) -> None:
        """`layers` (all with the same number of slots) take the place of everything from slot `start` on, of packed
        spans only where that is everything."""
        if not start:
            self.cells = [layer.cut(0, 0) for layer in layers]
        self.layers = [
            joined(old.cut(0, start), new) if start else new for old, new in zip(self.layers, layers, strict=True)
        ]

    def context(self, layer: int, slots: int) -> Slots:
        """What precedes slot `slots` in a layer: cells, and the slots before it."""
        return joined(self.cells[layer], self.layers[layer].cut(0, slots))

    def generate(self, ids: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
        """Greedy: feeds `ids` (at least one), then up to `count` tokens; ends before a token of `stop`. The row keeps
        what was fed."""
        made: list[int] = []
        feed = list(ids)
        while True:
            token = int(self.feed(feed, last=1)[-1].argmax())
            if token in stop:
                return made
            made.append(token)
            if len(made) == count:
                return made
            feed = [token]


class Probe:
    """Model and tokenizer in float32 on `device`. One row at a time; not thread-safe."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

        name = f"keepkv_probe_{next(_numbers)}"
        AttentionInterface.register(name, self._attend)
        self.path, self.device = path, torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=name)
        self.model = model.eval().to(self.device)
        config = self.model.config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.layer_count = config.num_hidden_layers
        self.scale = self.head_dim**-0.5
        self.empty_kv = torch.zeros(0, config.num_key_value_heads, self.head_dim, device=self.device)
        self.empty_lv = torch.zeros(0, config.num_key_value_heads, device=self.device)
        self.empty_q = torch.zeros(0, config.num_attention_heads, self.head_dim, device=self.device)
        self.rotary = Rotary(self._cos_sin(config.max_position_embeddings))
        self._row: Row | None = None

    def _cos_sin(self, positions: int) -> torch.Tensor:
        """[positions, D]: the model's rotary table, as compress/queries/rotary.py wants it."""
        cos, sin = self.model.model.rotary_emb(self.empty_q, torch.arange(positions, device=self.device)[None])
        half = cos.shape[2] // 2
        return torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=1)

    def row(self, ids: Sequence[int] = ()) -> Row:
        """A new row; `ids` are prefilled."""
        row = Row(self)
        if ids:
            row.feed(ids, last=1)
        return row

    def ids(self, text: str) -> list[int]:
        """Token ids, no special tokens added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def run(self, row: Row, ids: Sequence[int], last: int) -> torch.Tensor:
        """See Row.feed."""
        self._row = row
        fed = torch.tensor([list(ids)], device=self.device)
        position = torch.arange(row.tokens, row.tokens + len(ids), device=self.device)[None]
        try:
            out = self.model(fed, position_ids=position, use_cache=False, logits_to_keep=last)
        finally:
            self._row = None
        row.tokens += len(ids)
        return out.logits[0].log_softmax(-1)

    def _attend(
        self, module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        """q [1, Hq, T, D], k, v [1, Hkv, T, D] -> [1, T, Hq, D], None. The model's own mask is not used: the row's
        slots come first, their log votes added to the logits (KeepKV, Eq. 6), then the new tokens, causal."""
        row, index, tokens = self._row, module.layer_idx, q.shape[2]
        assert row is not None
        past = row.context(index, row.layers[index].k.shape[0])
        new = Slots(k[0].transpose(0, 1), v[0].transpose(0, 1), self.empty_lv.new_zeros(tokens, k.shape[1]))
        row.layers[index] = joined(row.layers[index], new)
        row.queries[index] = q[0].transpose(0, 1)
        scale = options.get("scaling") or self.scale
        if past.k.shape[0] == 0:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return out.transpose(1, 2), None
        group = q.shape[1] // k.shape[1]
        seen = joined(past, new)
        k, v = (t.transpose(0, 1)[None] for t in (seen.k, seen.v))
        votes = past.lv.T.repeat_interleave(group, 0)[None, :, None].expand(1, -1, tokens, -1)
        own = q.new_full((tokens, tokens), -math.inf).triu(1).expand(1, q.shape[1], -1, -1)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.cat((votes, own), 3), scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2), None


@dataclass(frozen=True)
class Agreement:
    """kl: mean over tokens of KL(full || other) in nats. top1: share of tokens with the same most probable next token.
    nll: mean negative log-probability of the text's own next tokens under `other`, in nats."""

    kl: float
    top1: float
    nll: float


def agreement(full: torch.Tensor, other: torch.Tensor, following: Sequence[int]) -> Agreement:
    """full, other [T, vocabulary] log-probabilities after each of T fed tokens, `following` those tokens: row t
    predicts token t + 1, so the last row has a KL but no own next token."""
    kl = F.kl_div(other, full, reduction="none", log_target=True).sum(-1).mean()
    top1 = (other.argmax(-1) == full.argmax(-1)).double().mean()
    nll = (
        -other[:-1].gather(1, torch.tensor(list(following[1:]), device=other.device)[:, None]).mean()
        if len(following) > 1
        else math.nan
    )
    return Agreement(float(kl), float(top1), float(nll))
