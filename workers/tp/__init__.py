"""The process group of a worker's ranks, and the form in which a step's plan travels between them.

Imports `scheduling`. Start reading in group.py.
"""
