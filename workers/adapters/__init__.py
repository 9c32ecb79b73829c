"""Adapters as files and in host memory: PEFT directories, verified specs, the host cache.

Imports `scheduling` for the eviction policy. Start reading in format.py, then store.py.
"""
