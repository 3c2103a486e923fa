"""Where a network is in its profile, and when its links' truth is worth writing down. Pure."""

from testbed.network.spec import Link, NetworkSpec, Profile

RAMP_RECORD_S = 1.0
"""Between two records of a link on a ramp; steps are recorded at once."""


class Timeline:
    """The links of a network as time passes.

    Args:
        now: seconds on any clock that only goes forward; likewise everywhere below.

    Attributes:
        profile_name: what is set.
        links: by node, as of the latest `advance`.
        held_s: the moment of the profile at which it stands still; None while it runs.
    """

    def __init__(self, spec: NetworkSpec, now: float) -> None:
        self._spec = spec
        self._recorded: dict[str, tuple[float, Link]] = {}
        self.set_profile(spec.first_profile, now)

    @property
    def profile(self) -> Profile:
        """What is set."""
        return self._spec.profiles[self.profile_name]

    def set_profile(self, name: str, now: float) -> None:
        """Start a profile from its beginning.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self._spec.profiles:
            raise ValueError(f"no profile '{name}', only {', '.join(self._spec.profiles)}")
        self.profile_name = name
        self.held_s: float | None = None
        self._began = now
        self.links = self._spec.links(name, 0.0)

    def hold(self, at_s: float | None, now: float) -> None:
        """Stand still at a moment of the profile, or start it again from its beginning."""
        self.held_s = at_s
        self._began = now
        self.links = self._spec.links(self.profile_name, self.at_s(now))

    def at_s(self, now: float) -> float:
        """Since the profile was set."""
        return now - self._began if self.held_s is None else self.held_s

    def advance(self, now: float) -> bool:
        """Let time pass; whether a link changed."""
        if self.held_s is not None or not self.profile.events:
            return False
        before, self.links = self.links, self._spec.links(self.profile_name, self.at_s(now))
        return before != self.links

    def to_record(self, now: float) -> dict[str, Link]:
        """Links to write down now; they count as written."""
        due = {}
        for node, link in self.links.items():
            written_at, written = self._recorded.get(node, (float("-inf"), None))
            moving = self.held_s is None and self.profile.ramping(node, self.at_s(now))
            if link != written and (not moving or now - written_at >= RAMP_RECORD_S):
                due[node] = link
                self._recorded[node] = now, link
        return due
