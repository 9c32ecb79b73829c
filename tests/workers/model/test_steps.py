"""What a step costs in calls: one per op and layer whatever is in the batch, no LoRA op for the base model, and steps
that are recorded and run as one call, with the same result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Result, run_engine

from lorafleet.kernels import native
from lorafleet.kernels.activation import silu_mul
from lorafleet.kernels.linear import prepare
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.engine.request import GenerateRequest
from lorafleet.workers.engine.sampling_options import SamplingOptions
from lorafleet.workers.model import decoder, layers

NUM_LAYERS = 3
NUM_ADAPTERS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with adapters of different ranks and targets beside it."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny.make_model("smollm2", directory / "model")
    for number in range(NUM_ADAPTERS):
        fresh = tiny.make_model("smollm2", directory / "model")
        tiny.make_adapter(fresh, directory / f"adapter-{number}", rank=2 + 3 * number, seed=number)
    return directory


class Counting:
    """The native library; counts the calls of each kernel."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> None:
            self.calls[name] += 1
            function(*arguments)

        return call


def make_engine(model: Path, *, dtype: str = "bfloat16", enforce_eager: bool = False) -> tuple[Engine, list[str]]:
    config = EngineConfig(
        model=str(model / "model"),
        dtype=dtype,
        device="cpu",
        enforce_eager=enforce_eager,
        num_threads=2,
        lora=LoRAConfig(max_loras=4),
    )
    engine = Engine.from_config(config)
    engine.load()
    return engine, [engine.register_adapter(str(model / f"adapter-{n}")).digest for n in range(NUM_ADAPTERS)]


def requests(adapters: list[str | None], num_output: int = 12) -> list[GenerateRequest]:
    """Prompts and lengths that differ, so that the batch shrinks while it runs."""
    made = []
    for number, adapter in enumerate(adapters):
        sampling = SamplingOptions(
            max_tokens=num_output + number, temperature=0.0, ignore_eos=True, logprobs=3, seed=number
        )
        prompt = tuple((7 * number + 3 * i) % 120 + 5 for i in range(5 + 6 * number))
        made.append(GenerateRequest(str(number), prompt, sampling, adapter))
    return made


@pytest.mark.parametrize(("num_adapters", "num_requests"), [(0, 1), (0, 6), (1, 6), (3, 6)])
def test_a_step_makes_one_call_per_op_and_layer(
    num_adapters: int, num_requests: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, digests = make_engine(model, enforce_eager=True)
    try:
        used: list[str | None] = [digests[i % num_adapters] if num_adapters else None for i in range(num_requests)]
        run_engine(engine, requests([*digests]))  # all adapters are in slots now
        counting = Counting(native.library())
        monkeypatch.setattr(native, "_library", counting)
        before = engine.stats().num_steps
        run_engine(engine, requests(used))
        num_steps = engine.stats().num_steps - before
    finally:
        engine.close()
    per_step = {name: calls / num_steps for name, calls in counting.calls.items() if name != "lf_sample_tokens"}
    expected = {
        "lf_rms_norm": 1,
        "lf_fused_add_rms_norm": 2 * NUM_LAYERS,
        "lf_linear_packed": 4 * NUM_LAYERS + 1,
        "lf_rope_kv_write": NUM_LAYERS,
        "lf_paged_attention": NUM_LAYERS,
        "lf_silu_mul": NUM_LAYERS,
    }
    assert per_step == expected | ({"lf_lora_add": 4 * NUM_LAYERS} if num_adapters else {})


def run_all(model: Path, dtype: str, **changes: Any) -> dict[str, Result]:
    engine, digests = make_engine(model, dtype=dtype, **changes)
    engine.bind_thread()
    try:
        run_engine(engine, requests([*digests]))  # all adapters are in slots now
        return run_engine(engine, requests([None, digests[0], digests[1], digests[0], None, digests[2]], num_output=20))
    finally:
        engine.close()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[native.Recording]:
    """All recordings that are run, in order."""
    run, ran = native.Recording.run, []

    def noted(recording: native.Recording) -> None:
        ran.append(recording)
        run(recording)

    monkeypatch.setattr(native.Recording, "run", noted)
    return ran


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_steps_that_run_a_kept_recording_give_the_same_bits(
    dtype: str, model: Path, runs: list[native.Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run_all(model, dtype)
    assert len(runs) - len({id(recording) for recording in runs}) > 10
    runs.clear()
    monkeypatch.setattr(decoder, "_MAX_KEPT_TOKENS", 0)
    assert run_all(model, dtype) == kept
    assert len({id(recording) for recording in runs}) == len(runs)


def test_a_model_of_which_torch_makes_a_product_is_not_recorded_and_torch_has_the_threads(
    model: Path, runs: list[native.Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = torch.get_num_threads()
    seen: list[tuple[int, int]] = []  # threads of the kernels and of torch in a step

    def noted(*arguments: torch.Tensor) -> torch.Tensor:
        seen.append((native.get_threads(), torch.get_num_threads()))
        return silu_mul(*arguments)

    monkeypatch.setattr(decoder, "silu_mul", noted)
    expected = run_all(model, "float32")
    assert runs and set(seen) == {(2, 1)} and torch.get_num_threads() == own
    runs.clear()
    seen.clear()
    monkeypatch.setattr(layers, "prepare", lambda weight, **form: prepare(weight, **form | {"packed": False}))
    found = run_all(model, "float32")
    assert not runs and set(seen) == {(1, 2)} and torch.get_num_threads() == own
    assert [result.token_ids for result in found.values()] == [result.token_ids for result in expected.values()]


def test_an_eager_engine_records_nothing_and_gives_the_same_bits(model: Path, runs: list[native.Recording]) -> None:
    eager = run_all(model, "bfloat16", enforce_eager=True)
    assert not runs
    assert run_all(model, "bfloat16") == eager and runs


def test_recordings_are_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = run_all(model, "bfloat16")
    monkeypatch.setattr(decoder, "_MAX_RECORDINGS", 2)
    assert run_all(model, "bfloat16") == kept


def test_torchs_products_are_never_left_out_of_a_recording() -> None:
    from lorafleet.kernels.linear import linear

    x = torch.randn(3, 8)
    with pytest.raises(AssertionError, match="recorded"), native.record():
        linear(x, prepare(torch.randn(5, 8), packed=False))
    assert not native.is_recording()


def test_what_a_recording_reads_is_what_its_tensors_hold_when_it_is_run() -> None:
    from lorafleet.kernels.norm import rms_norm

    x, weight, out = torch.randn(4, 32), torch.randn(32), torch.empty(4, 32)
    out.zero_()
    with native.record() as recording:
        rms_norm(x, weight, 1e-5, out)
    assert not out.any(), "nothing is run while it is recorded"
    for _ in range(2):
        x.normal_()
        out.zero_()
        recording.run()
        assert torch.equal(out, rms_norm(x, weight, 1e-5))


def test_the_engine_says_which_kernels_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine(model)
    try:
        assert engine.describe()[-1].split() == ["CPU", "kernels", native.supported_levels()[0].name]
    finally:
        engine.close()
    with monkeypatch.context() as changed:
        changed.setattr(native, "_decided", False)
        changed.setattr(native, "_description", "")
        changed.setattr(native, "_library", None)
        changed.setenv("LORAFLEET_NATIVE_KERNELS", "0")
        assert engine.describe()[-1].endswith("slow references, as LORAFLEET_NATIVE_KERNELS=0 asks for")
