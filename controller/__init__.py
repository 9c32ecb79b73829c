"""Commands, the controller and the HTTP gateway: what people start, and what keeps a fleet running.

Imports of `workers` only what needs no torch. Start reading in commands/cli.py.

Tested elsewhere: config in commands/test_cli.py.
"""
