"""A model whose router's rule is not known: the commands refuse policies that need scores, before they do anything."""

from pathlib import Path

import pytest

from tests.checkpoints import tiny_moe
from tests.conftest import Run

NOWHERE = "mqtt://127.0.0.1:1"
"""A broker that does not answer: what is refused before it is asked does not mention it."""


@pytest.fixture(scope="module")
def phimoe(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """A bundle of a tiny random Phi-MoE, whose weights come from "sparsemixer"."""
    folder = tmp_path_factory.mktemp("phimoe")
    tiny_moe(folder / "checkpoint", "phimoe")
    done = run("exporter", "bundle", folder / "checkpoint", folder / "bundle", "--quant", "fp32", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


@pytest.mark.parametrize(
    "command",
    [("generate", "--prompt", "why"), ("chat",), ("serve",)],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("policy", ["wdmoe", "subset:price=1", "topk:k=3"])
def test_policies_that_need_scores_are_refused_by_name(
    phimoe: Path, run: Run, command: tuple[str, ...], policy: str
) -> None:
    done = run("bs_coordinator", *command, "--bundle", phimoe, "--broker", NOWHERE, "--policy", policy)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert (
        f"--policy: policy '{policy}' compares all experts by score, but how this model scores them is not known: use "
        "topk, or topk:k=… up to 2 (try "
    ) in line


@pytest.mark.parametrize("policy", ["topk", "top1", "topk:k=2,survivors=none"])
def test_the_models_own_choice_is_accepted(phimoe: Path, run: Run, policy: str) -> None:
    done = run(
        "bs_coordinator", "generate", "--prompt", "why", "--bundle", phimoe, "--broker", NOWHERE, "--policy", policy
    )
    assert done.returncode == 30  # the policy is fine, so the broker was asked
    assert "127.0.0.1:1" in done.stderr
