"""Measures the perplexity and accuracy of quantisations and policies.

Experts run in this process with the nodes' own runtime, so that only the quantisation and the choice differ.
"""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from bs_coordinator.engine.model import DistributedModel
from bs_coordinator.engine.tokenizer import Tokenizer
from bs_coordinator.selection import TopK, parse_policy
from bs_coordinator.selection.forecast import LayerForecast
from bs_coordinator.selection.registry import check_scores
from bs_coordinator.trunk.load import load_trunk
from common.files import atomic_write
from testbed.evaluation.data_sets import ChoiceItem, DomainText, read_items
from testbed.evaluation.local_experts import LocalExperts
from testbed.evaluation.scoring import EachAlone, choose, losses
from testbed.plan.schema import Form
from testbed.statistics import wilson_interval
from wire.manifest import load_manifest
from wire.tensors import WireDtype

TASKS = {"ARC-Easy": "arc_easy_test.jsonl", "PIQA": "piqa_valid.jsonl"}
MORE_TASKS = {"HellaSwag": "hellaswag_val.jsonl"}
"""Questions that are asked only on request."""
_FORMS: dict[str, Form] = {"HellaSwag": "continuation"}
"""How questions are put to the model, where not as `question`."""
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
    """The results of one bundle under one policy.

    Attributes:
        policy: as `parse_policy` reads it.
        lost: indices of experts that were left out.
        asked: mean number of experts that a token asked in a layer.
        expert_bytes: size of all experts' files.
        perplexity: exp of the mean loss per token over all texts.
        domain_loss: nats per token, by domain.
        accuracy: accuracy by task.
    """

    quantisation: str
    policy: str
    lost: list[int]
    asked: float
    expert_bytes: int
    perplexity: float
    domain_loss: dict[str, float]
    accuracy: dict[str, Accuracy]


def measure_quality(
    bundle: Path, data: Path, *, items: int, texts_per_domain: int, tokens: int, threads: int,
    tasks: Collection[str] = TASKS, policies: Sequence[str] = ("topk",), lost: Sequence[int] = (),
    separately: bool = False, device: str | None = None, wire: WireDtype = WireDtype.FP32,
) -> Iterator[Quality]:  # fmt: skip
    """Evaluate one bundle under one policy after the other.

    Policies choose for each token alone, as in decoding, and see the links of `uneven_links`.

    Args:
        data: folder with the files of `TASKS` and `DOMAINS`.
        items: number of items per task, from the beginning of the file.
        texts_per_domain: number of texts per domain, from the beginning of the file.
        tokens: most tokens per text.
        tasks: which of `TASKS` and `MORE_TASKS`.
        policies: as `parse_policy` reads them.
        lost: indices of experts to leave out in every layer, as after the loss of nodes without replicas.
        separately: compute each choice in a step of its own (`choose`).
        device: what computes the experts (`LocalExperts`).
        wire: hidden states are rounded as if they were sent in this format.

    Raises:
        WdmoeError: the bundle or the data can't be used, or all experts are lost.
        ValueError: a policy is unknown, or needs scores that the model does not have.
    """
    manifest = load_manifest(bundle)
    tokenizer = Tokenizer(bundle / "trunk")
    experts = LocalExperts(bundle, threads=threads, wire=wire, device=device)
    experts.lost = frozenset(lost)
    experts.forecasts = partial(uneven_links, experts=manifest.dims.experts)
    top_k = manifest.dims.top_k
    parsed = [parse_policy(text, top_k=top_k, model_sha256=manifest.model_sha256) for text in policies]
    trunk = load_trunk(bundle / "trunk")
    questions = {task: read_items(data / (TASKS | MORE_TASKS)[task], ChoiceItem, items) for task in tasks}
    texts: dict[str, list[str]] = defaultdict(list)
    for item in read_items(data / DOMAINS, DomainText):
        if len(texts[item.domain]) < texts_per_domain:
            texts[item.domain].append(item.text)
    for text, policy in zip(policies, parsed, strict=True):
        if not trunk.scored:
            check_scores(text, policy, top_k=top_k)
        alone = policy if isinstance(policy, TopK) else EachAlone(policy)
        model = DistributedModel(trunk, experts, alone, degrade=True)
        experts.pairs = experts.tokens = 0
        accuracy: dict[str, Accuracy] = {}
        for task, some in questions.items():
            chosen = choose(model, tokenizer, some, form=_FORMS.get(task, "question"), separately=separately)
            right = sum(c == q.label for c, q in zip(chosen, some, strict=True))
            accuracy[task] = Accuracy(right, len(some), *wilson_interval(right, len(some)))
        by_domain = {domain: losses(model, tokenizer, t, tokens=tokens) for domain, t in sorted(texts.items())}
        total = [pair for pairs in by_domain.values() for pair in pairs]
        yield Quality(
            quantisation=str(manifest.quantisation),
            policy=text,
            lost=sorted(lost),
            asked=experts.pairs / experts.tokens,
            expert_bytes=sum(entry.bytes for entry in manifest.experts),
            perplexity=math.exp(sum(loss for loss, _ in total) / sum(n for _, n in total)),
            domain_loss={d: sum(x for x, _ in p) / sum(n for _, n in p) for d, p in by_domain.items()},
            accuracy=accuracy,
        )


def with_rules(policies: Sequence[str], rules: Sequence[str]) -> list[str]:
    """Each policy with each rule for survivors' weights; the policies themselves if there are no rules."""
    if not rules:
        return list(policies)
    return [f"{policy}{',' if ':' in policy else ':'}survivors={rule}" for policy in policies for rule in rules]


def uneven_links(layer: int, *, experts: int) -> LayerForecast:
    """Links for policies to choose by: eight nodes, one of them five times and one twice as slow as the others.

    Another pair is slow in each layer. Expert e is on node e mod 8.
    """
    speed = np.ones(8)
    speed[layer % 8], speed[(layer + 3) % 8] = 5.0, 2.0
    cost = np.full(8, 0.2e-3)
    return LayerForecast(layer, np.arange(experts) % 8, 2e-3 * speed, cost, 0.2e-3 * speed, cost / 2)


def print_quality(rows: Sequence[Quality], console: Console) -> None:
    """Print the results as a table."""
    tasks = [task for task in TASKS | MORE_TASKS if any(task in row.accuracy for row in rows)]
    table = Table("experts", Column("policy", overflow="fold"), "MiB", "asked", "perplexity", *tasks)
    for row in rows:
        table.add_row(
            row.quantisation + (f" without E{','.join(map(str, row.lost))}" if row.lost else ""),
            row.policy,
            f"{row.expert_bytes / 2**20:.0f}",
            f"{row.asked:.2f}",
            f"{row.perplexity:.3f}",
            *(str(row.accuracy.get(task, "")) for task in tasks),
        )
    console.print(table)


def write_quality(rows: Sequence[Quality], path: Path, parameters: dict[str, int | bool | str]) -> None:
    """Write all results and parameters as one JSON document."""
    with atomic_write(path) as file:
        document = {"parameters": parameters, "rows": [asdict(row) for row in rows]}
        file.write(json.dumps(document, indent=1).encode())
