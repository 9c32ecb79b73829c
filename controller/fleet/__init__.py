"""The controller: a Ray actor that keeps the wanted workers and gateways running, with the same adapters on all.

Owns desired and observed state and the routing table. May import `workers.server` for the actors it creates, and the
gateway's settings for the processes it starts. Start reading in actor.py, then worker_life.py.

Tested elsewhere: events, owner and worker_life in test_actor.py; cluster in commands/test_ray_cluster.py; gateway_host
in integration/test_cluster.py.
"""
