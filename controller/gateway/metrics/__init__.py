"""What Prometheus reads from a gateway.

Imports `routing`. Start reading in instruments.py.
"""
