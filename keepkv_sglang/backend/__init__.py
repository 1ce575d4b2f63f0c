"""Attention backends registered with SGLang: vote-weighted attention per hardware; common.py is what they share."""
