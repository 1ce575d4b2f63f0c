"""Attention backends registered with SGLang: vote-weighted attention per hardware."""
