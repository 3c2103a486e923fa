"""Policies in tables and plots: their options are said once, where names alone tell them apart."""

from collections.abc import Iterable


def policy_label(policy: str, policies: Iterable[str]) -> str:
    """`policy` without its options if no other of `policies` has its name."""
    name = policy.partition(":")[0]
    namesakes = {other for other in policies if other.partition(":")[0] == name}
    return name if namesakes <= {policy} else policy
