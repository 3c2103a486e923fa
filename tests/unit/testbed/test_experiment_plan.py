"""Plans and statistics: what is decided before and after a run, without running anything."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import PlanError, RunDirectoryError
from testbed.experiment.plan_files import named_demo_bundle
from testbed.plan.cells import blocks, expand
from testbed.plan.estimate import describe, estimate
from testbed.plan.reading import at_most, read_plan
from testbed.plan.schema import Generate, Items, Perplexity, Plan
from tests.in_process import run_in_process
from wire.tensors import WireDtype

POLICIES = ("topk", "top1", "topk:k=3", "topk:k=4")


def _plans() -> st.SearchStrategy[Plan]:
    workloads = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, unique=True).flatmap(
        lambda names: st.tuples(
            *(
                st.one_of(
                    st.builds(Generate, name=st.just(n), repetitions=st.one_of(st.none(), st.integers(1, 3))),
                    st.builds(
                        Perplexity, name=st.just(n), texts=st.just(("x",)),
                        where=st.sampled_from(["distributed", "in-process"]),
                    ),
                )
                for n in names
            )
        )
    )  # fmt: skip
    return st.builds(
        Plan,
        name=st.just("p"),
        policies=st.lists(st.sampled_from(POLICIES), min_size=1, unique=True).map(tuple),
        bundles=st.sampled_from([("int4",), ("int4", "int8")]),
        profiles=st.sampled_from([(), ("fast",), ("fast", "slow")]),
        workloads=workloads,
        repetitions=st.integers(1, 4),
        seed=st.integers(0, 10),
    )


@given(_plans())
def test_every_cell_comes_once_and_arms_take_turns(plan: Plan) -> None:
    cells = expand(plan)
    assert cells == expand(plan)
    assert len({cell.id for cell in cells}) == len(cells)
    expected = {
        (r, b, p, w.name, policy)
        for w in plan.workloads
        for r in range(w.repetitions or plan.repetitions)
        for b in plan.bundles
        for p in plan.profile_names
        for policy in plan.policies
    }
    assert {(c.repetition, c.bundle, c.profile, c.workload, c.policy) for c in cells} == expected
    assert len(cells) == len(expected)
    for block in blocks(plan):
        assert Counter(c.policy for c in block) == Counter(plan.policies)
        assert len({(c.repetition, c.bundle, c.profile, c.workload) for c in block}) == 1
    # In this process only after the nodes' costs are known.
    for repetition in range(plan.repetitions):
        for bundle in plan.bundles:
            where = [plan.workload(c.workload).where for c in cells if (c.repetition, c.bundle) == (repetition, bundle)]
            assert where == sorted(where)


def test_the_order_of_arms_depends_on_the_seed() -> None:
    def order(seed: int) -> list[str]:
        plan = Plan(name="p", policies=POLICIES, workloads=(Generate(),), repetitions=5, seed=seed)
        return [cell.policy for cell in expand(plan)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert len({tuple(order(1)[i : i + 4]) for i in range(0, 20, 4)}) > 1


def test_prompts_of_later_repetitions_follow() -> None:
    workload = Generate(prompts=("a", "b", "c"), prompts_per_cell=2)
    assert [workload.prompts_of(r) for r in range(2)] == [[(0, "a"), (1, "b")], [(2, "c"), (0, "a")]]
    assert len(Generate(prompts=5).prompts_of(3)) == 5


GOOD = {"name": "x", "policies": "[topk]", "workloads": "[{kind: generate}]"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policies": "[nope]"}, ("policies[0]", "unknown")),
        ({"policies": "[topk, topk]"}, ("policies", "twice")),
        ({"policies": "['topk:k=x']"}, ("policies[0]",)),
        ({"policies": "[]"}, ("$.policies",)),
        ({"repetitions": "0"}, ("$.repetitions",)),
        ({"repeat": "3"}, ("unknown field `repeat`",)),
        ({"polices": "3"}, ("unknown field `polices`", "did you mean 'policies'?")),
        ({"limits": "{least_mbs: 2}"}, ("$.limits", "did you mean 'least_mbps'?")),
        ({"network": "{external: {broker: x, cafile: y}}"}, ("$.network.external", "did you mean 'ca_file'?")),
        ({"workloads": "[{kind: generate, max_token: 3}]"}, ("$.workloads[0]", "did you mean 'max_tokens'?")),
        ({"network": "{}"}, ("network", "emulated")),
        ({"network": "{external: {}}"}, ("$.network.external", "broker")),
        ({"profiles": "[slow]"}, ("profiles", "emulated")),
        ({"baseline": "top1"}, ("baseline",)),
        ({"own_policies": "{int8: [top1]}"}, ("own_policies", "'int8' is not one of the bundles")),
        ({"own_policies": "{int4: [nope]}"}, ("own_policies.int4[0]", "unknown")),
        ({"own_policies": "{int4: [topk]}"}, ("own_policies.int4", "'topk' is listed twice")),
        ({"workloads": "[{kind: choice, dataset: x, form: song}]"}, ("$.workloads[0].form", "song")),
        ({"workloads": "[{kind: last-word, dataset: x, choosing: alone}]"}, ("workloads[0].choosing", "in-process")),
        ({"workloads": "[{kind: last-word, items: 3}]"}, ("$.workloads[0]", "dataset")),
        ({"nodes": "{a/b: 'L*:E*'}"}, ("node",)),
        ({"nodes": "{pi1: 'L*:E0-1', pi2: 'E2-3'}"}, ("nodes.pi2: 'E2-3' is not an expert selector: write",)),
        ({"nodes": "{pi1: 'L*:E3-1'}"}, ("nodes.pi1: range '3-1' runs backwards",)),
        ({"nodes": "{pi1: ''}"}, ("nodes.pi1: no expert selected",)),
        ({"workloads": "[{kind: choice}]"}, ("$.workloads[0]", "dataset")),
        ({"workloads": "[{kind: choice, dataset: x, items: [5, 5]}]"}, ("workloads[0].items", "empty")),
        ({"workloads": "[{kind: choice, dataset: x, choosing: alone}]"}, ("workloads[0].choosing", "in-process")),
        ({"workloads": "[{kind: perplexity, texts: 3}]"}, ("workloads[0]", "dataset")),
        ({"workloads": "[{kind: generate}, {kind: generate}]"}, ("workloads", "twice")),
        ({"workloads": "[{kind: sing}]"}, ("$.workloads[0]", "sing")),
        ({"name": "../x"}, ("$.name",)),
    ],
)
def test_a_wrong_plan_is_refused_with_its_field(change: dict[str, str], words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in {**GOOD, **change}.items()))
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    for word in words:
        assert word in str(caught.value)


def test_selectors_of_any_model_are_selectors_of_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    nodes = {"pi1": "L0-47:E0-127/0", "pi2": "L*:E*/1;L5:E3"}
    path.write_text("".join(f"{key}: {value}\n" for key, value in {**GOOD, "nodes": nodes}.items()))
    assert read_plan(path).nodes == nodes


def test_paths_are_found_beside_the_plan_and_data(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("name: x\npolicies: [topk]\nbundles: [./b]\nworkloads: [{kind: choice, dataset: q.jsonl}]\n")
    plan = read_plan(path, data=tmp_path / "data")
    assert plan.bundles == (str(tmp_path / "b"),)
    (workload,) = plan.workloads
    assert not isinstance(workload, Generate)
    assert workload.dataset == str(tmp_path / "data/q.jsonl")


def test_a_bundle_has_policies_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "name: x\nbundles: [int4, ./b]\npolicies: [topk, top1]\nown_policies: {./b: ['topk:k=3']}\n"
        "workloads: [{kind: generate}]\n"
    )
    plan = read_plan(path)
    own = {bundle: {cell.policy for cell in expand(plan) if cell.bundle == bundle} for bundle in plan.bundles}
    assert own == {"int4": {"topk", "top1"}, str(tmp_path / "b"): {"topk", "top1", "topk:k=3"}}
    assert plan.every_policy == ("topk", "top1", "topk:k=3")


def test_data_sets_are_shortened_from_their_first_item(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "name: x\npolicies: [topk]\nworkloads:\n- {kind: generate}\n- {kind: choice, dataset: a, items: [200, 700]}\n"
        "- {kind: last-word, dataset: b, items: 30}\n"
    )
    spans = [w.span for w in at_most(read_plan(path), 50).workloads if isinstance(w, Items)]
    assert spans == [(200, 250), (0, 30)]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "testbed/experiment/plans").glob("*.yaml")))
def test_the_plans_of_the_project_are_valid(path: Path) -> None:
    plan = read_plan(path)
    assert estimate(plan).cells == len(expand(plan))
    assert describe(plan)


def test_plan_as_a_command(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in GOOD.items()))
    done = run_in_process("testbed", "plan", path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if "generate topk" in line]) == 1
    assert "1 cell over localhost: 1 policy, 1 bundle, 1 link profile, 1 workload, 1 repetition\n" in done.stdout
    assert "4 answers, at most 128 tokens in all, 0 items, 0 texts" in done.stdout
    assert "roughly 0 min" not in done.stdout
    missing = run_in_process("testbed", "plan", tmp_path / "none.yaml")
    assert missing.returncode == 60
    assert "none.yaml" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_a_run_into_a_folder_that_is_not_empty_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in GOOD.items()))
    argv = ["run", str(path), "--out", str(tmp_path)]
    code = f"import sys\nfrom testbed.cli import main\nsys.argv[1:] = {argv}\nsys.modules['torch'] = None\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == RunDirectoryError.exit_code
    assert f"{tmp_path} is not empty: choose another --out" in done.stderr


@pytest.mark.parametrize(
    ("changed", "options", "says"),
    [
        ({"bundles": "[int3]"}, (), "bundles: 'int3' is neither a folder"),
        ({"bundles": "[./missing]"}, (), "missing"),
        ({"network": "{emulated: wifl.yaml}"}, (), "wifl.yaml"),
        ({"network": "{emulated: net.yaml}", "profiles": "[mixd]"}, (), "no profile 'mixd', only calm"),
        ({"workloads": "[{kind: choice, dataset: d.jsonl}]"}, ("--data", "."), "d.jsonl is missing: name its folder"),
    ],
)  # fmt: skip
def test_plan_names_what_is_missing(
    changed: dict[str, str], options: tuple[str, ...], says: str, tmp_path: Path
) -> None:  # fmt: skip
    (tmp_path / "net.yaml").write_text("name: t\nnodes: 8\nprofiles: {calm: {default: {down_mbps: 9, up_mbps: 9}}}\n")
    path = tmp_path / "plan.yaml"
    path.write_text("\n".join(f"{key}: {value}" for key, value in {**GOOD, **changed}.items()))
    done = run_in_process("testbed", "plan", path, *options)
    assert done.returncode not in (0, 1)
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "demo"),
    [
        ("int4", ("mixtral", "int4", 32)),
        ("int8-dynamic", ("mixtral", "int8-dynamic", 32)),
        ("int4-b128", ("mixtral", "int4", 128)),
        ("qwen3-moe-int4", ("qwen3-moe", "int4", 32)),
        ("qwen3-moe-int4-b64", ("qwen3-moe", "int4", 64)),
    ],
)
def test_bundles_of_the_demo_models_by_name(name: str, demo: tuple[str, str, int]) -> None:
    assert named_demo_bundle(name) == demo


@pytest.mark.parametrize("name", ["int5", "qwen3-moe", "other-int4", "qwen3-moe-"])
def test_other_names_of_bundles_are_refused(name: str) -> None:
    with pytest.raises(PlanError, match=r"is neither a folder .* qwen3-moe- in front of it"):
        named_demo_bundle(name)


def test_a_preset_decides_what_the_plan_leaves_open(tmp_path: Path) -> None:
    text = "name: p\npolicies: [topk]\nworkloads: [{kind: generate}, {kind: generate, name: plain, draft: none}]\n"
    for preset, drafts in ((None, "none"), ("fast", "auto"), ("exact", "auto"), ("field", "none")):
        path = tmp_path / "plan.yaml"
        path.write_text(text + (f"preset: {preset}\n" if preset else ""))
        plan = read_plan(path)
        first, plain = (plan.workload(name) for name in ("generate", "plain"))
        assert isinstance(first, Generate)
        assert isinstance(plain, Generate)
        assert (plan.draft_of(first), plan.draft_of(plain), plan.draft) == (drafts, "none", drafts)
        assert (plan.wire, plan.wire_dtype) == (None, WireDtype.FP16)
    path.write_text(f"{text}preset: quick\n")
    with pytest.raises(PlanError, match=r"Invalid enum value 'quick'.*preset"):
        read_plan(path)


def test_two_plans_that_ask_for_the_same_are_the_same_once_resolved(tmp_path: Path) -> None:
    text = "name: p\npolicies: [topk]\nworkloads: [{kind: generate}, {kind: perplexity, dataset: d.jsonl}]\n"
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    short = read_plan(path)
    path.write_text(text.replace("generate}", "generate, draft: none}") + "wire: fp16\n")
    full = read_plan(path)
    assert short.resolved == full.resolved == full != short
    path.write_text(f"{text}preset: fast\n")
    assert read_plan(path).resolved == read_plan(path)
