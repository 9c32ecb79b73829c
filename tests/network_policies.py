"""The connections between pods that NetworkPolicies allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from manifests import Manifest, Pod


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Return whether a label selector matches; an empty one selects everything."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In", "the only one that the chart uses"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def may_talk(policies: Sequence[Manifest], source: Pod | None, target: Pod | None, port: int) -> bool:
    """Return whether a TCP connection is allowed. None: a peer outside the namespace, which no pod selector matches."""
    leaves = source is None or _passes(policies, "Egress", source, target, port)
    return leaves and (target is None or _passes(policies, "Ingress", target, source, port))


def _passes(policies: Sequence[Manifest], direction: str, pod: Pod, other: Pod | None, port: int) -> bool:
    """Return whether the policies of a pod allow this direction. Without any, all is allowed."""
    concerned = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    if not concerned:
        return True
    peers = "from" if direction == "Ingress" else "to"
    return any(
        _has_port(rule, port) and _has_peer(rule.get(peers), other)
        for spec in concerned
        for rule in spec.get(direction.lower(), ())
    )


def _has_port(rule: dict[str, Any], port: int) -> bool:
    ports = [entry for entry in rule.get("ports", ()) if entry.get("protocol", "TCP") == "TCP"]
    return "ports" not in rule or any(entry["port"] <= port <= entry.get("endPort", entry["port"]) for entry in ports)


def _has_peer(peers: list[dict[str, Any]] | None, other: Pod | None) -> bool:
    if peers is None:
        return True
    return other is not None and any(
        "podSelector" in peer and "namespaceSelector" not in peer and selects(peer["podSelector"], other.labels)
        for peer in peers
    )
