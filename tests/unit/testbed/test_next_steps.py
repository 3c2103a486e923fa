"""The lines that `wdmoe-testbed up` prints to copy can be used as they are."""

import ast
import shlex
import textwrap
from pathlib import Path

import pytest

from testbed.demo.next_steps import after_demo, describe_broker, describe_server, server_url
from testbed.demo.up import spread_experts
from tests.unit.test_docs import check_command, commands
from wire.experts import ExpertId, parse_selector


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("key", [None, Path("my keys/api.key")])
def test_python_and_curl_reach_the_server(chat: bool, key: Path | None) -> None:
    text = describe_server("http://127.0.0.1:8080", model="demo", chat=chat, api_key_file=key)
    python, curl = (textwrap.dedent(block) for block in text.split("\n\n")[2::2])
    tree = ast.parse(python)
    literals = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {"http://127.0.0.1:8080/v1", "demo"} <= literals
    assert ("my keys/api.key" in literals) == (key is not None)
    words = shlex.split(curl)
    assert words[:2] == ["curl", f"http://127.0.0.1:8080/v1/{'chat/' * chat}completions"]
    assert any("Bearer" in word for word in words) == (key is not None)
    ast.literal_eval(words[words.index("-d") + 1])


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:80"), ("::1", "http://[::1]:80"), ("::", "http://[::1]:80"),
     ("0.0.0.0", "http://127.0.0.1:80"), ("desk.local", "http://desk.local:80")],  # noqa: S104
)  # fmt: skip
def test_the_address_can_be_opened_on_this_machine(host: str, url: str) -> None:
    assert server_url(host, 80) == url


def test_the_commands_after_the_demo_exist() -> None:
    lines = list(commands(f"```sh\n{after_demo(Path('/a b/bundle'))}\n```\n"))
    ours = [(Path(words[0]).name, words[1:]) for words in lines if Path(words[0]).name.startswith("wdmoe-")]
    assert [name for name, _ in ours] == ["wdmoe-testbed", "wdmoe-bs", "wdmoe-node"]
    for name, arguments in ours:
        check_command(name, arguments, name)


def test_the_command_for_one_more_node_exists() -> None:
    text = describe_broker("mqtt://127.0.0.1:40001", bundle=Path("/a b/bundle"))
    assert "broker is at mqtt://127.0.0.1:40001;" in text
    (line,) = (line.strip() for line in text.splitlines() if "--experts" in line)
    program, *arguments = shlex.split(line)
    assert Path(program).name == "wdmoe-node"
    assert "/a b/bundle" in arguments
    check_command("wdmoe-node", arguments, line)


@pytest.mark.parametrize(("experts", "nodes"), [(8, 3), (8, 8), (4, 9), (5, 1)])
def test_every_expert_has_one_node(experts: int, nodes: int) -> None:
    held = [
        id
        for selector in spread_experts(experts, nodes).values()
        for id in parse_selector(selector, layers=1, experts=experts)
    ]
    assert sorted(held) == [ExpertId(0, e) for e in range(experts)]
