"""Reference queries: queries of tokens all over a prompt, moved behind its end, where the coming queries will be.

The window's queries say what the end of the prompt looks at. What comes later looks elsewhere; queries of the whole
prompt, placed at the positions that follow it, are a sample of that (Expected Attention, arXiv 2510.00636, uses their
moments; Attention Matching, arXiv 2602.16284, fits on such a sample). The server keeps them during prefill.
"""

from __future__ import annotations

import torch

from keepkv_sglang.compress.queries.rotary import Rotary


class QuerySample:
    """References and window of one span, as LayerInput wants them: the same for all layers.

    positions [w]: logical positions of the queries, ascending; the first `references` of them are moved to `end`, end
    + 1, ... slots: the span's length in slots, its last tokens, where the window lies, being one slot each.
    """

    def __init__(
        self,
        positions: list[int],
        references: int,
        end: int,
        slots: int,
        rotary: Rotary | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert references == 0 or rotary is not None
        self._count, self._turn = references, None
        if references and rotary is not None:
            target = end + torch.arange(references)
            self._turn = rotary.turn(torch.tensor(positions[:references]), target, dtype, device)
        # A reference stands behind the span and sees all of it.
        index = [slots + i for i in range(references)] + [slots - (end - p) for p in positions[references:]]
        self.q_index = torch.tensor(index, dtype=torch.int64)  # on the CPU: see LayerInput

    def place(self, q: torch.Tensor) -> torch.Tensor:
        """One layer's queries [w, Hq, D] in the order of `positions`, references moved."""
        if self._turn is None:
            return q
        return torch.cat((self._turn(q[: self._count]), q[self._count :]))
