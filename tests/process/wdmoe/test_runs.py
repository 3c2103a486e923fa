"""A small run through the public interface: its tables, and the notebook that draws them."""

import json
from collections.abc import Callable
from pathlib import Path

import nbformat
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient

import wdmoe
from testbed.errors import FailedCellsError, PlanError, RunDirectoryError
from testbed.run_directory.tables import ALL_TABLES
from wire.manifest import Scheme

ROOT = Path(__file__).parents[3]
NOTEBOOK = ROOT / "docs/notebooks/field-experiment.ipynb"
PLAN = """
name: tiny
bundles: [{bundle}]
nodes: 2
policies: [topk, top1]
warm_up_tokens: 2
workloads:
  - {{kind: generate, prompts: [Hello, What is rain?], max_tokens: 6}}
  - {{kind: choice, dataset: items.jsonl, items: 4, batch: 2}}
"""
ITEMS = [{"question": f"What is {i}?", "choices": ["a number", "a bird"], "label": 0} for i in range(4)]


@pytest.fixture(scope="module")
def run(tiny_bundle: Callable[[Scheme], Path], tmp_path_factory: pytest.TempPathFactory) -> wdmoe.Run:
    """A run in `runs/field` of its own folder."""
    folder = tmp_path_factory.mktemp("field")
    (folder / "data").mkdir()
    (folder / "data/items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    (folder / "plan.yaml").write_text(PLAN.format(bundle=tiny_bundle("int4")))
    lines: list[str] = []
    run = wdmoe.run_experiment(
        folder / "plan.yaml", data=folder / "data", out=folder / "runs/field", items=2, on_progress=lines.append
    )  # fmt: skip
    assert any(line.startswith("4/4 ") for line in lines)
    return run


def test_tables_hold_the_rows_of_all_cells(run: wdmoe.Run) -> None:
    files = sorted(run.folder.glob("cells/*/*.parquet"))
    for table in ALL_TABLES:
        rows = [pq.read_metadata(file).num_rows for file in files if file.stem == table.name]
        assert len(getattr(run, table.name)) == run.table(table.name).num_rows == sum(rows), table.name
    layers = [pa.compute.sum(pq.read_table(f)["dispatch_ns"]).as_py() for f in files if f.stem == "layers"]
    assert run.layers.dispatch_ns.sum() == sum(layers)
    pairs = run.tokens[~run.tokens.warm_up].groupby("policy")[["pairs", "full_pairs"]].sum()
    assert (pairs.pairs / pairs.full_pairs).to_dict() == {"top1": 0.5, "topk": 1.0}
    assert len(run.choices) == 2 * 2
    assert "tokens" in dir(run)
    assert repr(run).endswith("tiny, 4 of 4 cells complete")


def test_columns_are_those_of_the_dictionary(run: wdmoe.Run) -> None:
    dictionary = (ROOT / "docs/tables.md").read_text(encoding="utf-8")
    for table in ALL_TABLES:
        described = run.describe(table.name)
        assert list(described.index) == run.table(table.name).column_names
        for column, unit, meaning in described.itertuples():
            assert f"`{column}`" in dictionary
            assert meaning in dictionary
            assert unit == "" or f"| {unit} |" in dictionary


def test_unreadable_runs_and_wrong_plans_are_reported(run: wdmoe.Run, tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="its tables are tokens, layers"):
        run.token  # noqa: B018
    with pytest.raises(wdmoe.ConfigError, match="no table is called 'token'"):
        run.table("token")
    with pytest.raises(RunDirectoryError, match="not a run's folder"):
        wdmoe.load_run(tmp_path)
    with pytest.raises(PlanError, match=r"can't read the plan .*plan\.yaml"):
        wdmoe.run_experiment(tmp_path / "plan.yaml")
    with pytest.raises(wdmoe.ConfigError, match="items: 0 is less than 1"):
        wdmoe.run_experiment(tmp_path / "plan.yaml", items=0)
    with pytest.raises(RunDirectoryError, match="not empty"):
        wdmoe.run_experiment(
            run.folder.parents[1] / "plan.yaml", data=run.folder.parents[1] / "data", out=run.folder
        )  # fmt: skip


def test_failed_cells_are_an_error_and_the_others_stay(run: wdmoe.Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    text = (run.folder.parents[1] / "plan.yaml").read_text(encoding="utf-8")
    # Longer than the model's context: each attempt of these cells fails at once.
    endless = json.dumps("one two " * 9000)
    plan.write_text(
        text[: text.index("workloads:")] + "attempts: 1\nworkloads:\n"
        "  - {kind: generate, name: short, prompts: [Hello], max_tokens: 2}\n"
        f"  - {{kind: generate, name: endless, prompts: [{endless}], max_tokens: 2}}\n"
    )
    with pytest.raises(FailedCellsError, match="2 of 4 cells failed: 'wdmoe-testbed status"):
        wdmoe.run_experiment(plan, out=tmp_path / "run")
    half = wdmoe.load_run(tmp_path / "run")
    assert repr(half).endswith("2 of 4 cells complete")
    assert set(half.failures.kind) == {"ContextLengthError"}
    assert set(half.answers.workload) == {"short"}


def test_the_notebook_draws_its_figures(run: wdmoe.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "strip the notebook's outputs"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(run.folder.parents[1])}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4  # loopback has no configured rates to draw estimates against
    text = "".join(output.get("text", "") for output in outputs)
    assert "median error of a prediction" in text
    assert "no configured rates" in text
