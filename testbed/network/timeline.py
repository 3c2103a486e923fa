"""Position of a network in its profile, and which link changes to record. Pure."""

from testbed.network.spec import LinkSpec, NetworkSpec, Profile

RAMP_RECORD_S = 1.0
"""Interval between records of a link during a ramp; steps are recorded at once."""


class Timeline:
    """The links of a network as time passes.

    Args:
        now: seconds of any monotonic clock; the same clock in all methods.

    Attributes:
        profile_name: name of the active profile.
        links: links by node, as of the latest `advance`.
        held_s: moment at which the profile is held; None while it runs.
    """

    def __init__(self, spec: NetworkSpec, now: float) -> None:
        self._spec = spec
        self._recorded: dict[str, tuple[float, LinkSpec]] = {}
        self.set_profile(spec.first_profile, now)

    @property
    def profile(self) -> Profile:
        """The active profile."""
        return self._spec.profiles[self.profile_name]

    def set_profile(self, name: str, now: float) -> None:
        """Switch to a profile, from its beginning.

        Raises:
            ValueError: there is no profile of that name.
        """
        if name not in self._spec.profiles:
            raise ValueError(f"no profile '{name}', only {', '.join(self._spec.profiles)}")
        self.profile_name = name
        self.held_s: float | None = None
        self._began = now
        self.links = self._spec.links(name, 0.0)

    def hold(self, at_s: float | None, now: float) -> None:
        """Hold the profile at the moment `at_s`; None restarts it from its beginning."""
        self.held_s = at_s
        self._began = now
        self.links = self._spec.links(self.profile_name, self.at_s(now))

    def at_s(self, now: float) -> float:
        """Seconds since the start of the profile, or the moment at which it is held."""
        return now - self._began if self.held_s is None else self.held_s

    def advance(self, now: float) -> bool:
        """Update `links` to the time `now`; return whether any changed."""
        if self.held_s is not None or not self.profile.events:
            return False
        before, self.links = self.links, self._spec.links(self.profile_name, self.at_s(now))
        return before != self.links

    def to_record(self, now: float) -> dict[str, LinkSpec]:
        """Links to record now, by node; they then count as recorded."""
        due = {}
        for node, link in self.links.items():
            written_at, written = self._recorded.get(node, (float("-inf"), None))
            moving = self.held_s is None and self.profile.ramping(node, self.at_s(now))
            if link != written and (not moving or now - written_at >= RAMP_RECORD_S):
                due[node] = link
                self._recorded[node] = now, link
        return due
