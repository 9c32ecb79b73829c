"""Churn and skew: adapters are loaded, changed and unloaded under skewed traffic; checks answers, measures waits.

python -m benchmarks.churn [--model DIR] [--adapters 64] [--alpha 0.5 1.0 1.5] [--requests 2000] [--out FOLDER]

Runs the engine in this process, by default on a tiny random model in float32, once for each alpha. The seed decides all
events and their times. Prints a table, and with --out writes churn.json and churn.png there. Exits with 1 if an answer
was wrong or missing, or memory was not freed: with many --requests it is a soak test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chart import missing
from benchmarks.churn_run import BASE, MAX_COMPOSED, Ask, Churn, ChurnResult, ChurnSettings, Reference
from benchmarks.random_adapters import write_adapters
from benchmarks.tiny_model import write_tiny_model
from lorafleet.workers.config import EngineConfig, LoRAConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.scheduling.fairness import OUTPUT_TOKEN, PROMPT_TOKEN
from lorafleet.workers.scheduling.request import FinishReason

STALL = 5.0  # a step counts as a stall from so many times the median step


def make_engine(model: Path, args: argparse.Namespace, *, max_loras: int, max_num_seqs: int) -> Engine:
    config = EngineConfig(
        model=str(model),
        dtype=args.dtype,
        max_num_seqs=max_num_seqs,
        max_adapter_wait_s=args.max_adapter_wait_s,
        num_threads=args.num_threads,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes if max_num_seqs > 1 else None,
        max_model_len=256,
        lora=LoRAConfig(
            max_loras=max_loras, max_cpu_loras=max(args.max_cpu_loras, max_loras), lora_eviction=args.eviction
        ),
    )
    engine = Engine.from_config(config)
    engine.load()
    engine.bind_thread()
    return engine


def jain(values: Sequence[float]) -> float:
    """Return Jain's fairness index: 1 if all have the same, 1/n if one has all."""
    total = sum(values)
    return total * total / (len(values) * sum(value * value for value in values)) if total else 1.0


def report(engine: Engine, result: ChurnResult, num_wrong: int, names: Sequence[str]) -> dict[str, Any]:
    """Return the figures of one run."""
    done = [ask for ask in result.asks if ask.finish in (FinishReason.STOP, FinishReason.LENGTH)]
    stats, store = engine.stats(), engine._store.stats()
    service: dict[str, float] = defaultdict(float)
    for ask in result.asks:
        service[ask.request.tenant] += PROMPT_TOKEN * len(ask.request.prompt_token_ids) + OUTPUT_TOKEN * len(
            ask.token_ids
        )
    own = [ask for ask in done if ask.name != BASE]
    cold, warm = [ask for ask in own if ask.is_cold], [ask for ask in own if not ask.is_cold]
    by_name: dict[str, list[Ask]] = defaultdict(list)
    for ask in own:
        by_name[ask.name].append(ask)
    median_step = float(np.median(result.step_s))
    return {
        "requests": len(result.asks),
        "refused": result.num_refused,
        "output_tok_per_s": round(sum(len(ask.token_ids) for ask in result.asks) / result.elapsed_s, 1),
        "wrong_answers": num_wrong,
        "without_terminal_event": sum(ask.num_terminal != 1 for ask in result.asks),
        "errors": sum(ask.finish is FinishReason.ERROR for ask in result.asks),
        "aborted": sum(ask.finish is FinishReason.CANCELLED for ask in result.asks),
        "reloads": result.num_reloads,
        "retired": result.num_retired,
        "preemptions": stats.num_preemptions,
        "cold_starts": len(cold),
        "slot_hit_rate": round(len(warm) / max(1, len(own)), 3),
        "host_hit_rate": round(store.hits / max(1, store.hits + store.loads), 3),
        "prefix_hit_rate": round(stats.num_prefix_hit_tokens / max(1, stats.num_prefix_query_tokens), 3),
        "jain_tenants": round(jain(list(service.values())), 3),
        "ttft_ms": {"warm": percentiles(warm), "cold": percentiles(cold)},
        "steps_p50_ms": round(1e3 * median_step, 2),
        "stalled_steps": int(sum(seconds > STALL * median_step for seconds in result.step_s)),
        "adapters": [
            {"name": name, "requests": len(by_name[name]), "latency_ms": percentiles(by_name[name], last=True)}
            for name in names
            if by_name.get(name)
        ],
    }


def percentiles(asks: Sequence[Ask], *, last: bool = False) -> dict[str, float]:
    """Return percentiles of the milliseconds to the first token, or to the last."""
    if not asks:
        return {}
    waits = [1e3 * (ask.token_s[-1 if last else 0] - ask.sent_s) for ask in asks]
    return {f"p{q}": round(float(np.percentile(waits, q)), 1) for q in (50, 95, 99)}


def draw(runs: Sequence[dict[str, Any]], waits: Sequence[dict[str, list[float]]], path: Path, title: str) -> None:
    """Draw times to first token, warm and cold; latency by popularity; rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (first, popular, rates) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    colours = pyplot.get_cmap("viridis")(np.linspace(0.1, 0.8, len(runs)))
    for run, wait, colour in zip(runs, waits, colours, strict=True):
        for kind, style in (("warm", "-"), ("cold", "--")):
            values = np.sort(wait[kind])
            if len(values):
                label = f"alpha {run['alpha']:g}, {kind}"
                first.plot(values, np.linspace(0, 1, len(values)), style, color=colour, label=label)
        latencies = [adapter["latency_ms"]["p95"] for adapter in run["adapters"]]
        popular.plot(range(1, len(latencies) + 1), latencies, ".", color=colour, label=f"alpha {run['alpha']:g}")
    first.set(xscale="log", xlabel="ms to the first token", ylabel="share of requests", title="first token")
    popular.set(xlabel="adapter, most popular first", ylabel="p95 ms to the last token", yscale="log")
    popular.set_title("latency by adapter")
    names = ("slot_hit_rate", "host_hit_rate", "prefix_hit_rate", "jain_tenants")
    for place, (run, colour) in enumerate(zip(runs, colours, strict=True)):
        at = np.arange(len(names)) + place * 0.8 / len(runs)
        rates.bar(at, [run[name] for name in names], 0.8 / len(runs), color=colour, label=f"alpha {run['alpha']:g}")
    rates.set_xticks(np.arange(len(names)) + 0.3, ["slot hits", "host hits", "prefix hits", "Jain, tenants"])
    rates.set(ylim=(0, 1.05), title="rates")
    for panel in (first, popular, rates):
        panel.legend(fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Churn and skew, with every answer checked.")
    parser.add_argument("--model", type=Path, help="model directory (default: a tiny random one)")
    parser.add_argument("--adapters", type=int, default=64, help="number of live adapters")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.5, 1.0, 1.5], help="skew of the Zipf law")
    parser.add_argument("--requests", type=int, default=2000, help="requests of each run")
    parser.add_argument("--arrival-rate", type=float, default=150.0, help="requests a second")
    parser.add_argument("--retire-rate", type=float, default=2.0, help="adapters replaced by new ones, per second")
    parser.add_argument("--reload-rate", type=float, default=2.0, help="adapters with changed content, per second")
    parser.add_argument("--composed-share", type=float, default=0.0, help="share of requests for several adapters")
    parser.add_argument("--abort-rate", type=float, default=2.0, help="requests cancelled, per second")
    parser.add_argument("--max-loras", type=int, default=8)
    parser.add_argument("--max-cpu-loras", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=1 << 20)
    parser.add_argument("--max-adapter-wait-s", type=float, default=60.0)
    parser.add_argument("--eviction", default="lru")
    parser.add_argument("--dtype", default="float32", help="but for float32, near ties are common and count as wrong")
    parser.add_argument("--num-threads", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for churn.json and churn.png")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    waits: list[dict[str, list[float]]] = []
    num_left = 0
    with tempfile.TemporaryDirectory(prefix="lorafleet-churn-") as scratch:
        model = args.model or write_tiny_model(Path(scratch) / "model")
        folder = Path(scratch) / "contents"
        contents = list(write_adapters(model, folder, count=2 * args.adapters, lora_rank=8, strength=0.3).values())
        reference_engine = make_engine(model, args, max_loras=MAX_COMPOSED, max_num_seqs=1)
        reference = Reference(reference_engine, contents)
        for alpha in args.alpha:
            engine = make_engine(model, args, max_loras=args.max_loras, max_num_seqs=args.max_num_seqs)
            settings = ChurnSettings(
                num_requests=args.requests,
                arrival_rate=args.arrival_rate,
                zipf_alpha=alpha,
                abort_rate=args.abort_rate,
                reload_rate=args.reload_rate,
                retire_rate=args.retire_rate,
                composed_share=args.composed_share,
                seed=args.seed,
            )
            own = Path(scratch) / f"alpha-{alpha:g}"
            own.mkdir()
            churn = Churn(engine, contents, [f"n{i}" for i in range(args.adapters)], own, settings)
            result = churn.run()
            num_wrong = sum(not reference.is_right(ask) for ask in result.asks)
            run = {"alpha": alpha} | report(engine, result, num_wrong, churn.names)
            churn.close()
            engine.check_integrity()
            stats = engine.stats()
            num_left += (stats.num_pages - stats.num_free_pages) + len(stats.device_adapters) + stats.host_cache_bytes
            engine.close()
            runs.append(run)
            own_asks = [ask for ask in result.asks if ask.name != BASE and ask.token_s]
            waits.append(
                {
                    kind: [1e3 * (ask.token_s[0] - ask.sent_s) for ask in own_asks if ask.is_cold is is_cold]
                    for kind, is_cold in (("warm", False), ("cold", True))
                }
            )
            shown = {key: value for key, value in run.items() if key != "adapters"}
            print("  ".join(f"{key} {value}" for key, value in shown.items()), file=sys.stderr)
        reference_engine.close()
    print(f"not freed at the end: {num_left}", file=sys.stderr)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        settings_shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        document = {"machine": platform.platform(), "settings": settings_shown, "runs": runs, "left_behind": num_left}
        (args.out / "churn.json").write_text(json.dumps(document, indent=2) + "\n")
        problem = missing()
        if problem:
            print(problem, file=sys.stderr)
        else:
            title = (
                f"{args.adapters} adapters on {args.max_loras} slots, {args.arrival_rate:g} requests, "
                f"{args.retire_rate:g} retired and {args.reload_rate:g} reloaded adapters a second"
            )
            draw(runs, waits, args.out / "churn.png", title)
    failed = num_left or any(run["wrong_answers"] or run["without_terminal_event"] for run in runs)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
