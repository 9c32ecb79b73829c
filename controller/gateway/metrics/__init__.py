"""The metrics a gateway exports to Prometheus.

Imports `routing`. Start reading in instruments.py.
"""
