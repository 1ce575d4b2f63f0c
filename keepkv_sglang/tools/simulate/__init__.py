"""Replays request traces through the real prefix trees and slot allocator, without a model (docs/simulate.md)."""
