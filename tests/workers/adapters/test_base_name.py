"""Names of base models that count as the same."""

from __future__ import annotations

import pytest

from lorafleet.workers.adapters.base_name import is_same_base

SNAPSHOT = "/cache/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f249a16976918f6564b8830bc894c89659"


@pytest.mark.parametrize(
    ("model", "named", "same"),
    [
        ("/models/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", True),
        ("/models/llama-3.1-8b/", "meta-llama/Llama-3.1-8B", True),
        (SNAPSHOT, "meta-llama/Llama-3.1-8B", True),
        (SNAPSHOT, "/home/me/Llama-3.1-8B", True),
        ("/models/Llama-3.1-8B.gguf", "Llama-3.1-8B", True),
        ("/models/Llama-3.1-8B", None, True),
        ("/models/Llama-3.1-8B", "", True),
        (SNAPSHOT, "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", False),
        ("/models/a", "/", False),
    ],
)
def test_the_last_part_of_a_name_counts(model: str, named: str | None, same: bool) -> None:
    assert is_same_base(model, named) is same
