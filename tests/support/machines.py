"""Hypothesis's state machines as test cases. KEEPKV_SOAK=1 (`make soak`): 2,000 examples of each, with more steps."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine

SOAK = os.environ.get("KEEPKV_SOAK") == "1"


def case(machine: type[RuleBasedStateMachine], examples: int, steps: int = 40, *unchecked: HealthCheck) -> Any:
    """The TestCase that runs so many examples of so many steps, or twice as many steps in a soak."""
    test_case = machine.TestCase
    test_case.settings = settings(
        max_examples=2000 if SOAK else examples,
        stateful_step_count=2 * steps if SOAK else steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, *unchecked],
    )
    return test_case
