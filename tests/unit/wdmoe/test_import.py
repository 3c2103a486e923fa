"""Importing `wdmoe` costs nothing, and what is missing is named in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

import wdmoe
from common.errors import MissingPackageError
from tests.unit.common.test_missing_extras import BLOCKED


def test_every_public_name_is_there_and_documented() -> None:
    assert set(wdmoe.__all__) == set(dir(wdmoe))
    for name in set(wdmoe.__all__) - {"__version__"}:
        assert getattr(wdmoe, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Clutser'"):
        wdmoe.Clutser  # noqa: B018


def test_importing_it_loads_no_library_that_is_slow() -> None:
    code = "import sys, wdmoe; from wdmoe import Cluster; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "onnxruntime", "pyarrow", "pandas", "matplotlib"} & set(done.stdout.split())


_USES = {
    "bs": ["wdmoe.Cluster(B, 'mqtt://127.0.0.1:1').open()", "wdmoe.generate('Hello', B, 'mqtt://127.0.0.1:1')"],
    "testbed": ["wdmoe.Cluster.local(B)", "wdmoe.load_run(B)", "wdmoe.run_experiment(B)"],
}


def test_a_missing_extra_is_named(random_bundle: Path) -> None:
    code = f"{BLOCKED}\nimport wdmoe\nfrom common.errors import MissingPackageError\nB = sys.argv[1]\n"
    for uses in _USES.values():
        for use in uses:
            code += f"try: {use}\nexcept MissingPackageError as error: print(error)\n"
    done = subprocess.run([sys.executable, "-c", code, random_bundle], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == [
        f"pip install 'wdmoe[{extra}]'" for extra, uses in _USES.items() for _ in uses
    ]
    assert MissingPackageError.exit_code == 52


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "sometimes"}, "^draft: 'sometimes' is not one of 'none', 'ngram'"),
        ({"wire": "fp8"}, "^wire: 'fp8' is not one of"),
        ({"nodes_timeout": -1}, "^nodes_timeout: -1.* range"),
        ({"resident": "much"}, "^resident: "),
        ({"broker": "http://here"}, "broker: not a broker URL"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_starts(options: dict[str, object], message: str) -> None:
    with pytest.raises(wdmoe.ConfigError, match=message):
        wdmoe.Cluster("bundle", **{"broker": "mqtt://127.0.0.1", **options})  # type: ignore[arg-type]


def test_an_unknown_option_is_named_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="unknown option 'node_timeout': did you mean 'nodes_timeout'"):
        wdmoe.Cluster("bundle", "mqtt://127.0.0.1", node_timeout=5)
    with pytest.raises(wdmoe.ConfigError, match="nodes: 0 is not from 1 to 256"):
        wdmoe.Cluster.local("bundle", nodes=0)
    with pytest.raises(wdmoe.ConfigError, match="model: 'llama' is not one of mixtral, qwen3-moe"):
        wdmoe.Cluster.local(model="llama")


def test_a_cluster_that_is_not_open_says_so() -> None:
    cluster = wdmoe.Cluster("bundle", "mqtt://127.0.0.1")
    with pytest.raises(wdmoe.WdmoeError, match="not open"):
        cluster.generate("Hello")
    cluster.close()
