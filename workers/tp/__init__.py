"""The process group of a worker's ranks, and the wire form of a step's plan between them.

Imports `scheduling`. Start reading in group.py.
"""
