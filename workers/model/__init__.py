"""Execution of a step: decoder, layers, KV cache, adapter slots on the device, sampling, and the memory plan.

Imports `kernels`, `adapters`, `tp` and `scheduling`. Start reading in runner.py, then decoder.py.

Tested elsewhere: architecture, kv_cache, layers, lora, rope and runner in test_decoder.py; norm in test_vocabulary.py;
shards in test_adapter_shard.py; side_stream in gpu/test_side_stream.py; transfer in test_steps.py.
"""
