"""The kill test: a device of each arm loses its power while the arm answers."""

from collections.abc import Mapping

from testbed.network.uniform import Links
from testbed.versus.asking import Asker, Kill
from testbed.versus.programs import RunningArm
from testbed.versus.results import Results

_TOKENS_BEFORE_KILL = 8


def kill_devices(asker: Asker, running: Mapping[str, RunningArm], links: Links, results: Results) -> None:
    """Ask each arm with devices once more, and kill its first device meanwhile.

    Args:
        links: as they are now.
        results: the answers so far; an arm without any on these links is left out.
    """
    for name, arm in running.items():
        # In the longest answer that this arm gave, well before its end.
        longest = max(results.of(links.profile, name), key=lambda one: len(one.pieces), default=None)
        if arm.arm.workers and longest is not None:
            after = min(_TOKENS_BEFORE_KILL, len(longest.pieces) // 2)
            asker.ask(arm, links, longest.prompt, kill=Kill(arm.arm.workers[0].device, after))
