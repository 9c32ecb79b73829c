"""Tensor parallel ranks: rank 0's view of its group, and the followers' work.

Imports `model` and `tp`. Start reading in ranks.py, then follower.py.
"""
