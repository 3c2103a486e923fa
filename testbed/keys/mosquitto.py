"""Configuration file and access list for mosquitto. Pure."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from edge_node.home_assistant import discovery_topic
from wire.topics import Topics

BASE_STATION = "bs"
HOME_ASSISTANT = "home-assistant"
"""User names besides those of the nodes."""
_PACKET_BYTES = 8 << 20
_QUEUED_BYTES = 64 << 20


def configuration(folder: PurePosixPath, *, port: int) -> str:
    """A configuration that requires TLS and client certificates, whose common name is the user name.

    Args:
        folder: path of the key files on the broker's machine.
        port: TCP port to listen on.
    """
    return (
        f"listener {port}\n"
        "# TLS 1.2 or newer\n"
        "tls_version tlsv1.2\n"
        f"cafile {folder / 'ca.crt'}\n"
        f"certfile {folder / 'broker.crt'}\n"
        f"keyfile {folder / 'broker.key'}\n"
        f"crlfile {folder / 'crl.pem'}\n"
        "require_certificate true\n"
        "use_identity_as_username true\n"
        "allow_anonymous false\n"
        f"acl_file {folder / 'acl'}\n"
        "# Without this, Nagle's algorithm delays answers by up to 40 ms.\n"
        "set_tcp_nodelay true\n"
        "# All requests of a layer are in flight at once.\n"
        "max_inflight_messages 0\n"
        "# Limits the memory for a client that does not read, or sends packets longer than any frame.\n"
        f"max_packet_size {_PACKET_BYTES}\n"
        f"max_queued_bytes {_QUEUED_BYTES}\n"
        "persistence false\n"
    )


def access_list(cluster: str, nodes: Iterable[str], *, home_assistant: str | None = None) -> str:
    """An access list with the topics that each client may read and write; all others are forbidden.

    Args:
        home_assistant: prefix of Home Assistant's discovery topics. Home Assistant may then read what nodes say about
            themselves, and each node may announce itself; None without Home Assistant.
    """
    topics = Topics(cluster)
    blocks = [
        [
            f"user {BASE_STATION}",
            f"topic read {topics.status('+')}",
            f"topic read {topics.telemetry('+')}",
            f"topic read {topics.results('+')}",
            f"topic write {topics.work('+')}",
            f"topic readwrite {topics.echo('+')}",
        ]
    ]
    if home_assistant:
        # It also writes here: its own state, and nothing in place of the announcement of a device that it removes.
        blocks.append(
            [
                f"user {HOME_ASSISTANT}",
                f"topic read {topics.status('+')}",
                f"topic read {topics.telemetry('+')}",
                f"topic readwrite {home_assistant}/#",
            ]
        )
    blocks += [
        [
            f"user {node}",
            f"topic read {topics.work(node)}",
            f"topic write {topics.results(node)}",
            f"topic write {topics.telemetry(node)}",
            # Nodes also read their own status, to detect another node with the same id.
            f"topic readwrite {topics.status(node)}",
            *([f"topic write {discovery_topic(home_assistant, cluster, node)}"] if home_assistant else []),
        ]
        for node in sorted(nodes)
    ]
    return "\n".join("\n".join(block) + "\n" for block in blocks)
