"""Adapters as files and in host memory: PEFT directories, verified specs, the host cache.

Imports `scheduling` for the eviction policy. Start reading in format.py, then store.py.

Tested elsewhere: config, tensor_file and weights_file in test_format.py; folder in test_hostile.py; modules and
pattern_process in test_patterns.py.
"""
