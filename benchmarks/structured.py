"""What structured output costs: a step's time with no, half and all of 32 rows constrained.

python -m benchmarks.structured [--rows 32] [--steps 80] [--rounds 5]

Each round runs the cases one after another on one engine with the demo model; the medians of all rounds are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time

from lorafleet.workers.config import EngineConfig
from lorafleet.workers.engine.loop import Engine
from lorafleet.workers.grammars.grammar_text import json_schema_grammar
from lorafleet.workers.scheduling.request import GenerateRequest
from lorafleet.workers.scheduling.sampling_options import SamplingOptions
from lorafleet.workers.sources.demo import demo_model_dir

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["cook", "baker", "smith", "pilot"]}, "minItems": 2},
    },
    "required": ["name", "age", "email", "tags"],
    "additionalProperties": False,
}
GRAMMAR = json_schema_grammar({"type": "array", "items": PERSON, "minItems": 1000})  # longer than any answer here
PROMPT_TOKENS = 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    engine = Engine.from_config(EngineConfig(model=str(demo_model_dir()), max_num_seqs=args.rows))
    engine.load()
    engine.prepare_grammars()
    engine.bind_thread()
    cases = (0, args.rows // 2, args.rows)
    times: dict[int, list[float]] = {num_constrained: [] for num_constrained in cases}
    for number in range(args.rounds + 1):
        for num_constrained in cases:
            measured = step_times(engine, args.rows, num_constrained, args.steps, f"{number}:{num_constrained}")
            if number:  # the first round is for warming up
                times[num_constrained] += measured
    plain = statistics.median(times[0])
    for num_constrained, measured in times.items():
        median = statistics.median(measured)
        slowest = sorted(measured)[int(len(measured) * 0.99)]
        print(
            f"{num_constrained:3} of {args.rows} rows constrained: {median * 1e3:6.2f} ms a step "
            f"({median / plain - 1:+.1%}), 99th percentile {slowest * 1e3:6.2f} ms"
        )
    engine.close()


def step_times(engine: Engine, num_rows: int, num_constrained: int, num_steps: int, name: str) -> list[float]:
    """Return the times of steps in which all rows have one token to compute."""
    for row in range(num_rows):
        sampling = SamplingOptions(
            max_tokens=num_steps + 40,
            temperature=0.8,
            seed=row,
            ignore_eos=True,
            grammar=GRAMMAR if row < num_constrained else "",
        )
        prompt = tuple(1000 + (row * 131 + i * 7) % 40_000 for i in range(PROMPT_TOKENS))
        engine.submit(GenerateRequest(f"{name}:{row}", prompt, sampling))
    measured: list[float] = []
    begun: set[str] = set()
    while engine.has_unfinished():
        engine.wait_for_work()
        began = time.perf_counter()
        events = engine.step()
        took = time.perf_counter() - began
        if len(begun) == num_rows and len(events) == num_rows and len(measured) < num_steps:
            measured.append(took)
        begun.update(event.request_id for event in events)
        if len(measured) == num_steps:
            for request_id in begun:
                engine.cancel(request_id)
    return measured


if __name__ == "__main__":
    main()
