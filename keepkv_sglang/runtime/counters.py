"""What a scheduler process counts: /server_info shows every field under its name."""

from __future__ import annotations

from dataclasses import dataclass

from keepkv_sglang.turn.limits import Skips


@dataclass
class Counters(Skips):
    """Since the process began."""

    compressions: int = 0
    deferred: int = 0  # due, and put off to the next step by step_tokens
    parked: int = 0  # rounds in which a chunk of a prompt found no slots and nobody was admitted
    slots_freed: int = 0
    seconds: float = 0.0  # of the compressions alone
    hook_seconds: float = 0.0  # of all that runs between steps: looking for due spans, compressing, publishing
    published: int = 0
    entry_hits: int = 0
    retractions_published: int = 0
    mispublished: int = 0
    most_running: int = 0  # requests in one decode batch
    pressure_merges: int = 0
    pressure_tokens: int = 0
    pressure_seconds: float = 0.0
    archived_tokens: int = 0  # whose originals were written to host memory
    archive_full_tokens: int = 0  # that found no block, all being held
    archive_gaps: int = 0  # compressions of which nothing was archived: what is before them is not
    unpacked: int = 0  # histories that were brought back, and how many tokens of them
    unpacked_tokens: int = 0
    streamed: int = 0  # histories that were read from host memory, without slots, and how many tokens of them
    streamed_tokens: int = 0
    unpack_no_room: int = 0  # histories that were read compressed: for want of slots, or of some of their originals
    unpack_incomplete: int = 0
    originals_seconds: float = 0.0
    # What answers said (observe/answer.py), once per answer
    answers: int = 0
    answers_compressed: int = 0  # their row held fewer slots than tokens
    answers_off: int = 0  # of requests that nothing is ever compressed of
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, found in the prefix cache
    hit_tokens: int = 0  # and of those, found in compressed spans
    logical_tokens: int = 0  # of their rows
    saved_slots: int = 0  # that these rows did not need
    merged_tokens: float = 0.0
    dropped_tokens: float = 0.0
