"""`lorafleet demo`: serve a small real model with three adapters that come with the package.

Owns: which model, which adapters, their names. Leaves to others: getting the model (workers/sources/demo.py),
everything else (`lorafleet serve`, whose flags it takes).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lorafleet.workers.errors import ConfigError

MODEL_NAME = "smollm2"
ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
ADAPTER_NAMES = ("sql", "pirate", "json")


def serve_arguments(model: str, flags: Sequence[str]) -> list[str]:
    """Return the arguments of `lorafleet serve` for the demo. flags: the user's, which take precedence."""
    demo = ["--served-model-name", MODEL_NAME, "--enable-lora"]
    demo += ["--allow-runtime-lora-updates", "--lora-root", str(ADAPTERS)]
    demo += ["--lora-modules", *(f"{name}={ADAPTERS / name}" for name in ADAPTER_NAMES)]
    return ["serve", model, *demo, *flags]


def demo_model() -> str:
    """Return the model's directory. If needed, get the model and compile the CPU kernels first, at the same time.

    Runs in a process of its own, so that this one stays small. Raises `ConfigError`.
    """
    command = [sys.executable, "-m", "lorafleet.workers.sources.demo", "compile"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ConfigError("The demo model is not here and could not be had; see above.")
    return done.stdout.strip()
