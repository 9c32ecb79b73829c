"""Prints the directory of the demo model, SmolLM2-135M-Instruct; downloads and converts it at the first call.

python examples/demo_model.py
"""

from __future__ import annotations

from lorafleet.workers.sources.demo import main

if __name__ == "__main__":
    main()
