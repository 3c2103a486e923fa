"""What preflight says of links, by rates as they were measured."""

from datetime import UTC, datetime

import pytest

from testbed.plan.limits import RunLimits
from testbed.preflight.verdicts import Level, NodeFacts, Rate, judge
from wire.status import NodeStatus


def _links(*rates: Rate | None) -> list[Level]:
    """The verdict on each link."""
    facts = []
    for number, rate in enumerate(rates):
        node = f"n{number}"
        status = NodeStatus(schema=1, node=node, boot_id="b", state="online", since_unix_ms=1)
        facts.append(NodeFacts(node=node, quantisation="int4", status=status, rate=rate, now=datetime.now(UTC)))
    return [check.level for check in judge(facts, RunLimits(least_mbps=5)) if check.name == "link"]


@pytest.mark.parametrize(
    ("rate", "level"),
    [
        (Rate(50, 40, "iperf3"), "pass"),
        (Rate(50, 4, "iperf3"), "fail"),
        (Rate(4, 50, "pings", 0.4, 5), "fail"),
        (Rate(4, 50, "pings", 0.6, 5), "unknown"),
        (Rate(50, 34_308, "pings", 30, 8e7), "unknown"),
        (None, "unknown"),
    ],
)
def test_a_link_is_judged_by_its_slower_direction_as_far_as_that_is_known(rate: Rate | None, level: Level) -> None:
    assert _links(rate) == [level]


def test_a_link_far_below_the_median_is_named_and_rates_that_are_not_known_do_not_count() -> None:
    quick, slow = Rate(50, 50, "iperf3"), Rate(15, 50, "iperf3")
    assert _links(quick, quick, slow) == ["pass", "pass", "warn"]
    # Pings alone show only that these two are quicker than that.
    unknown = Rate(30_000, 34_308, "pings", 6e7, 8e7)
    assert _links(quick, unknown, unknown) == ["pass", "unknown", "unknown"]
