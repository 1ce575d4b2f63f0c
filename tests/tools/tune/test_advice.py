"""The recommendation: the largest budget that hits as much as any, among those that agree with the full cache."""

from __future__ import annotations

from keepkv_sglang.tools.tune.advice import Choice, advice


def said(*choices: Choice, stock: float = 0.5, ideal: float = 0.9, least: float = 0.9, originals: bool = False) -> str:
    return advice(choices, stock, ideal, least, originals)


def test_the_largest_budget_that_hits_as_much():
    text = said(Choice(0.1, 0.88, 0.95), Choice(0.2, 0.875, 0.96), Choice(0.5, 0.7, 0.99))
    assert text.startswith(
        "Use --keepkv-budget 0.2. It finds 87.5% of the prompt tokens in this pool, stock SGLang 50.0%"
    )
    assert "agrees with the full cache in 96.0%" in text and "0.1, finds 88.0% and agrees in 95.0%" in text


def test_a_budget_that_agrees_too_little_is_not_taken():
    text = said(Choice(0.1, 0.88, 0.8), Choice(0.2, 0.875, 0.85), Choice(0.5, 0.7, 0.91))
    assert text.startswith("Use --keepkv-budget 0.5. It finds 70.0%")


def test_without_texts_only_memory_counts():
    text = said(Choice(0.1, 0.88, None), Choice(0.2, 0.8, None))
    assert text.startswith("Use --keepkv-budget 0.1.") and text.endswith("what this costs in quality is not known.")


def test_reasons_to_leave_it_off():
    assert "no hits to win" in said(Choice(0.1, 0.9, 1.0), stock=0.895)
    few = said(Choice(0.1, 0.88, 0.7), Choice(0.2, 0.8, 0.8))
    assert few.startswith("Leave KeepKV off.") and "0.2 comes nearest, with 80.0%" in few and "--host-ratio 1" in few
    assert "--host-ratio" not in said(Choice(0.1, 0.88, 0.7), originals=True)
    assert "find 50.5% of the prompt tokens" in said(Choice(0.1, 0.88, 0.7), Choice(0.5, 0.505, 0.95))
