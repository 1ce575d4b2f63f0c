"""hooks/adder.py inside SGLang's own PrefillAdder: what a round takes now, and what it promises for later."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from keepkv_sglang.hooks import adder as adders
from keepkv_sglang.runtime.counters import Counters
from keepkv_sglang.settings.config import KeepKVConfig
from keepkv_sglang.turn.limits import Limits
from keepkv_sglang.turn.state import RequestState

TENTH = KeepKVConfig(enabled=True, budget=0.1)
QUERIES = TENTH.window + TENTH.references
PAGE = 1  # SGLang reserves a page per request


def request(prompt: int, reply: int, config: KeepKVConfig | None = TENTH, generated: int = 0) -> Any:
    """config None: KeepKV is off for it."""
    ids = [1] * prompt
    return SimpleNamespace(
        origin_input_ids=ids,
        output_ids=[1] * generated,
        full_untruncated_fill_ids=ids + [1] * generated,
        prefix_len=0,
        host_hit_length=0,
        extend_end=0,
        sampling_params=SimpleNamespace(max_new_tokens=reply),
        auxiliary_swa_host_hit_length=0,
        state=None if config is None else RequestState(config, (), prompt_tokens=prompt),
    )


def round_of(pool: int, chunk: int | None = 8192, promised: int = 0, arena: int = 64 * QUERIES) -> Any:
    """An adder with `pool` free slots; `promised` of them are what running replies may still take."""
    rt = SimpleNamespace(
        originals=None,
        limits=Limits(SimpleNamespace(free_rows=arena, rows=arena), pool_limit=10 * pool),
        requests=SimpleNamespace(too_long=lambda req: len(req.origin_input_ids) >= 10 * pool),
    )
    adder = object.__new__(adders.adder_class(PrefillAdder))
    adder._compressed = lambda req: None if req.state is None else (rt, req.state)
    allocator = SimpleNamespace(page_size=PAGE, available_size=lambda: pool)
    tree = SimpleNamespace(evictable_size=lambda: 0, supports_mamba=lambda: False)
    adder.memory_budget = PrefillBudget(allocator, tree)
    adder.memory_budget.total_offset = promised
    adder.page_size, adder.rem_chunk_tokens, adder.rem_input_tokens = PAGE, chunk, 1 << 20
    adder.per_req_token_overhead, adder._mamba_slot_cost = PAGE, 0
    adder.exact_chunk_fill, adder.dllm_config, adder.rem_mamba_slots = False, None, None
    adder.can_run_list, adder.new_chunked_req = [], None
    adder.log_hit_tokens = adder.log_input_tokens = adder.log_replay_tokens = 0
    adder._check_prefill_tile_budget = lambda _tokens: None
    adder._replay_len = lambda _req, _prefix: 0
    return adder


def admit(adder: Any, req: Any) -> bool:
    """What PrefillAdder.add_one_req does about memory."""
    if adder.rem_chunk_tokens == 0:
        return False
    new = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
    total = len(req.full_untruncated_fill_ids) + new + adder.per_req_token_overhead
    found = adder._select_prefill_admission(
        req, total_tokens=total, host_hit_length=0, swa_host_hit_length=0, truncation_align_size=None
    )
    if isinstance(found, AddReqResult):
        return False
    req.extend_end = found.extend_len
    adder.can_run_list.append(req)
    adder._update_prefill_budget(0, found.extend_len, found.max_new_tokens, False)
    return True


def test_the_prompt_must_fit_now_and_its_budget_later():
    """1,500 tokens are 150 + 1 slots after compression, and 20 + 128 for 200 tokens of reply."""
    assert admit(round_of(8000, promised=7695), request(1500, 200))  # 300 of the 305 that replies leave
    assert admit(round_of(1505, promised=1200), request(1500, 200))
    assert not admit(round_of(1505, promised=1210), request(1500, 200))
    assert not admit(round_of(1500), request(1500, 200))
    assert not admit(round_of(8000, promised=6450), request(1500, 200, config=None))
    assert admit(round_of(8000, promised=6200), request(1500, 200, config=None))


def test_four_prompts_leave_room_for_later_but_not_for_now():
    adder = round_of(8000)
    assert all(admit(adder, request(1500, 100)) for _ in range(4))
    assert adder.rem_total_tokens > 6500 and adder.cur_rem_tokens == 8000 - 4 * (1500 + PAGE)
    assert not admit(adder, request(5000, 100)), "its first chunk of 2,192 tokens does not fit 1,996 slots"
    assert not admit(adder, request(2100, 100, config=None))
    assert admit(adder, request(1900, 100))


def test_a_prompt_in_chunks_gives_nothing_back_before_its_end():
    """It is in the pool whole meanwhile, so it needs its 5,000 slots beside what others were promised."""
    assert not admit(round_of(8000, chunk=2048, promised=3100), request(5000, 100))
    adder = round_of(8000, chunk=2048, promised=2800)
    assert admit(adder, request(5000, 100))
    assert adder.memory_budget.total_offset == 2800 + 2048 + PAGE


@pytest.mark.parametrize(
    ("config", "generated"), [(KeepKVConfig(enabled=True, budget=0.1, span_tokens=512), 0), (TENTH, 50)]
)
def test_no_credit_where_parts_may_stay_whole(config, generated):
    assert not admit(round_of(8000, promised=6550), request(1500, 200, config, generated))


def test_prompts_share_the_arena():
    """Queries of two prompts fit: the third would not be compressed, so all its tokens count."""
    adder = round_of(8000, promised=3000, arena=2 * QUERIES)
    assert admit(adder, request(1500, 100)) and admit(adder, request(1500, 100))
    before = adder.memory_budget.total_offset
    assert admit(adder, request(1500, 100))
    assert adder.memory_budget.total_offset == before + 1500 + 100 + PAGE


REQUESTS = st.tuples(
    st.integers(1, 4000), st.integers(0, 300), st.sampled_from([TENTH, KeepKVConfig(enabled=True, budget=40), None])
)


@settings(max_examples=300, deadline=None)
@given(
    pool=st.integers(100, 9000),
    chunk=st.sampled_from([None, 512, 2048, 8192]),
    promised=st.integers(0, 4000),
    requests=st.lists(REQUESTS, max_size=12),
)
def test_no_round_takes_or_promises_more_than_there_is(pool, chunk, promised, requests):
    adder = round_of(pool, chunk, promised)
    taken, later = 0, promised
    for prompt, reply, config in requests:
        req = request(prompt, reply, config)
        if not admit(adder, req):
            continue
        taken += req.extend_end + PAGE
        assert taken <= pool
        if req.extend_end < prompt:
            break  # SGLang admits nobody behind an unfinished prompt: its chunk is used up
        compressed = config is not None and prompt > config.min_tokens
        kept = req.state.slots_for(0, prompt - 1) + 1 if compressed else prompt
        later += min(kept, prompt) + (reply if config is None else req.state.reply_growth(reply))
        assert later <= pool


def test_a_round_with_a_parked_chunk_admits_nobody(monkeypatch):
    """SGLang would count one unfinished chunk too many, and drop the first token of the parked request's reply."""
    adder, long = round_of(100, chunk=128), request(2500, 8)
    other = request(20, 100, config=None)
    other.finished = lambda: False
    adder.running_batch = SimpleNamespace(reqs=[other])
    scheduler = SimpleNamespace(_pending_chunked_abort_req=None)
    rt = SimpleNamespace(
        originals=None,
        allocator=SimpleNamespace(available_size=lambda: 100),
        tree=SimpleNamespace(evictable_size=lambda: 0),
        scheduler=scheduler,
        counters=Counters(),
    )
    monkeypatch.setattr(adders.process, "active", lambda: rt)
    assert adder.budget_state() == AddReqResult.CONTINUE
    assert adder.add_chunked_req(long) is long and not adder.can_run_list
    assert adder.budget_state() == AddReqResult.OTHER, "SGLang asks before it looks at anybody"
    assert rt.counters.parked == 1 and scheduler._pending_chunked_abort_req is None
    adder.running_batch = None  # nobody will ever give slots back
    assert adder.add_chunked_req(long) is long
    assert scheduler._pending_chunked_abort_req is long and "KV pool is full" in long.discard_output_reason.message
