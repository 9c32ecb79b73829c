"""The loop that connects scheduling with execution.

Imports `scheduling`, `model`, `adapters`, `sources` and `ranks`. Start reading in loop.py, then steps.py.

Tested elsewhere: registered and slot_loader in test_adapter_life.py; steps in test_overlap.py.
"""
