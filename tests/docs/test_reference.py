"""The reference's pages and the code say the same: tables, endpoints, fields, error and reason codes."""

from __future__ import annotations

import ast
import re
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import msgspec
import openai.types
import openai.types.chat
import openai.types.chat.completion_create_params
import openai.types.completion_create_params
import pytest
from aiohttp import web
from documents import ROOT
from reference_pages import PAGES, TABLES, filled

from lorafleet.controller.gateway.api import field_rule, schema
from lorafleet.controller.gateway.api.app import make_app
from lorafleet.controller.gateway.api.auth import OPEN_PATHS
from lorafleet.controller.gateway.config import GatewayConfig

HTTP = (PAGES / "http.md").read_text()
ERRORS = (PAGES / "errors.md").read_text()


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows but the heads."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def section(title: str) -> str:
    """A section of http.md, without those below it."""
    _, _, rest = HTTP.partition(f"\n## {title}\n")
    assert rest, title
    return rest.partition("\n## ")[0]


def fields_of(text: str) -> dict[str, list[str]]:
    """Field → its other cells, of the tables whose rows begin with a field's name."""
    return {row[0].strip("`"): row[1:] for row in rows(text)}


@pytest.mark.parametrize("page", sorted(file.name for file in PAGES.glob("*.md")))
def test_a_pages_tables_are_what_the_code_says(page: str) -> None:
    text = (PAGES / page).read_text()
    assert filled(text) == text, "run `make reference`"


def test_every_table_has_its_place() -> None:
    pages = "".join(file.read_text() for file in PAGES.glob("*.md"))
    assert sorted(re.findall(r"<!-- generated: (.+?) -->", pages)) == sorted(TABLES)


def endpoints() -> dict[str, str]:
    """`METHOD /path` → whether it asks for a key, as the page's first table has them."""
    table = HTTP.partition("\n## ")[0]
    return {place: row[-1] for row in rows(table) for place in re.findall(r"`(\w+ /\S+)`", row[0])}


def test_the_endpoints_are_those_of_the_application() -> None:
    state: Any = SimpleNamespace(config=GatewayConfig(controller="localhost:1", token="-"))
    served = {
        f"{route.method} {route.resource.canonical.rstrip('/')}"
        for route in make_app(state).router.routes()
        if isinstance(route.resource, web.Resource) and route.method != "HEAD"
    }
    assert set(endpoints()) == served


def test_the_endpoints_without_a_key_are_those_that_ask_for_none() -> None:
    assert {place.split(" ")[1] for place, key in endpoints().items() if key == "no"} == OPEN_PATHS


SHARED = set(schema.GenerateFields.__struct_fields__)


@pytest.mark.parametrize(
    ("title", "kinds"),
    [
        ("Fields of both", [schema.GenerateFields]),
        ("Chat", [schema.ChatRequest]),
        ("Completions", [schema.CompletionRequest]),
        ("Load and unload", [schema.LoadAdapterBody, schema.UnloadAdapterBody]),
        ("Tokenize and detokenize", [schema.TokenizeRequest, schema.DetokenizeRequest]),
    ],
)
def test_every_field_that_is_read_is_documented_with_its_type(title: str, kinds: list[type[msgspec.Struct]]) -> None:
    documented = fields_of(section(title))
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items() if "__" not in name}
    if title in ("Chat", "Completions"):
        hints = {name: hint for name, hint in hints.items() if name not in SHARED}
    assert documented.keys() == hints.keys()
    for name, (kind, default, _) in documented.items():
        assert set(kind.split(" or ")) == json_types(hints[name]), name
        assert (default == "required") is is_required(name, kinds), name


def json_types(hint: Any) -> set[str]:
    """A field's type as the page calls it."""
    if hint is msgspec.Raw:  # of `prompt`, which prompts.py reads
        return {"string", "list"}
    names: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
    options = [option for option in get_args(hint) if option is not type(None)] if "|" in str(hint) else [hint]
    found = set()
    for option in options:
        is_list = str(option).startswith("list[")
        found.add("list" if is_list else names.get(option, "object"))
    return found


def is_required(name: str, kinds: list[type[msgspec.Struct]]) -> bool:
    """Return whether a body without the field is refused."""
    found = [field for kind in kinds for field in msgspec.structs.fields(kind) if field.name == name]
    return all(field.required for field in found)


def test_fields_that_strict_fields_ignores_too_are_named() -> None:
    assert all(f"`{name}`" in section("Every known field") for name in schema.ASKS_NOTHING)


FATES = fields_of(section("Every known field"))
ENDPOINTS = [f"`{path}`" for path in field_rule.ENDPOINTS]


@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("/v1/chat/completions", openai.types.chat.completion_create_params),
        ("/v1/completions", openai.types.completion_create_params),
    ],
)
def test_every_parameter_of_openais_clients_is_known(path: str, params: Any) -> None:
    kinds = (params.CompletionCreateParamsNonStreaming, params.CompletionCreateParamsStreaming)
    names = {name for kind in kinds for name in get_type_hints(kind)}
    assert len(names) > 15
    column = list(field_rule.ENDPOINTS).index(path)
    fates = {name: FATES[name][column] if name in FATES else "not in the table" for name in names}
    assert {name for name, fate in fates.items() if fate not in ("honoured", "refused", "ignored")} == set()
    for name in ("model", "temperature", "top_p", "max_tokens", "stop", "seed", "n", "stream"):
        assert fates[name] == "honoured"


def test_the_table_of_fields_has_a_column_for_each_endpoint_that_takes_a_body() -> None:
    state: Any = SimpleNamespace(config=GatewayConfig(controller="localhost:1", token="-"))
    routes = make_app(state).router.routes()
    posted = {route.resource.canonical for route in routes if route.method == "POST" and route.resource is not None}
    assert set(field_rule.ENDPOINTS) == {path.rstrip("/") for path in posted}
    assert f"| field | {' | '.join(ENDPOINTS)} |" in HTTP


def reason_codes() -> set[str]:
    """The reasons with which the code refuses adapters, wherever it writes one."""
    found: set[str] = set()
    for file in [*(ROOT / "workers").rglob("*.py"), *(ROOT / "controller").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            candidates: list[ast.expr] = []
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                candidates += [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
                if name in ("FoundFileError", "_refused", "refuse", "refused"):
                    candidates += node.args[-1:]
            elif isinstance(node, ast.Tuple) and file.name == "foreign.py" and len(node.elts) == 2:
                candidates += node.elts[1:]
            values = [one.value for one in candidates if isinstance(one, ast.Constant)]
            found |= {value for value in values if isinstance(value, str) and re.fullmatch(r"[a-z][a-z_]+", value)}
    return found


def test_every_reason_of_a_refused_adapter_is_explained() -> None:
    _, _, reasons = ERRORS.partition("## Why an adapter is refused")
    documented = [row[0].strip("`") for row in rows(reasons)]
    assert documented == sorted(reason_codes())
