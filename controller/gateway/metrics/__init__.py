"""What Prometheus reads from a gateway.

Imports `routing`. Start reading in instruments.py.

Tested elsewhere: vllm and workers in test_instruments.py.
"""
