"""A request's life between parsing and framing: its choices, their worker sessions, resuming after a loss.

Imports `routing`, `metrics` and `workers.text`. Start reading in generation.py, then session.py.
"""
