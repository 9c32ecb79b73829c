"""Tensor parallel ranks: how rank 0 sees its group, and what the others do.

Imports `model` and `tp`. Start reading in ranks.py, then follower.py.
"""
