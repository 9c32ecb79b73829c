"""Tensor parallel ranks: rank 0's view of its group, and the followers' work.

Imports `model` and `tp`. Start reading in ranks.py, then follower.py.

Tested elsewhere: follower, followers, ranks, remote and start in tp/test_engine.py.
"""
