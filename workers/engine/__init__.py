"""The loop that connects scheduling with execution.

Imports `scheduling`, `model`, `adapters`, `sources` and `ranks`. Start reading in loop.py.
"""
