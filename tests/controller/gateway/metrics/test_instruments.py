"""/metrics: it parses, it counts, and its labels stay bounded."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from lorafleet.controller.gateway.metrics.instruments import MAX_MODELS, Metrics
from lorafleet.proto import worker_pb2

BODY = {"model": "sql-adapter", "prompt": "hello world", "max_tokens": 5}


async def _samples(fleet: Any) -> dict[str, list[tuple[dict[str, str], float]]]:
    status, text = await fleet.get("/metrics")
    assert status == 200
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


async def test_requests_and_tokens_are_counted_under_both_names(fleet: Any, tokenizer: Any) -> None:
    fleet.worker.device_adapters = ["d-sql"]
    for stream in (False, True):
        async with fleet.http.post("/v1/completions", json=BODY | {"stream": stream}) as response:
            await response.read()
    await fleet.post("/v1/completions", {"model": "nothing", "prompt": "a"})
    await fleet.get("/made/up/by/a/scanner")
    view = fleet.state._pool.views
    await fleet.until(lambda: view()[0].num_device_adapters)
    samples = await _samples(fleet)
    num_prompt = len(tokenizer.encode("hello world"))
    model = {"model": "sql-adapter"}
    vllm = {"model_name": "sql-adapter"}
    assert (model, 10.0) in samples["lorafleet_generation_tokens_total"]
    assert (vllm, 10.0) in samples["vllm:generation_tokens_total"]
    assert (vllm, 2.0 * num_prompt) in samples["vllm:prompt_tokens_total"]
    assert (vllm | {"finished_reason": "length"}, 2.0) in samples["vllm:request_success_total"]
    for name in (
        "vllm:time_to_first_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "lorafleet_time_to_first_token_seconds",
        "lorafleet_e2e_request_latency_seconds",
    ):
        assert [value for _, value in samples[name + "_count"]] == [2.0]
    assert samples["vllm:inter_token_latency_seconds_count"] == samples["vllm:time_per_output_token_seconds_count"]
    http = {(labels["route"], labels["status"]): value for labels, value in samples["lorafleet_http_requests_total"]}
    assert http["/v1/completions", "200"] == 2
    assert http["/v1/completions", "404"] == 1
    assert http["unmatched", "404"] == 1
    assert samples["lorafleet_requests_in_flight"] == [({}, 0.0)]


async def test_heartbeats_become_gauges(fleet: Any) -> None:
    fleet.worker.load.num_running, fleet.worker.load.num_waiting = 3, 4
    fleet.worker.load.host_cache_usage = 0.5
    fleet.worker.device_adapters = ["d-sql", "d-pirate"]
    view = fleet.state._pool.views
    await fleet.until(lambda: view()[0].num_waiting == 4)
    samples = await _samples(fleet)
    worker = {"worker": "worker-a"}
    assert samples["lorafleet_worker_requests_running"] == [(worker, 3.0)]
    assert samples["lorafleet_worker_requests_waiting"] == [(worker, 4.0)]
    assert samples["lorafleet_worker_kv_cache_usage_ratio"] == [(worker, 0.25)]
    assert samples["lorafleet_worker_max_requests"] == [(worker, 8.0)]
    assert samples["lorafleet_worker_adapter_slots"] == [(worker, 2.0)]
    assert samples["lorafleet_worker_host_cache_usage_ratio"] == [(worker, 0.5)]
    assert samples["lorafleet_worker_ranks"] == [(worker, 1.0)]
    assert samples["lorafleet_worker_generation"] == [(worker, 1.0)]
    tiers = [samples[f"lorafleet_worker_{tier}_adapters"] for tier in ("device", "host", "disk")]
    assert tiers == [[(worker, 2.0)], [(worker, 0.0)], [(worker, 0.0)]]
    assert samples["vllm:num_requests_running"] == [({"model_name": "tiny"}, 3.0)]
    assert samples["vllm:num_requests_waiting"] == [({"model_name": "tiny"}, 4.0)]
    assert samples["vllm:kv_cache_usage_perc"] == [({"model_name": "tiny"}, 0.25)]
    assert samples["vllm:cache_config_info"] == [({"block_size": "16", "num_gpu_blocks": "100"}, 1.0)]


async def test_the_cache_info_covers_all_workers_and_is_missing_before_the_first_report(new_fleet: Any) -> None:
    fleet = await new_fleet(num_workers=2)
    view = fleet.state._pool.views
    await fleet.until(lambda: all(one.num_pages for one in view()))
    info = (await _samples(fleet))["vllm:cache_config_info"]
    assert info == [({"block_size": "16", "num_gpu_blocks": "200"}, 1.0)]
    for worker in fleet.workers:
        await worker.kill()
    await fleet.until(lambda: not any(one.num_pages for one in view()))
    assert "vllm:cache_config_info" not in await _samples(fleet)


async def test_cached_prompt_tokens_are_prefix_cache_hits(fleet: Any, tokenizer: Any) -> None:
    fleet.worker.num_cached = [0, 1]
    for _ in range(2):
        await fleet.post("/v1/completions", BODY)
    samples = await _samples(fleet)
    assert samples["lorafleet_cached_prompt_tokens_total"] == [({"model": "sql-adapter"}, 1.0)]
    assert samples["vllm:prefix_cache_hits_total"] == [({"model_name": "sql-adapter"}, 1.0)]
    assert samples["vllm:prefix_cache_queries_total"] == samples["vllm:prompt_tokens_total"]
    assert samples["vllm:prompt_tokens_total"] == [
        ({"model_name": "sql-adapter"}, 2.0 * len(tokenizer.encode("hello world")))
    ]


async def test_errors_are_counted_by_code_and_stand_at_0_before(fleet: Any) -> None:
    assert ({"code": "model_not_found"}, 0.0) in (await _samples(fleet))["lorafleet_errors_total"]
    await fleet.post("/v1/completions", {"model": "nothing", "prompt": "a"})
    assert (await fleet.post("/v1/completions", BODY))[0] == 200
    errors = {labels["code"]: value for labels, value in (await _samples(fleet))["lorafleet_errors_total"] if value}
    assert errors == {"model_not_found": 1.0}


async def test_a_refused_load_counts_as_an_error_of_that_kind(fleet: Any) -> None:
    fleet.controller.update_failure = worker_pb2.Failure(code="adapter_refused", message="No.", reason="rank_too_large")
    status, _ = await fleet.post("/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "/adapters/new"})
    assert status == 422
    assert ({"code": "adapter_refused"}, 1.0) in (await _samples(fleet))["lorafleet_errors_total"]


async def test_an_error_in_mid_stream_is_counted_though_the_status_is_200(fleet: Any) -> None:
    fleet.worker.permits = 3
    async with fleet.http.post("/v1/completions", json=BODY | {"stream": True, "max_tokens": 30}) as response:
        await response.content.readuntil(b"\n\n")
        await fleet.worker.kill()
        await response.read()
    samples = await _samples(fleet)
    assert ({"code": "worker_lost"}, 1.0) in samples["lorafleet_errors_total"]
    assert ({"route": "/v1/completions", "status": "200"}, 1.0) in samples["lorafleet_http_requests_total"]


async def test_the_lora_info_is_one_current_series(fleet: Any) -> None:
    view = fleet.state._pool.views
    fleet.worker.permits = 0
    waiting = asyncio.create_task(fleet.post("/v1/completions", BODY | {"model": "org/pirate"}))
    for digests, running in ((["d-sql"], "sql-adapter"), (["d-sql", "d-pirate"], "org/pirate,sql-adapter")):
        fleet.worker.device_adapters = digests
        await fleet.until(lambda digests=digests: view()[0].num_device_adapters == len(digests))
        await fleet.until(lambda: fleet.worker.running)
        ((labels, at),) = (await _samples(fleet))["vllm:lora_requests_info"]
        assert at > 1e9
        assert labels == {
            "max_lora": "2",
            "running_lora_adapters": running,
            "waiting_lora_adapters": "" if "pirate" in running else "org/pirate",
        }
    fleet.worker.permits = None
    await waiting


async def test_an_abandoned_request_is_an_abort_and_499(fleet: Any) -> None:
    fleet.worker.permits = 0
    request = asyncio.create_task(fleet.post("/v1/completions", BODY))
    await fleet.until(lambda: fleet.worker.running)
    request.cancel()
    await fleet.until(lambda: fleet.worker.cancels)
    samples = await _samples(fleet)
    assert ({"model": "sql-adapter", "finish_reason": "abort"}, 1.0) in samples["lorafleet_choices_total"]
    assert ({"route": "/v1/completions", "status": "499"}, 1.0) in samples["lorafleet_http_requests_total"]


async def test_vllms_names_can_be_switched_off(new_fleet: Any) -> None:
    fleet = await new_fleet(vllm_metrics_compat=False)
    assert not [name for name in await _samples(fleet) if name.startswith("vllm")]


def test_the_number_of_model_labels_is_bounded() -> None:
    metrics = Metrics()
    for number in range(3 * MAX_MODELS):
        metrics.model(f"m{number}").tokens(1)
    assert metrics.render().count(b"lorafleet_generation_tokens_total{") == MAX_MODELS + 1
    assert b'lorafleet_generation_tokens_total{model="other"} ' in metrics.render()
