"""What people start and what keeps a fleet running: commands, the controller, the HTTP gateway.

Imports of `workers` only what needs no torch. Start reading in commands/cli.py.
"""
