"""The address at which another machine reaches this one."""

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
