"""The command line: `lorafleet serve`, `up`, `status` and the others.

Owns the flags, the order of start and stop, the output. May import all of `controller`; nothing imports it. Start
reading in cli.py, then serve.py.

Tested elsewhere: flags in test_cli.py; say and start in test_serve.py; status in gateway/api/test_fleet.py.
"""
