"""What a person types: `lorafleet serve`, `up`, `status` and the others.

Owns the flags, the order of start and stop, what is printed. May import everything of `controller`; nothing imports it.
Start reading in cli.py, then serve.py.
"""
