"""Tensor parallel ranks: how rank 0 sees its group, and what the others do.

Imports `model` and `tp`. Start reading in ranks.py, then follower.py.

Tested elsewhere: follower, followers, ranks, remote and start in tp/test_engine.py.
"""
