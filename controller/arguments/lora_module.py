"""Adapters on a command line."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lorafleet.controller.arguments.parser import quoted
from lorafleet.workers.config import LoRAModule
from lorafleet.workers.errors import ConfigError


def lora_module(text: str) -> LoRAModule:
    """Return the adapter of NAME=PATH, or of vLLM's JSON form. Raises `argparse.ArgumentTypeError`."""
    if text.lstrip().startswith("{"):
        return _lora_module_from_json(text)
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not NAME=PATH, nor a JSON object with name and path")
    try:
        return LoRAModule(name, path)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.message) from error


def _lora_module_from_json(text: str) -> LoRAModule:
    try:
        fields: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not valid JSON: {error}") from error
    unknown = sorted(set(fields) - {"name", "path", "base_model_name", "weight", "pin"})
    if unknown:
        raise argparse.ArgumentTypeError(f"{quoted(text)} has the unknown field {quoted(unknown[0])}")
    if not all(isinstance(fields.get(key), str) and fields[key] for key in ("name", "path")):
        raise argparse.ArgumentTypeError(f"{quoted(text)} needs a name and a path")
    if not isinstance(fields.get("base_model_name"), str | None):
        raise argparse.ArgumentTypeError(f"{quoted(text)} must have a string as base_model_name")
    weight, pin = fields.get("weight", 1.0), fields.get("pin", False)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not isinstance(pin, bool):
        raise argparse.ArgumentTypeError(f"{quoted(text)} must have a number as weight, and true or false as pin")
    try:
        return LoRAModule(fields["name"], fields["path"], fields.get("base_model_name"), float(weight), pin)
    except OverflowError as error:  # an integer beyond any float
        raise argparse.ArgumentTypeError(f"{quoted(text)} must have a smaller weight") from error
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.message) from error
