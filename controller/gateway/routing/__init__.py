"""The choice of a worker for each request, from the routing table and the state of each worker.

Pure: no network and no clock of its own. Start reading in router.py.

Tested elsewhere: worker_view in test_router.py.
"""
