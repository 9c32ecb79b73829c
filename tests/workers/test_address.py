"""Addresses and URLs."""

from __future__ import annotations

import pytest

from lorafleet.workers.address import http_url, own_address


def test_this_machine_reaches_itself_from_its_loopback_address() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("fe80::1", "http://[fe80::1]:8000"),
    ],
)
def test_the_url_of_a_server_is_one_that_clients_understand(host: str, url: str) -> None:
    assert http_url(host, 8000) == url
