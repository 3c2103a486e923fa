"""Labels of policies in tables and plots: without options where names alone are unambiguous."""

from collections.abc import Iterable


def policy_label(policy: str, policies: Iterable[str]) -> str:
    """`policy` without its options if no other of `policies` has the same name."""
    name = policy.partition(":")[0]
    namesakes = {other for other in policies if other.partition(":")[0] == name}
    return name if namesakes <= {policy} else policy
