"""The command line: flags become settings, mistakes are refused by name and at once."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lorafleet.controller.arguments.flags import made
from lorafleet.controller.commands.cli import main
from lorafleet.controller.commands.command_table import make_parser
from lorafleet.controller.commands.flags import serve_config, with_flags_file
from lorafleet.controller.config import ServeConfig, UpOptions
from lorafleet.workers.config import LoRAModule


def config(*flags: str) -> ServeConfig:
    return serve_config(make_parser().parse_args(["serve", "org/base", *flags]))


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Return the error for wrong flags, which must exit with status 2 and no traceback."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", "org/base", *flags])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_without_flags_the_model_is_served_under_its_own_name_to_this_machine_only() -> None:
    defaults = config()
    assert defaults.served_model_names == ("org/base",)
    assert (defaults.host, defaults.port, defaults.api_keys) == ("127.0.0.1", 8000, ())
    assert defaults.engine.lora is None and defaults.engine.quantization is None
    assert defaults.ray_address is None


def test_engine_flags_reach_the_engine() -> None:
    engine = config(
        *("--dtype", "bfloat16", "--device", "cpu", "--max-model-len", "512", "--max-num-seqs", "4"),
        *("--max-num-batched-tokens", "64", "--block-size", "32", "--gpu-memory-utilization", "0.5"),
        *("--kv-cache-memory-bytes", "1GiB", "--tensor-parallel-size", "1", "--num-threads", "3"),
        *("--quantization", "int8"),
    ).engine
    assert (engine.dtype, engine.device, engine.max_model_len, engine.max_num_seqs) == ("bfloat16", "cpu", 512, 4)
    assert (engine.max_num_batched_tokens, engine.block_size, engine.gpu_memory_utilization) == (64, 32, 0.5)
    assert (engine.kv_cache_memory_bytes, engine.num_threads, engine.quantization) == (1 << 30, 3, "int8")


def test_lora_flags_reach_the_engine() -> None:
    lora = config(
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "64", "--max-cpu-loras", "5"),
        *("--lora-host-cache-bytes", "500MB", "--lora-dtype", "float32"),
    ).engine.lora
    assert lora is not None
    assert (lora.max_loras, lora.max_lora_rank, lora.max_cpu_loras) == (2, 64, 5)
    assert (lora.lora_host_cache_bytes, lora.lora_dtype) == (500_000_000, "float32")


def test_adapters_come_as_name_and_path_and_as_json_and_the_flag_may_be_repeated() -> None:
    adapters = config(
        *("--enable-lora", "--served-model-name", "base", "--lora-modules", "sql=~/sql", "eq=a=b"),
        *(
            "--lora-modules",
            '{"name": "json", "path": "org/json", "base_model_name": "base", "weight": 2, "pin": true}',
        ),
    ).adapters
    assert adapters == (
        LoRAModule("sql", "~/sql"),
        LoRAModule("eq", "a=b"),
        LoRAModule("json", "org/json", "base", 2.0, True),
    )


def test_api_keys_come_from_the_flag_or_else_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_API_KEY", "one,two")
    assert config().api_keys == ("one", "two")
    assert config("--api-key", "three").api_keys == ("three",)
    assert "three" not in repr(config("--api-key", "three"))


def test_runtime_updates_are_turned_on_by_the_flag_or_vllms_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    roots = ("--lora-root", "adapters", "hf://org", "--lora-root", "/a")
    given = config("--enable-lora", "--allow-runtime-lora-updates", *roots)
    assert given.allow_runtime_lora_updates
    assert given.lora_roots == (str(Path.cwd() / "adapters"), "hf://org", "/a")
    assert not config().allow_runtime_lora_updates
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    assert config("--enable-lora", "--lora-root", "/a").allow_runtime_lora_updates
    assert not config().allow_runtime_lora_updates, "nothing can be loaded without LoRA"


def test_tenants_come_from_a_file_that_is_checked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tenants.json").write_text('[{"name": "acme", "api_keys": ["secret-key"]}]')
    assert config("--tenants", "tenants.json").tenants_file == str(tmp_path / "tenants.json")
    assert config().tenants_file is None
    assert "also in the file" in refusal(capsys, "--tenants", "tenants.json", "--api-key", "secret-key")
    (tmp_path / "tenants.json").write_text('[{"name": "acme", "api_key": "secret-key"}]')
    said = refusal(capsys, "--tenants", "tenants.json")
    assert "--tenants tenants.json" in said and "unknown field `api_key`" in said and "secret-key" not in said


def test_prefix_caching_is_on_unless_it_is_turned_off() -> None:
    assert config().engine.enable_prefix_caching
    assert config("--enable-prefix-caching").engine.enable_prefix_caching
    assert not config("--no-enable-prefix-caching").engine.enable_prefix_caching


def test_steps_are_replayed_unless_they_are_to_be_eager() -> None:
    assert not config().engine.enforce_eager
    assert config("--enforce-eager").engine.enforce_eager


def test_the_bound_on_waiting_is_on_unless_it_is_turned_off() -> None:
    assert config().engine.max_adapter_wait_s == 60.0
    assert config("--max-adapter-wait-s", "0").engine.max_adapter_wait_s == 0.0


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
        ("4Gi", 4 << 30),
        ("500MB", 500_000_000),
        ("500M", 500_000_000),
        ("1.5GiB", 3 << 29),
        ("2 TiB", 2 << 40),
        ("12kB", 12_000),
        ("7B", 7),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    # A KV cache of no bytes is refused later, by name.
    assert make_parser().parse_args(["serve", "m", "--kv-cache-memory-bytes", text]).kv_cache_memory_bytes == num_bytes


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--max-lora", "4"], "--max-lora"),  # no abbreviations
        (["--port", "eighty"], "--port: 'eighty' must be a whole number from 1 to 65535"),
        (["--port", "0"], "--port is 0; it must be a whole number from 1 to 65535"),
        (["--worker-wait-s", "soon"], "--worker-wait-s: 'soon' must be a number from 0 to 86400"),
        (["--num-workers", "1000000"], "--num-workers is 1000000; it must be a whole number from 1 to 4096"),
        (["--port", "70000"], "--port is 70000"),
        (["--dtype", "int8"], "--dtype"),
        (["--quantization", "int4"], "--quantization"),
        (
            ["--quantization", "int8", "--dtype", "float32"],
            "--quantization int8 computes in bfloat16, but --dtype is float32",
        ),
        (["--device", "tpu"], "--device"),
        (["--max-model-len", "0"], "--max-model-len is 0"),
        (["--max-num-seqs", "0"], "--max-num-seqs is 0"),
        (["--max-num-seqs", "8", "--max-num-batched-tokens", "4"], "--max-num-batched-tokens is 4"),
        (["--block-size", "17"], "--block-size: '17' is none of 8, 16, 32, 64, 128"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization is 1.5"),
        (["--kv-cache-memory-bytes", "4XiB"], "'4XiB' is not a size"),
        (["--kv-cache-memory-bytes", "-1"], "--kv-cache-memory-bytes"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size is 0"),
        (["--num-workers", "0"], "--num-workers is 0"),
        (["--gateway-processes", "0"], "--gateway-processes is 0"),
        (["--hung-step-s", "0.5"], "--hung-step-s is 0.5"),
        (["--hung-step-s", "nan"], "--hung-step-s is nan"),
        (["--worker-wait-s", "-1"], "--worker-wait-s is -1"),
        (["--max-adapter-wait-s", "0.5"], "--max-adapter-wait-s is 0.5"),
        (["--max-adapter-wait-s", "-1"], "--max-adapter-wait-s is -1"),
        (["--max-adapter-wait-s", "nan"], "--max-adapter-wait-s is nan"),
        (["--tenants", "/no/such/file"], "--tenants /no/such/file cannot be read"),
        (["--drain-timeout-s", "-1"], "--drain-timeout-s is -1"),
        (["--drain-timeout-s", "nan"], "--drain-timeout-s is nan"),
        (["--api-key", ""], "--api-key"),
        (["--served-model-name", ""], "--served-model-name"),
        (["--served-model-name", "a", "a"], "'a' is given twice"),
        (["--max-loras", "4"], "--max-loras is given without --enable-lora"),
        (["--lora-dtype", "float32"], "--lora-dtype is given without --enable-lora"),
        (["--lora-host-cache-bytes", "1GiB"], "--lora-host-cache-bytes is given without --enable-lora"),
        (["--lora-modules", "a=b"], "--lora-modules is given without --enable-lora"),
        (["--allow-runtime-lora-updates"], "--allow-runtime-lora-updates is given without --enable-lora"),
        (["--enable-lora", "--allow-runtime-lora-updates"], "--allow-runtime-lora-updates needs --lora-root"),
        (["--enable-lora", "--lora-root", "/a"], "--lora-root is given without --allow-runtime-lora-updates"),
        (["--enable-lora", "--max-loras", "0"], "--max-loras is 0"),
        (["--enable-lora", "--max-loras", "4", "--max-cpu-loras", "2"], "--max-cpu-loras is 2"),
        (["--enable-lora", "--max-lora-rank", "1000"], "--max-lora-rank is 1000"),
        (["--enable-lora", "--lora-modules", "a"], "'a' is not NAME=PATH"),
        (["--enable-lora", "--lora-modules", "=b"], "'=b' is not NAME=PATH"),
        (["--enable-lora", "--lora-modules", "a="], "'a=' is not NAME=PATH"),
        (["--enable-lora", "--lora-modules", '{"name": "a"'], "is not valid JSON"),
        (["--enable-lora", "--lora-modules", '{"name": "a"}'], "needs a name and a path"),
        (["--enable-lora", "--lora-modules", '{"name": "a", "path": 1}'], "needs a name and a path"),
        (["--enable-lora", "--lora-modules", '{"name": "a", "path": "b", "rank": 1}'], "unknown field 'rank'"),
        (["--enable-lora", "--lora-modules", '{"name": "a", "path": "b", "weight": "2"}'], "a number as weight"),
        (["--enable-lora", "--lora-modules", '{"name": "a", "path": "b", "pin": 1}'], "true or false as pin"),
        (["--enable-lora", "--lora-modules", '{"name": "a", "path": "b", "weight": 0}'], "weight of adapter 'a' is 0"),
        (["--enable-lora", "--lora-modules", "a=b", "a=c"], "'a' is given twice"),
        (["--enable-lora", "--lora-modules", "org/base=b"], "'org/base' is given twice"),
    ],
)
def test_what_cannot_be_is_refused_by_name(capsys: pytest.CaptureFixture[str], flags: list[str], named: str) -> None:
    assert named in refusal(capsys, *flags)


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_a_model_that_is_not_there_ends_with_one_line(tmp_path: object) -> None:
    result = run("serve", f"{tmp_path}/missing", "--port", "1")
    assert result.returncode == 1
    assert result.stderr.startswith("lorafleet: error: ")
    assert result.stderr.count("\n") == 1
    assert "missing" in result.stderr


def test_the_version_is_the_installed_one() -> None:
    result = run("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("lorafleet 0.")


@pytest.mark.parametrize(
    "flags", [["serve", "--help"], ["serve", "m", "--port", "x"], ["serve", "m", "--max-loras", "1"]]
)
def test_help_and_mistakes_answer_without_ray_and_torch(flags: list[str]) -> None:
    program = (
        "import sys\nfrom lorafleet.controller.commands.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'ray', 'torch', 'grpc', 'transformers', 'aiohttp', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lorafleet.controller.commands.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_status_of_nothing_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(SystemExit) as ended:
            main(["status", "--url", url])
    assert str(ended.value.code).startswith(f"lorafleet: error: No gateway answers at {url} (")
    assert "--url" in str(ended.value.code)


def test_up_has_the_flags_of_serve_and_joins_the_cluster_of_this_machine() -> None:
    args = make_parser().parse_args(["up", "org/base", "--num-workers", "3", "--enable-lora", "--gateways", "all"])
    assert serve_config(args).num_workers == 3
    cluster = made(UpOptions, args)
    assert (cluster.ray_address, cluster.gateways, cluster.controller_port) == ("auto", "all", 50050)


def test_a_controller_port_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["up", "org/base", "--controller-port", "0"])
    assert ended.value.code == 2
    assert "--controller-port is 0; it must be a whole number from 1 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--api-key", "key"], ["--gateway-processes", "2"]])
def test_flags_of_gateways_are_refused_where_there_are_none(
    capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["up", "org/base", "--gateways", "none", *flags])
    assert ended.value.code == 2
    assert f"{flags[0]} is given with --gateways none" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["serve", "MODEL", "--enable-lora", "--lora-modules", "a=~no-such-user/x"],
        ["serve", "MODEL", "--enable-lora", "--lora-modules", f"a=/{'x' * 5000}"],
        ["serve", "MODEL", "--enable-lora", "--allow-runtime-lora-updates", "--lora-root", "~no-such-user/x"],
        ["serve", "MODEL", "--host", "\udcff"],
        ["serve", "~no-such-user/x"],
        ["serve", "x" * 5000],
        ["serve", "@~no-such-user/x"],
        ["up", "MODEL", "--token-file", "~no-such-user/x"],
    ],
)
def test_a_path_or_host_that_cannot_be_looked_up_is_refused_without_a_traceback(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path) if word == "MODEL" else word for word in command])
    said = capsys.readouterr().err + str(ended.value.code)
    assert "error: " in said and command[-1][2:200] in said
    assert len(said.rpartition("error: ")[2]) < 800


def test_flags_may_stand_in_a_file_behind_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fleet.flags"
    file.write_text("org/base --num-workers 3  # of the four that fit\n--enable-lora\n--lora-modules 'a=/a b'\n")
    args = make_parser().parse_args(with_flags_file(["serve", f"@{file}", "--num-workers", "2"]))
    assert serve_config(args).num_workers == 2, "the command line has the last word"
    assert serve_config(args).adapters == (LoRAModule("a", "/a b"),)
    assert with_flags_file(["serve", "m", "@x"]) == ["serve", "m", "@x"], "a value may begin with @"
    for text, message in (("m --seed 'one", "No closing quotation"), (None, "No such file")):
        file.unlink()
        if text is not None:
            file.write_text(text)
        with pytest.raises(SystemExit) as ended:
            main(["up", f"@{file}"])
        assert ended.value.code == 2
        assert f"The flags of '{file}' cannot be read: " in (said := capsys.readouterr().err) and message in said
        file.touch()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("50100", "'50100' is not LOW-HIGH"),
        ("a-b", "'a-b' is not LOW-HIGH"),
        ("50199-50100", "--worker-ports is 50199-50100; give the first and the last port"),
        ("0-10", "--worker-ports is 0-10"),
        ("60000-70000", "between 1 and 65535"),
    ],
)
def test_worker_ports_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str], value: str, message: str) -> None:
    assert message in refusal(capsys, "--worker-ports", value)
    assert config("--worker-ports", "50100-50199").worker_ports == (50100, 50199)


@pytest.mark.parametrize("value", ["-1", "nan", "soon", "86401"])
def test_a_drain_timeout_that_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], value: str) -> None:
    for command in ("down", "drain"):
        with pytest.raises(SystemExit) as ended:
            main([command, f"--drain-timeout-s={value}"])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "--drain-timeout-s" in said and value in said and "must be a number from 0 to 86400" in said


def test_gateway_is_the_gateways_own_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["gateway", "--help"])
    assert ended.value.code == 0
    assert "usage: lorafleet gateway" in capsys.readouterr().out


def test_bounds_of_gateways_and_workers_are_flags_of_the_fleet(capsys: pytest.CaptureFixture[str]) -> None:
    assert config("--max-body-bytes", "1MiB").limits.max_body_bytes == 1 << 20
    assert config("--max-waiting", "7").engine.max_waiting == 7
    assert "--max-body-bytes" in refusal(capsys, "--max-body-bytes", "0")
    assert "--max-waiting" in refusal(capsys, "--max-waiting", "0")
    assert "--header-timeout-s" in refusal(capsys, "--header-timeout-s", "nan")
    assert "--admin-api-key" in refusal(capsys, "--admin-api-key", "")
