"""The command line: `lorafleet serve`, `up`, `status` and the others.

Owns the flags, the order of start and stop, the output. May import all of `controller`; nothing imports it. Start
reading in cli.py, then serve.py.
"""
