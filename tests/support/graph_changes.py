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
