"""What a report says before any number: conditions of the measurement, and the result in a few sentences."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from testbed.plan.schema import Broker, Generate, Network, Plan
from testbed.report.numbers.conditions import CellConditions, conditions
from testbed.report.page.document import Document, Section, html, markdown
from testbed.statistics import Measure, Proportion, Quantile, Ratio, Share, between_runs, difference, measured, ratio

PLAN = Plan(name="t", policies=("topk",), workloads=(Generate(),))
EXTERNAL = Plan(
    name="t", policies=("topk",), workloads=(Generate(),), network=Network(external=Broker(broker="mqtt://b"))
)  # fmt: skip
IDLE = {"cpus": 4, "load_1min": 0.5}


def _found(plan: Plan, machine: dict[str, Any], events: list[dict[str, Any]], cells: CellConditions) -> dict[str, str]:
    return {c.kind: f"{'!' if c.severe else ''}{c.text}" for c in conditions(plan, machine, events, cells)}


def test_a_calm_run_with_known_links_has_no_conditions() -> None:
    emulated = Plan(name="t", policies=("topk",), workloads=(Generate(),), network=Network(emulated="wifi.yaml"))
    calm = CellConditions(cells=2, loads=[3.9, 4.0], truth=True)
    events = [
        {"event": "run_started", "power": {"throttle_count": 7, "throttled": "0x50000"}},
        {"event": "run_finished", "power": {"throttle_count": 7, "throttled": "0x50000"}},
    ]
    assert _found(emulated, IDLE, events, calm) == {}
    # Facts of archives may be anything.
    assert _found(emulated, {"cpus": "many", "load_1min": [9]}, [{"event": "run_started", "power": 5}], calm) == {}


def test_each_bad_condition_is_named() -> None:
    cells = CellConditions(cells=3, loads=[1.0, 4.5, 9.0], throttled=Counter({"pi3": 2}))
    events: list[dict[str, Any]] = [
        {"event": "run_started", "power": {"throttle_count": 7}},
        {"event": "alert", "kind": "hot", "subject": "pi3", "detail": "81 °C"},
        {"event": "cell_failed"},
        {"event": "run_finished", "power": {"throttle_count": 9}},
        {"event": "run_resumed", "power": {"throttle_count": 20}},
        {"event": "run_finished", "power": {"throttle_count": 21}},
    ]
    found = _found(EXTERNAL, {"cpus": 4, "load_1min": 6.25}, events, cells)
    assert found["load"].startswith(
        "!Load above the number of CPUs of the base station, 4: it was 6.2 when the run began, up to 9.0 in 2 of 3 "
    )
    assert found["throttled"].startswith("!Throttled: pi3 in 2 of 3 cells, the base station 3 times while cells ran")
    assert found["alerts"] == "!1 alert while cells ran (hot: pi3); see Alerts."
    assert found["attempts"] == "1 attempt at cells failed and was repeated."
    assert found["pauses"] == "The run was interrupted and resumed once."
    assert found["links"].startswith("Link truth unknown")
    assert list(found)[:3] == ["load", "throttled", "alerts"]  # the severe ones first
    assert _found(PLAN, IDLE, [], CellConditions(cells=1))["links"].startswith("All nodes ran on the base station's")
    pi = _found(PLAN, IDLE, [{"event": "run_started", "power": {"throttled": "0x50005"}}], CellConditions(cells=1))
    assert pi["throttled"].startswith("!Throttled: the base station. ")


def test_each_section_has_its_own_anchor_and_an_entry_of_the_contents() -> None:
    titles = ["Latency: generate", "A & B", "A & B", "Failures, gaps and the cost of logging"]
    document = Document(
        "Run t", ["Bad <b>"], ["Note"], ["One.", "Two."], [Section(title, ["text"]) for title in titles]
    )
    assert document.anchors == ["latency-generate", "a--b", "a--b-1", "failures-gaps-and-the-cost-of-logging"]
    page = html(document, Path())
    for anchor in document.anchors:
        assert page.count(f'href="#{anchor}"') == page.count(f'<h2 id="{anchor}"') == 1
    assert page.index("Bad &lt;b&gt;") < page.index("One. Two.") < page.index("href=")
    text = markdown(document)
    assert "- [A & B](#a--b-1)" in text
    assert text.index("> **Bad") < text.index("> Note") < text.index("One. Two.") < text.index("Contents:")


ONE = np.ones(8)
BROKEN = np.r_[ONE[:-1], np.inf]


@pytest.mark.parametrize(
    "measure",
    [
        Ratio(ONE, ONE), Ratio(0 * ONE, ONE), Ratio(ONE, 0 * ONE), Ratio(1e300 * ONE, ONE), Ratio(BROKEN, ONE),
        Ratio(800 * ONE, ONE, exponential=True), Ratio(BROKEN, ONE, exponential=True),
        Ratio(np.r_[0 * ONE[:-1], 5600], ONE, exponential=True), Ratio(np.r_[1e-300 * ONE, 1e300], np.ones(9)),
        Share(ONE, ONE), Proportion(ONE, ONE), Proportion(0 * ONE, ONE),
        Quantile([ONE] * 8, 0.5), Quantile([0 * ONE] * 8, 0.5), Quantile([np.empty(0)] * 7 + [ONE], 0.5),
    ],
)  # fmt: skip
def test_constant_and_broken_samples_give_no_warning(measure: Measure) -> None:
    """Pytest makes errors of warnings. What has an interval has a finite one around the value."""
    found = [
        measured(measure, seed=0, resamples=100),
        difference(measure, measure, seed=0, resamples=100),
        ratio(measure, measure, seed=0, resamples=100),
        between_runs(measure, measure, subtract=True, seed=0, resamples=100),
        between_runs(measure, measure, subtract=False, seed=0, resamples=100),
    ]
    for interval in filter(None, found):
        assert np.isfinite(interval.value)
        assert (interval.low is None) == (interval.high is None)
        if interval.low is not None and interval.high is not None:
            assert -np.inf < interval.low <= interval.value <= interval.high < np.inf
