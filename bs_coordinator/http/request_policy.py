"""Policies that requests may name instead of the base station's own."""

from typing import NamedTuple

from bs_coordinator.selection import Policy
from bs_coordinator.selection.registry import POLICY_NAMES, check_scores, parse_policy

_MOST_KEPT = 64


class NamedPolicy(NamedTuple):
    """A policy and the text that names it."""

    name: str
    policy: Policy


class RequestPolicies:
    """Finds policies by their texts. Equal texts give the same object, by which the scheduler knows equal policies."""

    def __init__(
        self, served: NamedPolicy, *, top_k: int, scored: bool, model_sha256: str | None = None, files: bool = False
    ) -> None:
        """Nothing was asked for yet.

        Args:
            served: the base station's own, which requests may name as well.
            top_k: the model's experts per token.
            scored: whether the model's scores of all experts are known, which most policies compare.
            model_sha256: `Manifest.model_sha256` of the model, of which a policy's table must be; None if there are no
                tables.
            files: whether options may name files of this machine; not if requests come from another one.
        """
        self._found = {served.name: served}
        self._top_k = top_k
        self._scored = scored
        self._model_sha256 = model_sha256
        self._files = files
        self.offered = [served.name]
        """Names of policies with their default options, the base station's own first."""
        for name in POLICY_NAMES:
            try:
                self.offered += [name] if self.find(name).name not in self.offered else []
            except ValueError:  # it needs a file, or scores
                continue

    def find(self, text: str) -> NamedPolicy:
        """The policy that a request names.

        Raises:
            ValueError: it is unknown, its options are wrong or name a file where none may be named, or the model can't
                be used with it.
        """
        if found := self._found.get(text):
            return found
        policy = parse_policy(text, top_k=self._top_k, model_sha256=self._model_sha256, files=self._files)
        if not self._scored:
            check_scores(text, policy, top_k=self._top_k)
        named = NamedPolicy(text, policy)
        return self._found.setdefault(text, named) if len(self._found) < _MOST_KEPT else named
