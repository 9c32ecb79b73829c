"""The worker as a process of a fleet: the Ray actor, its gRPC service, the adapters that the controller registered.

Imports `engine` when it runs. Start reading in actor.py, then service.py.
"""
