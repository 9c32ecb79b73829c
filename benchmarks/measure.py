"""Arrival times of tokens, and the figures computed from them."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.workloads import Workload


@dataclass(slots=True)
class Timeline:
    """One request's times, in seconds of one monotonic clock."""

    sent_s: float
    token_s: list[float] = field(default_factory=list)  # one entry per token


def summarise(workload: Workload, timelines: Sequence[Timeline], elapsed_s: float) -> dict[str, Any]:
    """Return the figures of one run. Tokens that arrived together have gaps of zero."""
    num_output = sum(len(timeline.token_s) for timeline in timelines)
    num_input = workload.num_input_tokens * len(timelines)
    first = [timeline.token_s[0] - timeline.sent_s for timeline in timelines if timeline.token_s]
    gaps = [gap for timeline in timelines for gap in np.diff(timeline.token_s).tolist()]
    prefill_s = max(timeline.token_s[0] for timeline in timelines) - min(timeline.sent_s for timeline in timelines)
    return {
        "workload": workload.name,
        "num_requests": len(timelines),
        "elapsed_s": round(elapsed_s, 3),
        "output_tok_per_s": round(num_output / elapsed_s, 1),
        "prompt_tok_per_s": round(num_input / prefill_s, 1),
        "ttft_ms": _percentiles(first),
        "itl_ms": _percentiles(gaps),
        "tpot_ms": round(_mean_gap_ms(timelines), 3),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"p50": round(1e3 * float(p50), 2), "p99": round(1e3 * float(p99), 2)}


def _mean_gap_ms(timelines: Sequence[Timeline]) -> float:
    """Return the milliseconds per token from a request's first to its last, including stalls."""
    spans = [timeline.token_s[-1] - timeline.token_s[0] for timeline in timelines if timeline.token_s]
    return 1e3 * sum(spans) / max(1, sum(len(timeline.token_s) - 1 for timeline in timelines if timeline.token_s))


def report(target: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table to stderr, the JSON document to stdout."""
    print(
        f"{'workload':<18}{'out tok/s':>10}{'in tok/s':>10}{'ttft p50':>10}{'p99':>9}{'itl p50':>9}{'p99':>9}",
        file=sys.stderr,
    )
    for row in rows:
        ttft, itl = row["ttft_ms"], row["itl_ms"]
        print(
            f"{row['workload']:<18}{row['output_tok_per_s']:>10}{row['prompt_tok_per_s']:>10}"
            f"{ttft.get('p50', '-'):>10}{ttft.get('p99', '-'):>9}{itl.get('p50', '-'):>9}{itl.get('p99', '-'):>9}",
            file=sys.stderr,
        )
    json.dump({"target": target, "machine": platform.platform(), "results": list(rows)}, sys.stdout, indent=2)
    print()
