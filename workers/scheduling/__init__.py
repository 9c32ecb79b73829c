"""Everything that is decided, and nothing that is executed: requests, the scheduler, adapter slots, pages, fairness.

Pure: imports the standard library and `workers.errors` alone. Start reading in request.py, then scheduler.py.

Tested elsewhere: batch, flows and running in test_scheduler.py; request_checks in engine/test_loop.py.
"""
