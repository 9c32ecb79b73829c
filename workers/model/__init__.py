"""What executes a step: the decoder, its layers, the KV cache, adapter slots on the device, sampling, the memory plan.

Imports `kernels`, `adapters`, `tp` and `scheduling`. Start reading in runner.py, then decoder.py.
"""
