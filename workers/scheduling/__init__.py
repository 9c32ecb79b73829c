"""Everything that is decided, and nothing that is executed: requests, the scheduler, adapter slots, pages, fairness.

Pure: imports the standard library and `workers.errors` alone. Start reading in request.py, then scheduler.py.
"""
