"""What changes between two replays of a CUDA graph, in place, and is wrong when it is missed."""

from __future__ import annotations

LENS = [500, 63, 2047]
# Beyond what Case.error allows for bfloat16. test_graph_changes.py holds each change to it, without a GPU.
STALE = 0.02


def votes(case):
    """Of every second slot: a constant added to all of a request's votes changes no softmax."""
    case.votes[case.slots(0)[::2]] += 1.5


def slots(case):
    """Request 1 continues on slots of request 2. Another order of its own would carry keys, values and votes along."""
    n = int(case.lens[1])
    case.table[case.rows[1], :n] = case.table[case.rows[2], 100 : 100 + n]


def queries(case):
    case.q.copy_(case.q.flip(0))


def votes_again(case):
    votes(case)


CHANGES = (votes, slots, queries, votes_again)


# The same for a PackedCase.
PACKED = ([500, 63, 900], [[300, 40], [], [7, 200]])


def cells_votes(case):
    for pool in case.layers.log_votes:
        pool[::2] += 1.5


def a_span_less(case):
    """The slots of a span are ordinary again."""
    case.span_of[case.span_of == min(case.starts)] = 0


def places(case):
    """Another row's slots stand where a span's stood."""
    first, last = case.rows[0], case.rows[2]
    (at,) = (case.span_of[case.table[last].clamp(min=0).long()] == max(case.starts)).nonzero()[:1, 0].tolist()
    case.table[first, 20:60] = case.table[last, at : at + 40]
    case.span_of[case.table[first, 20:60].long()] = 0


PACKED_CHANGES = (cells_votes, a_span_less, queries, places)
