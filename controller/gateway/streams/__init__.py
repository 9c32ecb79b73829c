"""A request's life between its parsing and its framing: choices, their worker sessions, resuming after a loss.

Imports `routing`, `metrics` and `workers.text`. Start reading in generation.py, then session.py.
"""
