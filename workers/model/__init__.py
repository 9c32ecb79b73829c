"""Execution of a step: decoder, layers, KV cache, adapter slots on the device, sampling, and the memory plan.

Imports `kernels`, `adapters`, `tp` and `scheduling`. Start reading in runner.py, then decoder.py.
"""
