"""Which of a machine's addresses another one reaches it by."""

from __future__ import annotations

import socket


def own_address(towards: str) -> str:
    """This machine's address as the one at `towards` sees it: where the way there begins. No packet is sent.

    Raises `OSError` when there is no way.
    """
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return str(probe.getsockname()[0])
