"""Reports of a real small run: their numbers are recomputed here from the cells' own files."""

import csv
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from testbed.run_directory.directory import RunDir
from testbed.run_directory.tables import COORDINATES, SCHEMAS
from tests.in_process import run_in_process
from wire.manifest import Scheme

Bundle = Callable[[Scheme], Path]
PROMPTS = 3
PLAN = f"""
name: tiny
bundles: [BUNDLE]
nodes: 2
policies: [top1, topk]
repetitions: 2
warm_up_tokens: 2
nodes_timeout_s: 20
workloads:
  - {{kind: generate, prompts: {PROMPTS}, max_tokens: 5}}
  - {{kind: choice, dataset: items.jsonl, items: 6, batch: 2, repetitions: 1}}
  - {{kind: choice, name: choice-here, dataset: items.jsonl, items: 6, where: in-process, repetitions: 1}}
  - {{kind: last-word, dataset: words.jsonl, items: [1, 6], where: in-process, choosing: alone, repetitions: 1}}
  - {{kind: perplexity, texts: [Rain falls., One two three., Hello there., A b c d., The end is near.], repetitions: 1}}
"""
ITEMS = [{"question": f"What is {i}?", "choices": ["a number", "a bird"], "label": i % 2} for i in range(6)]


@pytest.fixture(scope="module")
def plan_path(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported")
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    (folder / "words.jsonl").write_text("\n".join(json.dumps({"text": f"One two {i} three"}) for i in range(6)))
    (folder / "plan.yaml").write_text(PLAN.replace("BUNDLE", str(tiny_bundle("int4"))))
    return folder / "plan.yaml"


@pytest.fixture(scope="module")
def reported(plan_path: Path) -> RunDir:
    """A small run of every workload, with its report."""
    folder = plan_path.parent / "run"
    done = run_in_process("testbed", "run", plan_path, "--out", folder, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    done = run_in_process("testbed", "report", folder)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 cells" in done.stdout
    assert done.stderr == ""
    return RunDir(folder)


@pytest.fixture
def copy(reported: RunDir, tmp_path: Path) -> RunDir:
    """A copy that a test may damage."""
    shutil.copytree(reported.path, tmp_path / "run")
    return RunDir(tmp_path / "run")


def _rows(run_dir: RunDir, table: str, **cell: object) -> list[dict[str, Any]]:
    """Rows of the cells with these coordinates, without the warm-up."""
    rows = []
    for c in run_dir.cells():
        path = run_dir.cell_path(c) / f"{table}.parquet"
        if path.exists() and all(getattr(c, name) == value for name, value in cell.items()):
            rows += [{**row, "repetition": c.repetition} for row in pq.read_table(path).to_pylist()]
    return [row for row in rows if not row.get("warm_up")]


def _summary(run_dir: RunDir) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run_dir.path / "summary.json").read_text())
    return loaded


def _result(run_dir: RunDir, policy: str, workload: str) -> dict[str, Any]:
    (arm,) = [arm for arm in _summary(run_dir)["arms"] if arm["policy"] == policy]
    result: dict[str, Any] = arm["workloads"][workload]
    return result


def test_each_links_probes_are_counted(reported: RunDir) -> None:
    links = _summary(reported)["probes"]
    assert [link["node"] for link in links] == sorted({r["node"] for r in _rows(reported, "latency")})
    counted: Counter[str] = Counter()
    for cell in reported.cells():
        path = reported.cell_path(cell) / "link_samples.parquet"
        values = defaultdict(list)
        for row in pq.read_table(path).to_pylist() if path.exists() else []:
            if row["quantity"] in ("probe_down_bytes", "probe_up_bytes"):
                values[row["node"], row["quantity"]].append(row["value"])
        for (node, _), rising in values.items():
            counted[node] += int(max(rising) - min(rising))
    for link in links:
        # A cell may be shorter than the time between two probes.
        assert link["probe_bytes"] == counted[link["node"]]
        assert link["frame_bytes"] > 0
        assert link["share"] == pytest.approx(link["probe_bytes"] / (link["probe_bytes"] + link["frame_bytes"]))
    assert "were probes of the links" in (reported.path / "report.md").read_text()


def test_times_and_bytes_are_those_of_the_rows(reported: RunDir) -> None:
    for policy in ("topk", "top1"):
        tokens = [t for t in _rows(reported, "tokens", workload="generate", policy=policy) if t["token"] > 0]
        layers = [r for r in _rows(reported, "layers", workload="generate", policy=policy) if r["token"] > 0]
        found = _result(reported, policy, "generate")["metrics"]
        total_ms = np.array([t["total_ns"] / 1e6 for t in tokens])
        assert found["token_ms"]["value"] == pytest.approx(total_ms.mean())
        assert found["token_median_ms"]["value"] == pytest.approx(np.quantile(total_ms, 0.5, method="inverted_cdf"))
        assert "token_p95_ms" not in found  # 2 × 3 × 4 tokens are too few
        assert found["layer_wait_ms"]["value"] == pytest.approx(np.mean([r["dispatch_ns"] / 1e6 for r in layers]))
        moved = np.mean([t["down_bytes"] + t["up_bytes"] for t in tokens])
        assert found["bytes_per_token"]["value"] == pytest.approx(moved)
        probed = sum(t["probe_down_bytes"] + t["probe_up_bytes"] for t in tokens)
        assert found["probe_bytes_per_token"]["value"] == pytest.approx(probed / len(tokens))
        assert found["probe_share"]["value"] == pytest.approx(probed / (probed + moved * len(tokens)))
        parts = sum(found[f"{part}_ms"]["value"] for part in ("trunk", "network", "compute", "wait", "framing"))
        assert parts == pytest.approx(found["token_ms"]["value"])
        assert found["dropped_share"]["value"] == {"topk": 0.0, "top1": 0.5}[policy]
        first = [a["first_token_ns"] / 1e6 for a in _rows(reported, "answers", workload="generate", policy=policy)]
        assert found["ttft_ms"]["value"] == pytest.approx(np.mean(first))
        assert found["token_ms"]["units"] == 2 * PROMPTS
        assert found["token_ms"]["low"] < found["token_ms"]["value"] < found["token_ms"]["high"]


def test_accuracy_and_perplexity_are_those_of_the_items(reported: RunDir) -> None:
    for workload in ("choice", "choice-here"):
        right: dict[str, dict[int, bool]] = defaultdict(dict)
        for policy in ("topk", "top1"):
            for row in _rows(reported, "choices", workload=workload, policy=policy):
                right[policy][row["item"]] = row["right"]
            found = _result(reported, policy, workload)["metrics"]["accuracy"]
            assert found["value"] == pytest.approx(np.mean(list(right[policy].values())))
            assert found["units"] == len(ITEMS)
        change = [int(right["top1"][i]) - int(right["topk"][i]) for i in range(len(ITEMS))]
        result = _result(reported, "top1", workload)
        assert result["against_baseline"]["accuracy"]["difference"]["value"] == pytest.approx(np.mean(change))
        assert (result["items_gained"], result["items_lost"]) == (change.count(1), change.count(-1))
    assert "layer_wait_ms" in _result(reported, "topk", "choice")["metrics"]
    assert "layer_wait_ms" not in _result(reported, "topk", "choice-here")["metrics"]
    words = _rows(reported, "last_words", policy="top1")
    assert [row["item"] for row in words] == [1, 2, 3, 4, 5]
    found = _result(reported, "top1", "last-word")["metrics"]
    assert found["accuracy"]["value"] == pytest.approx(np.mean([row["right"] for row in words]))
    assert found["perplexity"]["value"] == pytest.approx(np.exp(np.mean([row["loss_nats"] for row in words])))
    losses = _rows(reported, "losses", policy="top1")
    expected = np.exp(sum(r["loss_nats"] for r in losses) / sum(r["tokens"] for r in losses))
    assert _result(reported, "top1", "perplexity")["metrics"]["perplexity"]["value"] == pytest.approx(expected)


def test_the_overview_has_every_data_set_of_every_policy(reported: RunDir) -> None:
    text = (reported.path / "report.md").read_text()
    section = text.partition("## Policies across data sets and models")[2].partition("\n## ")[0]
    (line,) = [line for line in section.splitlines() if line.startswith("| top1")]
    header = next(line for line in section.splitlines() if line.startswith("| policy"))
    columns = [cell.strip() for cell in header.split("|")[1:-1]]
    named = ["choice", "choice-here", "last-word"]
    assert columns == ["policy", "layer wait", "time per token", *named, "mean", "perplexity, last-word"]
    shown = dict(zip(columns, (cell.strip() for cell in line.split("|")[1:-1]), strict=True))
    differences = [_result(reported, "top1", name)["against_baseline"]["accuracy"]["difference"] for name in named]
    mean = 100 * np.mean([difference["value"] for difference in differences])
    assert float(shown["mean"].split()[0].replace("−", "-")) == pytest.approx(mean, abs=0.051)
    # Of independent values, the distances to the limits add up as squares.
    low = mean - 100 * np.sqrt(sum((d["value"] - d["low"]) ** 2 for d in differences)) / len(differences)
    assert f"({low:+.1f} – ".replace("-", "−") in shown["mean"]
    ratio = _result(reported, "top1", "generate")["against_baseline"]["layer_wait_ms"]["ratio"]
    assert shown["layer wait"].startswith(f"× {ratio['value']:.2f} (")


def test_policies_are_paired_by_prompt_and_repetition(reported: RunDir) -> None:
    ids: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    spent: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for policy in ("topk", "top1"):
        for t in _rows(reported, "tokens", workload="generate", policy=policy):
            key = policy, t["repetition"], t["answer"]
            ids[key].append(t["token_id"])
            if t["token"] > 0:
                spent[key].append(t["total_ns"] / 1e6)
    keys = sorted((r, a) for policy, r, a in ids if policy == "topk")
    assert len(keys) == 2 * PROMPTS
    rng = np.random.default_rng(7)
    ratios = []
    for _ in range(2000):
        drawn = [keys[i] for i in rng.integers(0, len(keys), len(keys))]
        mine, base = (np.concatenate([spent[p, r, a] for r, a in drawn]) for p in ("top1", "topk"))
        ratios.append(mine.mean() / base.mean())
    result = _result(reported, "top1", "generate")
    found = result["against_baseline"]["token_ms"]["ratio"]
    # Six units: Student's factor, and a bootstrap's spread is √(5 / 6) of the true one.
    wider = 2.571 / 1.96 * (6 / 5) ** 0.5
    low, high = found["value"] * (np.quantile(ratios, [0.025, 0.975]) / found["value"]) ** wider
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.15 * (high - low))
    same = total = 0
    for r, a in keys:
        mine_ids, base_ids = ids["top1", r, a], ids["topk", r, a]
        while same < 10**6 and mine_ids and base_ids and mine_ids[0] == base_ids[0]:
            same, total = same + 1, total + 1
            mine_ids, base_ids = mine_ids[1:], base_ids[1:]
        total += max(len(mine_ids), len(base_ids))
    assert result["metrics"]["same_tokens_share"]["value"] == pytest.approx(same / total)
    assert _result(reported, "topk", "generate")["against_baseline"] == {}


def test_merged_tables_hold_every_row_once_with_its_coordinates(reported: RunDir) -> None:
    for name, schema in SCHEMAS.items():
        cells = [(c, reported.cell_path(c) / f"{name}.parquet") for c in reported.cells()]
        expected = {c.id: pq.read_metadata(path).num_rows for c, path in cells if path.exists()}
        if not expected:
            assert not (reported.path / f"{name}.parquet").exists()
            continue
        merged = pq.read_table(reported.path / f"{name}.parquet")
        assert merged.column_names == [*COORDINATES, *schema.names]
        counts: dict[str, int] = defaultdict(int)
        for cell in merged["cell"].to_pylist():
            counts[cell] += 1
        assert counts == expected
        with (reported.path / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == merged.num_rows
        assert [row["cell"] for row in rows] == merged["cell"].to_pylist()
    with (reported.path / "latency.csv").open(newline="") as file:
        assert {row["policy"] for row in csv.DictReader(file)} == {"topk", "top1"}


class _Page(HTMLParser):
    """Everything in a page that a browser would go and fetch, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.images = 0
        self.text = ""
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            if name in ("src", "href", "srcset", "data", "poster", "action", "background"):
                self.references.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(reported: RunDir) -> None:
    html = (reported.path / "report.html").read_text()
    page = _Page()
    page.feed(html)
    anchors = [reference[1:] for reference in page.references if reference.startswith("#")]
    images = [reference for reference in page.references if not reference.startswith("#")]
    assert {reference.partition(",")[0] for reference in images} == {"data:image/png;base64"}
    assert {*anchors} == page.ids
    assert html.count("<h2 id=") == len(anchors) > 10
    plots = {path.name for path in (reported.path / "plots").glob("*.png")}
    assert plots - {"links-default.png"} == {
        "latency-ecdf.png", "breakdown.png", "front-token.png", "front-layer-wait.png", "requests.png",
        "overview.png", "paired.png",
    }  # fmt: skip
    assert len(images) == len(plots)
    assert not {"script", "link", "iframe", "object"} & {*page.tags}
    assert "@import" not in html
    assert "url(" not in html
    assert "Incomplete" not in page.text
    for plot in plots:
        assert (reported.path / "plots" / plot).with_suffix(".csv").read_text().count("\n") > 2
        assert (reported.path / "plots" / plot).read_bytes().startswith(b"\x89PNG")
    value = _result(reported, "top1", "generate")["metrics"]["token_ms"]["value"]
    for text in (page.text, (reported.path / "report.md").read_text()):
        assert f"{value:.1f} (" in text
        assert "No attempt at a cell failed." in text


def test_the_page_begins_with_conditions_and_the_result(reported: RunDir) -> None:
    text = (reported.path / "report.md").read_text()
    head = text.partition("Contents:")[0]
    assert "All nodes ran on the base station's machine" in head
    ratio = _result(reported, "top1", "generate")["against_baseline"]["token_ms"]["ratio"]
    for value in ratio["value"], ratio["low"], ratio["high"]:
        assert f"{value:.2f}" in head
    assert "compared topk and top1" in head
    assert "2 node processes" in head
    assert "percentage points, the mean of 3 measurements" in head
    assert "configured" not in (reported.path / "plots" / "links-default.svg").read_text()
    assert [kind for kind in (c["kind"] for c in _summary(reported)["conditions"]) if kind != "load"] == ["links"]


def test_paired_differences_are_those_of_the_rows(reported: RunDir) -> None:
    text = (reported.path / "plots" / "paired.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    spent: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for policy in ("topk", "top1"):
        for t in _rows(reported, "tokens", workload="generate", policy=policy):
            if t["token"] > 0:
                spent[policy, t["repetition"], t["answer"]].append(t["total_ns"] / 1e6)
    drawn = {
        (int(row["repetition"]), int(row["number"])): float(row["difference"])
        for row in rows
        if row["workload"] == "generate" and row["number"] != "all"
    }
    expected = {
        (repetition, answer): np.mean(spent["top1", repetition, answer]) - np.mean(spent["topk", repetition, answer])
        for _, repetition, answer in spent
    }
    assert drawn == pytest.approx(expected)
    overall = {row["workload"]: row for row in rows if row["number"] == "all"}
    assert overall.keys() == {"generate", "choice", "choice-here", "last-word", "perplexity"}
    ratio = _result(reported, "top1", "perplexity")["against_baseline"]["perplexity"]["ratio"]
    for name, limit in (("difference", "value"), ("low", "low"), ("high", "high")):
        assert float(overall["perplexity"][name]) == pytest.approx(np.log(ratio[limit]))
    points = _result(reported, "top1", "choice")["against_baseline"]["accuracy"]["difference"]
    assert float(overall["choice"]["difference"]) == pytest.approx(100 * points["value"])
    assert float(overall["choice"]["low"]) == pytest.approx(100 * points["low"])


def test_accuracy_is_drawn_against_its_own_time(reported: RunDir) -> None:
    text = (reported.path / "plots" / "front-layer-wait.csv").read_text()
    drawn = {(row["policy"], row["workload"]): row["layer_wait_ms"] for row in csv.DictReader(text.splitlines())}
    for policy in ("topk", "top1"):
        for workload, timed in (("choice", "choice"), ("choice-here", "generate")):
            expected = _result(reported, policy, timed)["metrics"]["layer_wait_ms"]["value"]
            assert float(drawn[policy, workload]) == pytest.approx(expected, rel=1e-3)


def test_the_trace_is_in_the_format_and_its_spans_nest(reported: RunDir) -> None:
    trace = json.loads((reported.path / "trace.json").read_text())
    names: dict[tuple[int, int], str] = {}
    spans: dict[tuple[int, int], list[tuple[float, float, str]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        where = event["pid"], event["tid"]
        assert event["ph"] in ("X", "M")
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            spans[where].append((event["ts"], event["ts"] + event["dur"], event["cat"]))
        elif event["name"] == "thread_name":
            names[where] = event["args"]["name"]
    assert spans.keys() == names.keys()
    assert len({pid for pid, _ in names}) == len(reported.cells())
    for thread in spans.values():
        open_until: list[float] = []
        for begin, end, _ in sorted(thread, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= begin + 1e-6:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-3
            open_until.append(end)
    inside = []
    for (pid, tid), thread in spans.items():
        dispatches = [span for span in spans[pid, 0] if span[2] == "dispatch"]
        for begin, end, kind in thread:
            if kind == "request":
                assert tid > 0
                inside.append(any(d[0] - 100 <= begin and end <= d[1] + 100 for d in dispatches))
    # Moments are by the wall clock, durations by a steady one: on a busy machine, time may pass between two readings.
    assert sum(inside) > 0.9 * len(inside)
    tokens = [span for thread in spans.values() for span in thread if span[2] == "token"]
    assert 0 < len(tokens) <= 4 * len(reported.cells())


def test_equal_cells_give_an_equal_report(copy: RunDir, reported: RunDir) -> None:
    assert run_in_process("testbed", "report", copy.path).returncode == 0
    made = sorted(path.relative_to(copy.path) for path in copy.path.rglob("*") if "cells" not in path.parts)
    assert made == sorted(
        path.relative_to(reported.path) for path in reported.path.rglob("*") if "cells" not in path.parts
    )
    for path in made:
        if (copy.path / path).is_file():
            assert (copy.path / path).read_bytes() == (reported.path / path).read_bytes(), path


def test_the_report_of_an_incomplete_run_begins_with_that(copy: RunDir) -> None:
    lost = next(cell for cell in copy.cells() if (cell.workload, cell.policy) == ("generate", "top1"))
    shutil.rmtree(copy.cell_path(lost))
    copy.event("cell_failed", cell=lost.id, attempt=1, error="node 'node1' <left> | early", kind="DispatchError")
    copy.event("run_resumed", gap_s=61.0, after="cell_failed", left=1, lost=1)
    done = run_in_process("testbed", "report", copy.path, "--resamples", "100")
    assert done.returncode == 0, done.stderr
    assert "11 of 12 cells" in done.stdout
    summary = _summary(copy)
    assert summary["complete"] is False
    assert list(summary["without_result"]) == [lost.id]
    assert [gap["gap_s"] for gap in summary["gaps"]] == [61.0]
    assert pq.read_table(copy.path / "failures.parquet")["kind"].to_pylist() == ["DispatchError"]
    page = _Page()
    page.feed((copy.path / "report.html").read_text())
    begin = page.text.index("Incomplete: 11 of 12 cells")
    assert begin < page.text.index("What was run")
    assert "node 'node1' <left> | early" in page.text
    markdown = (copy.path / "report.md").read_text()
    assert markdown.splitlines()[2].startswith("> **Incomplete: 11 of 12")
    # Only what both policies have is compared.
    against = _result(copy, "top1", "generate")["against_baseline"]["token_ms"]
    assert against["difference"]["units"] == PROMPTS


@pytest.mark.slow
def test_cells_of_different_commits_are_distinguished(copy: RunDir) -> None:
    path = copy.path / "manifest.json"
    manifest = json.loads(path.read_text())
    now = manifest["commit"], manifest["dirty"]
    path.write_text(json.dumps(manifest | {"commit": "f" * 40, "dirty": False}))
    for cell in copy.cells():  # as in a run of an older version, whose cells do not state their commit
        marker = json.loads((copy.cell_path(cell) / "cell.json").read_text())
        assert (marker.pop("commit"), marker.pop("dirty")) == now
        (copy.cell_path(cell) / "cell.json").write_text(json.dumps(marker))
    again = next(c for c in copy.cells() if (c.workload, c.policy) == ("choice-here", "topk"))
    shutil.rmtree(copy.cell_path(again))
    resumed = run_in_process("testbed", "resume", copy.path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"the code is {now[0][:12]}" in resumed.stdout
    (event,) = [e for e in copy.events() if e["event"] == "run_resumed"]
    assert (event["commit"], event["dirty"]) == now
    reported = run_in_process("testbed", "report", copy.path, "--resamples", "100")
    assert reported.returncode == 0, reported.stderr
    assert "Cells measured by different versions: " in reported.stdout
    assert "ffffffffffff (11)" in reported.stdout
    assert sorted(_summary(copy)["code"].values()) == [1, 11]
    tokens = pq.read_table(copy.path / "tokens.parquet").to_pylist()
    assert {row["commit"] for row in tokens if row["cell"] == again.id} == {now[0]}
    assert {row["commit"] for row in tokens if row["cell"] != again.id} == {"f" * 40}


def test_report_errors_are_one_line(copy: RunDir, tmp_path: Path) -> None:
    cell = copy.cells()[0]
    page = (copy.path / "report.html").read_bytes()
    damaged = copy.cell_path(cell) / "tokens.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    done = run_in_process("testbed", "report", copy.path, "--resamples", "100")
    assert done.returncode == 61
    assert done.stderr.count("\n") == 1
    assert str(damaged) in done.stderr
    assert "resume" in done.stderr
    assert (copy.path / "report.html").read_bytes() == page
    assert not list(copy.path.glob(".report-*"))
    (copy.cell_path(cell) / "cell.json").write_text("{")
    assert run_in_process("testbed", "report", copy.path, "--resamples", "100").returncode == 61
    shutil.rmtree(copy.path / "cells")
    nothing = run_in_process("testbed", "report", copy.path, "--resamples", "100")
    assert nothing.returncode == 61
    assert "no complete cell" in nothing.stderr
    assert run_in_process("testbed", "report", tmp_path).returncode == 61


def test_compare_says_what_differed_and_pairs_equal_items(reported: RunDir, copy: RunDir) -> None:
    manifest = json.loads((copy.path / "manifest.json").read_text())
    manifest["commit"] = "f" * 40
    manifest["plan"]["wire"] = "int8"
    manifest["machine"]["cpu"] = "another CPU"
    (copy.path / "manifest.json").write_text(json.dumps(manifest))
    done = run_in_process("testbed", "compare", reported.path, copy.path, "--resamples", "1000")
    assert done.returncode == 0, done.stderr
    assert "code commit: ffffffffffff" in done.stdout
    assert "plan wire: int8 instead of fp16" in done.stdout
    assert "machine cpu: another CPU instead of" in done.stdout
    tables = done.stdout.split("\n\n")
    accuracy = tables[tables.index("choice: accuracy, %") + 1].splitlines()
    assert [line.split("|")[3].strip() for line in accuracy[2:]] == ["topk", "top1"]
    # Six items that are answered alike don't prove that a seventh would be.
    assert all(line.split("|")[-2].strip() == "0.0 (−34.6 – +34.6)" for line in accuracy[2:])
    times = tables[tables.index("generate: mean ms/token") + 1].splitlines()
    assert all(line.split("|")[-2].strip().startswith("× 1.00 (0.") for line in times[2:])
    value = _result(reported, "topk", "generate")["metrics"]["token_ms"]["value"]
    assert f"{value:.1f} (" in times[2]
    same = run_in_process("testbed", "compare", reported.path, reported.path, "--resamples", "100")
    assert "no differences" in same.stdout
    assert run_in_process("testbed", "compare", reported.path).returncode == 2


def test_preflight_reports_what_a_plan_lacks(plan_path: Path, tmp_path: Path) -> None:
    wide = {"COLUMNS": "300"}
    fine = run_in_process("testbed", "preflight", plan_path, "--out", tmp_path, env=wide)
    assert fine.returncode == 0, fine.stderr
    assert "2 nodes hold all 16 experts" in fine.stdout
    text = plan_path.read_text().replace("items: 6", "items: 7").replace("nodes: 2", "nodes: {pi1: 'L*:E0-6'}")
    for name in ("items.jsonl", "words.jsonl"):
        shutil.copy(plan_path.parent / name, tmp_path)
    (tmp_path / "plan.yaml").write_text(text)
    bad = run_in_process("testbed", "preflight", tmp_path / "plan.yaml", env=wide)
    assert bad.returncode == 62
    assert bad.stderr.count("\n") == 1
    assert "items.jsonl has 6 items, the plan needs 7" in bad.stdout
    assert "no node holds L0-1:E7" in bad.stdout
    assert bad.stdout.count("fail") == 3
