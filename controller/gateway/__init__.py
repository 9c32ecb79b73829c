"""The HTTP gateway: a process that turns OpenAI requests into streams with workers.

Here: settings, tenants, listening. Imports neither Ray nor torch. Start reading in server.py, then api/app.py.

Tested elsewhere: __main__, config and server in test_main.py; listener in test_connections.py.
"""
