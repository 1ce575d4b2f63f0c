"""Functions that SGLang's HookRegistry calls; seams.py says which one sits where."""
