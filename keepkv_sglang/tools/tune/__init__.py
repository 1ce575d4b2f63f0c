"""`keepkv tune`: what budgets buy and cost on a trace of one's own, by the simulator and the evaluator."""
