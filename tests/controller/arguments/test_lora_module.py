"""Adapters as they are written on a command line."""

from __future__ import annotations

import argparse
import json

import pytest

from lorafleet.controller.arguments.lora_module import lora_module
from lorafleet.workers.config import LoRAModule


@pytest.mark.parametrize(
    ("text", "module"),
    [
        ("sql=~/sql", LoRAModule("sql", "~/sql")),
        ("eq=a=b", LoRAModule("eq", "a=b")),
        ('{"name": "a", "path": "org/a"}', LoRAModule("a", "org/a")),
        (
            ' {"name": "a", "path": "b", "base_model_name": "c", "weight": 2, "pin": true}',
            LoRAModule("a", "b", "c", 2.0, True),
        ),
    ],
)
def test_both_forms_are_read(text: str, module: LoRAModule) -> None:
    assert lora_module(text) == module


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a", "is not NAME=PATH"),
        ("=b", "is not NAME=PATH"),
        ("a=", "is not NAME=PATH"),
        ("x" * 257 + "=b", "256 printable"),
        ("a\x1b[2J=b", "printable"),
        ('{"name": " a", "path": "b"}', "without leading or trailing blanks"),
        ('{"name": "a"', "is not valid JSON"),
        ("{" * 100_000, "is not valid JSON"),
        ('{"name": ' + "[" * 100_000, "is not valid JSON"),
        ('{"name": "a", "path": "b", "base_model_name": 3}', "a string as base_model_name"),
        ('{"name": "a", "path": "b", "weight": 1' + "0" * 400 + "}", "a smaller weight"),
        ('{"name": "a"}', "needs a name and a path"),
        ('{"name": "a", "path": "b", "rank": 1}', "unknown field 'rank'"),
        (json.dumps({"x" * 100_000: 1}), "unknown field"),
        ('{"name": "a", "path": "b", "weight": "2"}', "a number as weight"),
        ('{"name": "a", "path": "b", "weight": 0}', "weight of adapter 'a' is 0"),
        ('{"name": "a", "path": "b", "pin": 1}', "true or false as pin"),
    ],
)
def test_what_is_no_adapter_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=said) as caught:
        lora_module(text)
    assert len(str(caught.value)) < 1000
