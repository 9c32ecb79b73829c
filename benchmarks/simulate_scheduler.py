"""What fairness and the bound on waiting do, and what deciding costs: traces played to the real scheduler.

python -m benchmarks.simulate_scheduler prints a table; --out FILE.png draws each scenario's waits, with the bound and
without. It needs no model and no GPU, and is over in a minute. --slow prints what the bound costs where adapters take
long to read, or take slots from those that use them better: never more than a fifth of the throughput. That takes
twenty.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks import chart
from benchmarks.simulation import Arrival, Machine, Outcome, Simulation, jain

MAX_WAIT_S = 60.0
MAX_SLOW_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    make: Callable[[], list[Arrival]]
    until_s: float


def flood() -> list[Arrival]:
    """One tenant keeps 200 requests open, two keep 20; the base model."""
    arrivals = [Arrival(0.0, "flood", None, 128, 128, repeats=True) for _ in range(200)]
    arrivals += [Arrival(5.0, tenant, None, 128, 128, repeats=True) for tenant in ("b", "c") for _ in range(20)]
    return arrivals


def shares() -> list[Arrival]:
    """Three tenants with weights 1, 2 and 4 that always wait."""
    tenants = (("one", 1.0), ("two", 2.0), ("four", 4.0))
    return [
        Arrival(0.0, tenant, None, 128, 128, weight=weight, repeats=True)
        for tenant, weight in tenants
        for _ in range(80)
    ]


def zipf() -> list[Arrival]:
    """Three tenants, 300 adapters whose use falls off as 1/k; more work than the machine can do."""
    rng = random.Random(0)
    weights = [1.0 / k for k in range(1, 301)]
    arrivals, at_s = [], 0.0
    while at_s < 240.0:
        at_s += rng.expovariate(12.0)
        (adapter,) = rng.choices(range(300), weights)
        tenant = rng.choices("abc", (8.0, 1.0, 1.0))[0]
        arrivals.append(Arrival(at_s, tenant, f"adapter-{adapter}", rng.randrange(20, 400), rng.randrange(10, 300)))
    return arrivals


def bursts() -> list[Arrival]:
    """Every 20 seconds 100 requests for as many of 400 adapters."""
    rng = random.Random(1)
    return [
        Arrival(20.0 * burst + rng.random(), rng.choice("abc"), f"adapter-{rng.randrange(400)}", 100, 100)
        for burst in range(10)
        for _ in range(100)
    ]


def held() -> list[Arrival]:
    """Eight adapters hold all slots with outputs of 10,000 tokens; a hundred others want one for 20 tokens."""
    arrivals = [Arrival(0.0, "holds", f"hot-{number}", 100, 10_000, repeats=True) for number in range(8)]
    arrivals += [Arrival(1.0 + 0.1 * number, "wants", f"cold-{number}", 100, 20) for number in range(100)]
    return arrivals


def overload() -> list[Arrival]:
    """700 adapters with outputs of 2,000 tokens at once: more than the bound can serve."""
    rng = random.Random(2)
    return [Arrival(10.0 * rng.random(), "t", f"adapter-{number}", 100, 2000) for number in range(700)]


SCENARIOS = (
    Scenario("one tenant floods", flood, 120.0),
    Scenario("weights 1, 2, 4", shares, 120.0),
    Scenario("300 adapters, Zipf", zipf, 300.0),
    Scenario("bursts", bursts, 260.0),
    Scenario("all slots held", held, 180.0),
    Scenario("more than can be served", overload, 180.0),
)


@dataclass(frozen=True, slots=True)
class Slow:
    """Adapters that are wanted all the time, most of them more than host memory holds, and the base model."""

    read_s: float
    num_adapters: int
    num_tenants: int  # of each adapter
    num_base: int  # requests

    def make(self) -> list[Arrival]:
        tenants = range(self.num_tenants)
        arrivals = [
            Arrival(0.0, f"t{tenant}", f"adapter-{number}", 20, 100, repeats=True)
            for number in range(self.num_adapters)
            for tenant in tenants
        ]
        return arrivals + _base(self.num_base)


@dataclass(frozen=True, slots=True)
class Held:
    """All slots are held by long outputs, as many of each adapter, and a hundred other adapters want one."""

    num_slots: int
    num_each: int  # requests for each adapter that holds a slot
    num_output: int  # of those that want one
    num_base: int

    def make(self) -> list[Arrival]:
        arrivals = [
            Arrival(0.0, "holds", f"hot-{number}", 100, 10_000, repeats=True)
            for number in range(self.num_slots)
            for _ in range(self.num_each)
        ]
        arrivals += [
            Arrival(1.0 + 0.1 * number, "wants", f"cold-{number}", 100, self.num_output) for number in range(100)
        ]
        return arrivals + _base(self.num_base)


def _base(num_requests: int) -> list[Arrival]:
    return [Arrival(0.0, f"b{number % 4}", None, 20, 100, repeats=True) for number in range(num_requests)]


SLOW = tuple(
    Slow(read_s, num_adapters, num_tenants, num_base)
    for read_s, num_adapters, num_tenants, num_base in product((0.01, 0.1, 1.0, 10.0), (10, 100, 500), (1, 8), (0, 128))
)
HELD = tuple(
    Held(num_slots, num_each, num_output, num_base)
    for (num_slots, num_each), num_output, num_base in product(
        ((2, 32), (8, 1), (8, 8), (32, 2)), (20, 10_000), (0, 128)
    )
)
_READ_HELD_S = 0.1


def run_slow(load: Slow | Held, max_wait_s: float, until_s: float) -> Outcome:
    read_s = load.read_s if isinstance(load, Slow) else _READ_HELD_S
    num_slots = load.num_slots if isinstance(load, Held) else 8
    machine = Machine(num_slots=num_slots, num_host=2 * num_slots, read_s=read_s, load_s=min(read_s, 0.02))
    return Simulation(machine, max_wait_s).run(load.make(), until_s)


def slow_line(load: Slow | Held) -> str:
    """With the bound against without, for a minute and a half."""
    plain, bounded = (run_slow(load, max_wait_s, 90.0) for max_wait_s in (0.0, MAX_SLOW_WAIT_S))
    rates = [outcome.num_tokens / outcome.seconds for outcome in (plain, bounded)]
    base = [base_rate(outcome) for outcome in (plain, bounded)]
    if isinstance(load, Slow):
        name = f"{load.read_s:g} s, {load.num_adapters} x {load.num_tenants}, {load.num_base} base"
    else:
        name = f"{load.num_slots} slots x {load.num_each}, {load.num_output} tokens, {load.num_base} base"
    return (
        f"{name:<36}{rates[0]:>9.0f}{rates[1]:>8.0f}{rates[1] / rates[0]:>7.2f}{base[0]:>8.0f}{base[1]:>7.0f}"
        f"{max(plain.waits.values()):>9.1f}{max(bounded.first_waits.values()):>11.1f}{max(bounded.waits.values()):>9.1f}"
        f"{bounded.num_refused:>9}{bounded.num_given_up:>9}{bounded.num_preemptions:>9}"
    )


def base_rate(outcome: Outcome) -> float:
    """Of the service a second, what the tenants of the base model got, in output tokens."""
    return sum(service for tenant, service in outcome.service.items() if tenant.startswith("b")) / 2 / outcome.seconds


SLOW_HEADER = (
    f"{'load':<36}{'no bound':>9}{'tok/s':>8}{'ratio':>7}{'base':>8}{'tok/s':>7}{'longest':>9}"
    f"{'first wait':>11}{'longest':>9}{'refused':>9}{'given up':>9}{'preempt.':>9}"
)
SLOW_LEGEND = (
    "load: seconds to read an adapter, adapters x tenants of each, requests for the base model; or who holds slots,\n"
    "and what a hundred other adapters want. First without the bound, then with one of 30 s: tokens a second, in all\n"
    "and of the base model; the longest wait, before the first token and at all; refused at once, and after the wait.\n"
    "ratio: to be 0.8 at least."
)


def run(scenario: Scenario, max_wait_s: float) -> Outcome:
    return Simulation(Machine(), max_wait_s).run(scenario.make(), scenario.until_s)


def line(scenario: Scenario, max_wait_s: float, outcome: Outcome) -> str:
    weights = {arrival.tenant: arrival.weight for arrival in scenario.make()}
    index = jain(outcome.service.get(tenant, 0.0) / weight for tenant, weight in weights.items())
    costs = sorted(outcome.schedule_s)
    return (
        f"{scenario.name:<25}{max_wait_s:>6.0f}{outcome.num_accepted:>9}{outcome.num_refused:>8}"
        f"{max(outcome.first_waits.values()):>11.1f}{max(outcome.waits.values()):>9.1f}{index:>7.3f}"
        f"{outcome.num_preemptions:>9}{outcome.num_tokens / outcome.seconds:>8.0f}"
        f"{1e6 * costs[len(costs) // 2]:>8.0f}{1e6 * costs[len(costs) * 99 // 100]:>8.0f}"
    )


HEADER = (
    f"{'scenario':<25}{'bound':>6}{'accepted':>9}{'refused':>8}{'first wait':>11}{'longest':>9}{'Jain':>7}"
    f"{'preempt.':>9}{'tok/s':>8}{'p50 us':>8}{'p99 us':>8}"
)
LEGEND = (
    "bound: --max-adapter-wait-s, 0 is none. first wait, longest: seconds that a client with requests got no token,\n"
    "before its first and at all. Jain: index of the tenants' weighted service. p50, p99: of a call of schedule()."
)


def draw(outcomes: dict[str, dict[float, Outcome]], path: Path) -> None:
    """How the clients' waits are distributed, a panel for each scenario. Call `chart.missing` first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(outcomes), figsize=(3.4 * len(outcomes), 3.6), squeeze=False)
    for axis, (name, by_bound) in zip(axes[0], outcomes.items(), strict=True):
        for max_wait_s, outcome in by_bound.items():
            waits = sorted(outcome.first_waits.values())
            shares = [(number + 1) / len(waits) for number in range(len(waits))]
            colour = "#2563eb" if max_wait_s else "#9ca3af"
            axis.step(waits, shares, where="post", color=colour, label=f"{max_wait_s:g} s" if max_wait_s else "none")
        axis.axvline(MAX_WAIT_S, color="#f59e0b", linewidth=1)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("first token after (s)", fontsize=8)
        axis.set_ylim(0, 1.02)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("share of clients", fontsize=8)
    axes[0][0].legend(title="--max-adapter-wait-s", fontsize=8, title_fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Play traces to the scheduler on a virtual clock.")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="draw the waits")
    parser.add_argument("--slow", action="store_true", help="what the bound costs where it may cost much")
    args = parser.parse_args()
    if args.slow:
        print(SLOW_HEADER)
        for load in (*HELD, *SLOW):
            print(slow_line(load), flush=True)
        print(SLOW_LEGEND)
        return
    if args.out and (reason := chart.missing()) is not None:
        sys.exit(reason)
    outcomes: dict[str, dict[float, Outcome]] = {}
    print(HEADER)
    for scenario in SCENARIOS:
        for max_wait_s in (0.0, MAX_WAIT_S):
            outcome = outcomes.setdefault(scenario.name, {})[max_wait_s] = run(scenario, max_wait_s)
            print(line(scenario, max_wait_s, outcome), flush=True)
    print(LEGEND)
    if args.out:
        draw(outcomes, args.out)


if __name__ == "__main__":
    main()
