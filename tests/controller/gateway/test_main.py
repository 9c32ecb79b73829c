"""The process as a user starts it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lorafleet.controller.gateway import __main__ as gateway_main
from lorafleet.controller.gateway.__main__ import main, parse
from lorafleet.controller.gateway.api_keys import API_KEY_VARIABLE
from lorafleet.workers.errors import ConfigError
from lorafleet.workers.switch_interval import SWITCH_INTERVAL_S

LINE = "lorafleet gateway listening on http://127.0.0.1:"


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text("fleet-token\n")
    return str(path)


@pytest.fixture
async def start(fleet: Any, token_file: str) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Starts gateway processes for the fleet; gives (process, url)."""
    processes: list[asyncio.subprocess.Process] = []

    async def run(*flags: str, stdin: int = subprocess.DEVNULL) -> tuple[asyncio.subprocess.Process, str]:
        command = ["-m", "lorafleet.controller.gateway", "--controller", fleet.controller.address, "--port", "0"]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, "--token-file", token_file, *flags, stdin=stdin, stdout=subprocess.PIPE
        )
        processes.append(process)
        assert process.stdout is not None
        line = "\n"
        async with asyncio.timeout(30):
            while line == "\n":  # a sign of life, to the parent
                line = (await process.stdout.readline()).decode()
        assert line.startswith(LINE)
        return process, line.removeprefix("lorafleet gateway listening on ").strip()

    yield run
    for process in processes:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _is_ready(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(15):
        while True:
            async with http.get(url + "/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.01)


async def test_sigterm_lets_running_streams_finish_and_exits_with_0(
    fleet: Any, start: Callable[..., Awaitable[Any]]
) -> None:
    process, url = await start()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
        await _is_ready(http, url)
        fleet.worker.permits = 1
        body = {"model": "tiny", "prompt": "hello world", "stream": True, "max_tokens": 20}
        async with http.post(url + "/v1/completions", json=body) as response:
            await response.content.readuntil(b"\n\n")
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                while True:
                    async with http.get(url + "/ready") as ready:
                        if (await ready.json()).get("reason") == "draining":
                            break
            fleet.worker.permits = None
            assert (await response.text()).endswith("data: [DONE]\n\n")
    assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_a_drain_has_an_end(fleet: Any, start: Callable[..., Awaitable[Any]]) -> None:
    process, url = await start("--drain-timeout-s", "0.1")
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as http:
        await _is_ready(http, url)
        fleet.worker.permits = 3
        body = {"model": "tiny", "prompt": "hello world", "stream": True, "max_tokens": 20}
        async with http.post(url + "/v1/completions", json=body) as response:
            await response.content.readuntil(b"\n\n")
            process.send_signal(signal.SIGINT)
            last = (await response.text()).strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
    assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_the_parents_death_ends_the_gateway(start: Callable[..., Awaitable[Any]]) -> None:
    process, _ = await start("--exit-with-parent", stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()
    assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_a_parent_that_watches_gets_signs_of_life_before_the_first_line_and_after_it(
    start: Callable[..., Awaitable[Any]],
) -> None:
    process, _ = await start("--exit-with-parent", stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    for _ in range(2):
        assert await asyncio.wait_for(process.stdout.readline(), 10) == b"\n"
    process.send_signal(signal.SIGSTOP)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            while True:
                await process.stdout.readline()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process.stdout.readline(), 2)
    process.send_signal(signal.SIGCONT)
    assert await asyncio.wait_for(process.stdout.readline(), 10) == b"\n"
    process.stdin.close()
    await asyncio.wait_for(process.wait(), 10)


async def test_a_port_that_is_taken_is_an_error(fleet: Any, token_file: str) -> None:
    port = fleet.url.rpartition(":")[2]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lorafleet.controller.gateway", "--controller", "127.0.0.1:1", "--port", port),
        *("--token-file", token_file),
        stderr=subprocess.PIPE,
    )
    _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in errors.decode()


def test_the_gateway_imports_neither_ray_nor_torch_nor_transformers() -> None:
    code = "import sys, lorafleet.controller.gateway.__main__; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    modules = {name.partition(".")[0] for name in result.stdout.split()}
    assert "aiohttp" in modules
    assert not modules & {"ray", "torch", "transformers", "numpy", "triton"}


def test_unknown_flags_are_refused(token_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--no-such-flag"], ["--max-body", "5"]):
        with pytest.raises(SystemExit) as failure:
            main(["--controller", "h:1", "--token-file", token_file, *flags])
        assert failure.value.code == 2
        assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--controller", "nowhere"], "--controller"),
        (["--controller", "h:" + "9" * 5000], "--controller"),
        (["--port", "70000"], "--port"),
        (["--max-body-bytes", "0"], "--max-body-bytes"),
        (["--drain-timeout-s", "-1"], "--drain-timeout-s"),
        (["--drain-timeout-s", "nan"], "--drain-timeout-s"),
        (["--body-timeout-s", "inf"], "--body-timeout-s"),
        (["--api-key", ""], "--api-key"),
        (["--token-file", "/no/such/file"], "--token-file"),
        (["--token-file", "/dev/null"], "--token-file"),
    ],
)
def test_bad_values_are_refused_by_flag(
    token_file: str, flags: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--controller", "h:1", "--token-file", token_file, *flags]) == 2
    assert part in capsys.readouterr().err


def test_its_loop_gets_the_interpreter_from_computing_threads_soon(
    token_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    async def serve(*_: object, **__: object) -> None:
        seen.append(sys.getswitchinterval())

    monkeypatch.setattr(gateway_main, "serve", serve)
    before = sys.getswitchinterval()
    try:
        assert main(["--controller", "h:1", "--token-file", token_file]) == 0
    finally:
        sys.setswitchinterval(before)
    assert seen == [pytest.approx(SWITCH_INTERVAL_S)]


def test_keys_come_from_flags_or_else_from_the_environment(token_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["--controller", "h:1", "--token-file", token_file]
    monkeypatch.setenv(API_KEY_VARIABLE, "k1, k2")
    assert parse(base)[0].api_keys == ("k1", "k2")
    assert parse([*base, "--api-key", "a", "b", "--api-key", "c"])[0].api_keys == ("a", "b", "c")
    monkeypatch.delenv(API_KEY_VARIABLE)
    config, _ = parse([*base, "--seed", "5"])
    assert (config.api_keys, config.seed, config.token) == ((), 5, "fleet-token")
    assert "fleet-token" not in repr(config)


def test_an_empty_controller_address_is_refused(token_file: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse(["--controller", ":1", "--token-file", token_file])
