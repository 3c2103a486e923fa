"""Measures the perplexity and accuracy of each quantisation.

Experts run in this process with the nodes' own runtime, so that only the quantisation differs.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import TopK
from bs_coordinator.trunk.load import load_trunk
from common.files import atomic_write
from testbed.evaluation.items import ChoiceItem, DomainText, choose, losses, read_items
from testbed.evaluation.local_experts import LocalExperts
from testbed.statistics import wilson_interval
from wire.manifest import load_manifest

TASKS = {"ARC-Easy": "arc_easy_test.jsonl", "PIQA": "piqa_valid.jsonl"}
DOMAINS = "domains.jsonl"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Number of right answers, with the 95 % Wilson interval of their share."""

    right: int
    items: int
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.right / self.items:.1f} ({100 * self.low:.1f}–{100 * self.high:.1f})"


@dataclass(frozen=True, slots=True)
class Quality:
    """The results of one bundle.

    Attributes:
        lost: indices of experts that were left out.
        expert_bytes: size of all experts' files.
        perplexity: exp of the mean loss per token over all texts.
        domain_loss: nats per token, by domain.
        accuracy: accuracy by task.
    """

    quantisation: str
    lost: list[int]
    expert_bytes: int
    perplexity: float
    domain_loss: dict[str, float]
    accuracy: dict[str, Accuracy]


def measure_quality(
    bundle: Path, data: Path, *, items: int, texts_per_domain: int, tokens: int, threads: int,
    lost: Sequence[int] = (),
) -> Quality:  # fmt: skip
    """Evaluate one bundle.

    Args:
        data: folder with the files of `TASKS` and `DOMAINS`.
        items: number of items per task, from the beginning of the file.
        texts_per_domain: number of texts per domain, from the beginning of the file.
        tokens: most tokens per text.
        lost: indices of experts to leave out in every layer, as after the loss of nodes without replicas.
    """
    manifest = load_manifest(bundle)
    tokenizer = Tokenizer(bundle / "trunk")
    experts = LocalExperts(bundle, threads=threads)
    experts.lost = frozenset(lost)
    model = DistributedModel(load_trunk(bundle / "trunk"), experts, TopK(manifest.dims.top_k), degrade=True)
    accuracy: dict[str, Accuracy] = {}
    for task, file in TASKS.items():
        questions = read_items(data / file, ChoiceItem, items)
        chosen = choose(model, tokenizer, questions)
        right = sum(c == q.label for c, q in zip(chosen, questions, strict=True))
        accuracy[task] = Accuracy(right, len(questions), *wilson_interval(right, len(questions)))
    texts: dict[str, list[str]] = defaultdict(list)
    for item in read_items(data / DOMAINS, DomainText):
        if len(texts[item.domain]) < texts_per_domain:
            texts[item.domain].append(item.text)
    by_domain = {domain: losses(model, tokenizer, t, tokens=tokens) for domain, t in sorted(texts.items())}
    total = [pair for pairs in by_domain.values() for pair in pairs]
    return Quality(
        quantisation=str(manifest.quantisation),
        lost=sorted(lost),
        expert_bytes=sum(entry.bytes for entry in manifest.experts),
        perplexity=math.exp(sum(loss for loss, _ in total) / sum(n for _, n in total)),
        domain_loss={d: sum(x for x, _ in p) / sum(n for _, n in p) for d, p in by_domain.items()},
        accuracy=accuracy,
    )


def print_quality(rows: Sequence[Quality], console: Console) -> None:
    """Print the results as a table."""
    table = Table("experts", "MiB", "perplexity", *TASKS)
    for row in rows:
        table.add_row(
            row.quantisation + (f" without E{','.join(map(str, row.lost))}" if row.lost else ""),
            f"{row.expert_bytes / 2**20:.0f}",
            f"{row.perplexity:.3f}",
            *(str(row.accuracy[task]) for task in TASKS),
        )
    console.print(table)


def write_quality(rows: Sequence[Quality], path: Path, parameters: dict[str, int]) -> None:
    """Write all results and parameters as one JSON document."""
    with atomic_write(path) as file:
        document = {"parameters": parameters, "rows": [asdict(row) for row in rows]}
        file.write(json.dumps(document, indent=1).encode())
