"""The document of experiments names everything that files and plans hold."""

import re
from pathlib import Path

import msgspec

from testbed.experiment.plan import Broker, Choice, Generate, Network, Perplexity, Plan
from testbed.experiment.tables import COORDINATES, SCHEMAS
from testbed.report.labels import policy_label
from testbed.report.merge import FAILURES, GAPS
from testbed.report.metrics import METRICS, SAME_TOKENS

TEXT = (Path(__file__).parents[3] / "docs" / "experiments.md").read_text()
NAMED = set(re.findall(r"`([A-Za-z0-9_]+)`", TEXT)) | set(re.findall(r"\{(\w+): ", TEXT))


def test_every_column_and_metric_is_documented() -> None:
    columns = {name for schema in (*SCHEMAS.values(), FAILURES, GAPS) for name in schema.names}
    assert not (columns | {*SCHEMAS} | {*COORDINATES} | {*METRICS} | {SAME_TOKENS.name}) - NAMED


def test_every_field_of_a_plan_is_documented() -> None:
    kinds = (Plan, Network, Broker, Generate, Choice, Perplexity)
    assert not {field.name for kind in kinds for field in msgspec.structs.fields(kind)} - NAMED


def test_policies_are_called_by_name_where_that_is_enough() -> None:
    policies = ["topk", "similar:table=models/differences.json", "subset:share=0.5", "subset:share=0.7", "subset"]
    assert [policy_label(policy, policies) for policy in policies] == ["topk", "similar", *policies[2:]]
