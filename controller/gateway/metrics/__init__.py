"""The metrics a gateway exports to Prometheus.

Imports `routing`. Start reading in instruments.py.

Tested elsewhere: vllm and workers in test_instruments.py.
"""
