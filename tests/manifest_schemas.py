"""Kubernetes' and KubeRay's schemas of manifests."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from manifests import Manifest

KUBERNETES_VERSIONS = ("1.29", "1.33", "1.37")
WITHOUT_SCHEMA = {"ServiceMonitor"}
"""Kinds whose definition is not at hand; manifest_checks.py looks at what the chart uses of them."""

_FOLDER = Path(
    os.environ.get("LORAFLEET_KUBERAY_SCHEMAS") or Path(__file__).parents[2] / "shared" / "schemas" / "kuberay"
)
RAYCLUSTER = _FOLDER / "ray.io_rayclusters.yaml"


def problems(manifest: Manifest) -> list[str]:
    """Return a manifest's violations of its kind's schema."""
    kind = manifest["kind"]
    if kind in WITHOUT_SCHEMA:
        return []
    if kind == "RayCluster":
        validator = jsonschema.Draft202012Validator(_raycluster_schema(manifest["apiVersion"]))
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]
    found = []
    for version in KUBERNETES_VERSIONS:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{version}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError as error:
            found.append(error.message)
    return found


@functools.cache
def _raycluster_schema(api_version: str) -> dict[str, Any]:
    definition = yaml.safe_load(RAYCLUSTER.read_text())["spec"]
    (version,) = (
        version for version in definition["versions"] if f"{definition['group']}/{version['name']}" == api_version
    )
    schema: dict[str, Any] = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own, and not in the definition
    return schema


def _strict(schema: Any) -> Any:
    """Return a schema as an API server applies it: no unknown fields, numbers may be quantities, defaults optional."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _strict(value) for key, value in schema.items() if key not in ("properties", "default")}
    if schema.get("x-kubernetes-int-or-string") is True:
        return {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": schema.get("pattern", "")}]}
    properties = schema.get("properties")
    if isinstance(properties, dict):
        result["properties"] = {name: _strict(value) for name, value in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            result["additionalProperties"] = False
        required = schema.get("required", [])
        result["required"] = [name for name in required if "default" not in properties.get(name, {})]
    return result
