"""A request's life between parsing and framing: its choices, their worker sessions, resuming after a loss.

Imports `routing`, `metrics` and `workers.text`. Start reading in generation.py, then session.py.

Tested elsewhere: controller_client, generation, pool and wire in api/test_faults.py; delivery in test_session.py.
"""
