"""The documents name everything that files and plans hold."""

import re
from pathlib import Path

import msgspec

from testbed.archive.dictionary import dictionary_markdown
from testbed.latency_log import COLUMNS
from testbed.plan.schema import Broker, Choice, Generate, LastWord, Network, Perplexity, Plan
from testbed.proof.models_page import models_markdown
from testbed.report.numbers.metrics import METRICS, SAME_TOKENS
from testbed.report.page.labels import policy_label
from testbed.run_directory.tables import ALL_TABLES

DOCS = Path(__file__).parents[3] / "docs"
TEXT = (DOCS / "experiments.md").read_text()
NAMED = set(re.findall(r"`([A-Za-z0-9_]+)`", TEXT)) | set(re.findall(r"\{(\w+): ", TEXT))


def test_the_tables_of_the_documents_are_the_declared_ones() -> None:
    """`python -m testbed.archive.dictionary > docs/tables.md` writes them."""
    assert (DOCS / "tables.md").read_text() == dictionary_markdown()


def test_the_page_of_models_is_the_declared_one() -> None:
    """`python -m testbed.proof.models_page > docs/models.md` writes it."""
    assert (DOCS / "models.md").read_text() == models_markdown()


def test_the_columns_of_the_latency_log_are_documented() -> None:
    section = (DOCS / "measurement.md").read_text().partition("## Latency log")[2].partition("\n## ")[0]
    documented = [
        name
        for line in section.splitlines()
        if line.startswith("| ")
        for name in re.findall(r"\w+", line.split("|")[1])
    ]
    assert documented[1:] == [column.name for column in COLUMNS]


def test_every_table_and_metric_is_documented() -> None:
    assert not ({table.name for table in ALL_TABLES} | {*METRICS} | {SAME_TOKENS.name}) - NAMED


def test_every_field_of_a_plan_is_documented() -> None:
    kinds = (Plan, Network, Broker, Generate, Choice, LastWord, Perplexity)
    assert not {field.name for kind in kinds for field in msgspec.structs.fields(kind)} - NAMED


def test_policies_are_called_by_name_where_that_is_enough() -> None:
    policies = ["topk", "similar:table=models/differences.json", "subset:share=0.5", "subset:share=0.7", "subset"]
    assert [policy_label(policy, policies) for policy in policies] == ["topk", "similar", *policies[2:]]
