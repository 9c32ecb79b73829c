"""Which worker gets a request: the routing table, what is known of each worker, the choice.

Pure: no network and no clock of its own. Start reading in router.py.

Tested elsewhere: worker_view in test_router.py.
"""
