"""Compares ways to route requests to workers, on a virtual clock.

python -m benchmarks.simulate_routing [--quick] [--out FILE.png]

100 workers and 5,000 adapters; every adapter is requested once before the measured minute begins. It prints, for each
scenario and policy, the median and the 99th percentile of the time to first token, the tiers in which adapters were
found, and the share of prompt tokens found in caches. --quick: 20 workers, 1,000 adapters, 20 s.
"""

from __future__ import annotations

import argparse
import random
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from benchmarks import chart
from benchmarks.fleet import Arrival, Fleet, Outcome, Policy, WorkerModel
from lorafleet.controller.gateway.routing.router import Wanted, choose_worker
from lorafleet.controller.gateway.routing.worker_view import Tier, WorkerView

REQUESTS_A_WORKER = 4.8  # a second: three fifths of a worker's capacity
SHARED_TOKENS = 512
WARM_UP_S = 30.0  # in which every adapter is asked for once, beside half the load
SETTLE_S = 10.0  # more, before requests count


def ours(workers: Sequence[WorkerView], wanted: Wanted, rng: random.Random) -> int:
    """Choose with the gateway's router."""
    chosen = choose_worker(workers, wanted, lot=str(rng.random()))
    assert chosen is not None
    return next(number for number, worker in enumerate(workers) if worker is chosen)


class RoundRobin:
    """Chooses the workers one after the other."""

    def __init__(self) -> None:
        self._next = -1

    def __call__(self, workers: Sequence[WorkerView], wanted: Wanted, rng: random.Random) -> int:
        self._next = (self._next + 1) % len(workers)
        return self._next


def least_loaded(workers: Sequence[WorkerView], wanted: Wanted, rng: random.Random) -> int:
    """Choose the worker with the fewest requests."""
    return min(range(len(workers)), key=lambda number: (workers[number].num_requests, rng.random()))


def pure_affinity(workers: Sequence[WorkerView], wanted: Wanted, rng: random.Random) -> int:
    """Choose the adapter's own worker; the base model may use all."""
    if not wanted.adapters:
        return rng.randrange(len(workers))
    return random.Random(wanted.adapters[0]).randrange(len(workers))


def power_of_two(workers: Sequence[WorkerView], wanted: Wanted, rng: random.Random) -> int:
    """Choose the worker with fewer requests of two drawn at random."""
    return min(rng.sample(range(len(workers)), 2), key=lambda number: workers[number].num_requests)


POLICIES: dict[str, Callable[[], Policy]] = {
    "ours": lambda: ours,
    "round-robin": RoundRobin,
    "least-loaded": lambda: least_loaded,
    "pure affinity": lambda: pure_affinity,
    "power-of-two": lambda: power_of_two,
}


@dataclass(frozen=True, slots=True)
class Size:
    """The size of the fleet, and the duration."""

    num_workers: int = 100
    num_adapters: int = 5000
    seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """The requests of a run."""

    name: str
    alpha: float = 1.0  # exponent of Zipf's law over adapters
    burst_share: float = 0.0  # share of the requests that are for one otherwise rare adapter after another
    burst_s: float = 5.0
    churn_share: float = 0.0  # share of the adapters that new ones replace in popularity, each second
    slowdowns: dict[int, float] = field(default_factory=dict)
    load: float = 1.0  # in REQUESTS_A_WORKER


SCENARIOS = (
    Scenario("Zipf 1.0"),
    Scenario("Zipf 1.4", alpha=1.4),
    Scenario("even", alpha=0.0),
    Scenario("bursts", burst_share=0.3),
    Scenario("churn", churn_share=0.01),
    Scenario("slow worker", slowdowns={3: 4.0}),
    Scenario("busy", load=1.4),
)
QUICK = Size(20, 1000, 20.0)


def trace(scenario: Scenario, size: Size, seed: int = 0) -> list[Arrival]:
    """Return its requests. The warm-up adds one for every adapter."""
    rng = random.Random(seed)
    names = [f"adapter-{number}" for number in range(size.num_adapters)]
    rng.shuffle(names)
    cumulative = list(accumulate((rank + 1) ** -scenario.alpha for rank in range(size.num_adapters)))
    rate = scenario.load * REQUESTS_A_WORKER * size.num_workers
    arrivals = [
        _arrival(rng, WARM_UP_S * (number + rng.random()) / size.num_adapters, name, counts=False)
        for number, name in enumerate(names)
    ]
    begin_s = WARM_UP_S + SETTLE_S
    now, num_new, next_churn = 0.0, 0, WARM_UP_S
    while now < begin_s + size.seconds:
        now += rng.expovariate(rate / 2 if now < WARM_UP_S else rate)
        while scenario.churn_share and now > next_churn:
            for _ in range(int(scenario.churn_share * size.num_adapters)):
                names[rng.randrange(size.num_adapters)] = f"new-{num_new}"
                num_new += 1
            next_churn += 1.0
        name = names[bisect_left(cumulative, rng.random() * cumulative[-1])]
        if now > begin_s and rng.random() < scenario.burst_share:
            name = names[size.num_adapters // 2 + int(now / scenario.burst_s)]
        arrivals.append(_arrival(rng, now, name, counts=now > begin_s))
    return sorted(arrivals, key=lambda arrival: arrival.at_s)


def _arrival(rng: random.Random, at_s: float, name: str, *, counts: bool) -> Arrival:
    num_own = min(2048, int(rng.lognormvariate(4.6, 0.8)) + 1)
    return Arrival(at_s, name, SHARED_TOKENS, num_own, min(600, int(rng.expovariate(1 / 150)) + 1), counts)


def run(scenario: Scenario, size: Size, policy: str) -> Outcome:
    """Run one scenario with one policy."""
    fleet = Fleet(size.num_workers, WorkerModel(), POLICIES[policy](), slowdowns=scenario.slowdowns)
    return fleet.run(trace(scenario, size))


HEADER = (
    f"{'scenario':<14}{'policy':<16}{'p50 ms':>9}{'p99 ms':>9}"
    f"{'device':>9}{'host':>7}{'disk':>7}{'cached':>9}{'requests':>10}"
)
LEGEND = (
    "p50, p99: time to the first token. device, host, disk: where a request's adapter was when it came to its worker.\n"
    "cached: share of the prompts' tokens that needed no computing."
)


def line(scenario: Scenario, policy: str, outcome: Outcome) -> str:
    """Return one row of the table."""
    num_requests = len(outcome.first_token_s)
    found = "".join(
        f"{outcome.found[tier] / num_requests:>{width}.1%}"
        for tier, width in ((Tier.DEVICE, 9), (Tier.HOST, 7), (Tier.DISK, 7))
    )
    cached = outcome.num_cached_tokens / outcome.num_prompt_tokens
    return (
        f"{scenario.name:<14}{policy:<16}{1e3 * outcome.percentile(0.5):>9.0f}{1e3 * outcome.percentile(0.99):>9.0f}"
        f"{found}{cached:>9.1%}{num_requests:>10}"
    )


def draw(outcomes: dict[str, dict[str, Outcome]], path: Path) -> None:
    """Draw the distribution of the times to first token, in a panel for each scenario. Call `chart.missing` first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(POLICIES, ("#2563eb", "#9ca3af", "#f59e0b", "#dc2626", "#10b981"), strict=True))
    figure, axes = pyplot.subplots(1, len(outcomes), figsize=(3.2 * len(outcomes), 3.8), squeeze=False, sharey=True)
    for axis, (name, by_policy) in zip(axes[0], outcomes.items(), strict=True):
        for policy, outcome in by_policy.items():
            times = sorted(outcome.first_token_s)
            late = [1 - number / len(times) for number in range(len(times))]
            axis.step(times, late, where="post", color=colours[policy], label=policy)
        axis.set(title=name, xlabel="time to first token (s)", xscale="log", yscale="log", ylim=(1e-3, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("share of requests that took longer")
    axes[0][-1].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Play ways to route requests against each other.")
    parser.add_argument("--quick", action="store_true", help="a small fleet, in seconds")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="draw the times to first token")
    args = parser.parse_args()
    if args.out and (reason := chart.missing()) is not None:
        sys.exit(reason)
    size = QUICK if args.quick else Size()
    print(HEADER)
    outcomes: dict[str, dict[str, Outcome]] = {}
    for scenario in SCENARIOS:
        for policy in POLICIES:
            outcome = outcomes.setdefault(scenario.name, {})[policy] = run(scenario, size, policy)
            print(line(scenario, policy, outcome), flush=True)
    print(LEGEND)
    for name, by_policy in outcomes.items():
        for share in (0.5, 0.99):
            best = min(by_policy, key=lambda policy: by_policy[policy].percentile(share))
            ratio = by_policy["ours"].percentile(share) / by_policy[best].percentile(share)
            print(f"{name}, p{100 * share:.0f}: ours takes {ratio:.2f} times the best, which is {best}")
    if args.out:
        draw(outcomes, args.out)


if __name__ == "__main__":
    main()
