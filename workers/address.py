"""Addresses: the one at which another machine reaches this one, and the URL of a server on it."""

from __future__ import annotations

import socket


def own_address(towards: str) -> str:
    """Return the local address that packets to `towards` would leave from. No packet is sent.

    Raises `OSError` when there is no route.
    """
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return str(probe.getsockname()[0])


def http_url(host: str, port: int) -> str:
    """Return the URL at which this machine reaches a server that listens on `host`, which may be all addresses."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
