"""What to do with a running server, or after the demo: lines to copy."""

import json
import shlex
import shutil
import sys
from pathlib import Path

QUESTION = "What is the capital of France?"


def describe_server(url: str, *, model: str, chat: bool, api_key_file: Path | None = None) -> str:
    """Where a server is, and how to ask it with openai's Python client and with curl.

    Args:
        url: of the server, without a slash at its end.
        model: name under which the server lists its model.
        chat: whether the model has a chat template; otherwise the server can only continue texts.
        api_key_file: file of the key that callers must send; None if they need none.
    """
    key = f"open({str(api_key_file)!r}).read().strip()" if api_key_file else '"none"'
    body: dict[str, object]
    if chat:
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}]}
        call = (
            f'client.chat.completions.create(model="{model}", messages=[{{"role": "user", "content": "{QUESTION}"}}])'
        )
        text = "answer.choices[0].message.content"
    else:
        path, body = "/v1/completions", {"prompt": "The capital of France is", "max_tokens": 24}
        call = f'client.completions.create(model="{model}", prompt="The capital of France is", max_tokens=24)'
        text = "answer.choices[0].text"
    authorisation = f' -H "Authorization: Bearer $(cat {shlex.quote(str(api_key_file))})"' if api_key_file else ""
    return f"""\
{model} answers at {url}/v1 (OpenAI's API); {url}/ shows the fleet at work, and has a chat

Python, after 'pip install openai':

    from openai import OpenAI
    client = OpenAI(base_url="{url}/v1", api_key={key})
    answer = {call}
    print({text})

curl:

    curl {url}{path}{authorisation} -H "Content-Type: application/json" \\
        -d {shlex.quote(json.dumps(body))}
"""


def describe_broker(address: str, *, bundle: Path) -> str:
    """Where the broker is, and how to start one more node with experts of the bundle.

    Args:
        address: URL of the broker.
        bundle: folder that the nodes read.
    """
    files = f"--bundle {shlex.quote(str(bundle))} --broker {shlex.quote(address)}"
    return f"""\
The broker is at {address}; one more node, with expert 3 of every layer:

    {program("wdmoe-node")} {files} --id more --experts 'L*:E3'
"""


def server_url(host: str, port: int) -> str:
    """The URL to reach a server on this machine that listens at `host`."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{name}:{port}"


def after_demo(bundle: Path) -> str:
    """What to do after the demo, with the bundle that it has made."""
    folder = shlex.quote(str(bundle))
    return f"""\
What next?
  {program("wdmoe-testbed")} up
      the same model and nodes as a server for OpenAI clients, until Ctrl-C
  {program("wdmoe-bs")} chat --bundle {folder} --broker-port 1884
  {program("wdmoe-node")} --bundle {folder} --broker mqtt://127.0.0.1:1884 --id all --experts 'L*:E*'
      a chat, and in a second terminal the one node that computes for it; more nodes, each with fewer experts, can
      be on other machines (docs/deploy.md)"""


def program(name: str) -> str:
    """How to call a command of this project: by its path where the PATH does not lead to it, as after `make`."""
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) or not beside.exists():
        return name
    try:
        return shlex.quote(str(beside.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(beside))
