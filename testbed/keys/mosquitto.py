"""What mosquitto is told: its configuration and its access list. Pure."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from wire.topics import Topics

BASE_STATION = "bs"
_PACKET_BYTES = 8 << 20
_QUEUED_BYTES = 64 << 20


def configuration(folder: PurePosixPath, *, port: int) -> str:
    """Only over TLS, only with a certificate, whose common name is the user's name.

    Args:
        folder: where the files will be on the broker's machine.
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
        "# Without this every answer waits up to 40 ms.\n"
        "set_tcp_nodelay true\n"
        "# All requests of a layer are on their way at once.\n"
        "max_inflight_messages 0\n"
        "# A client that does not read, or sends what no frame is as long as, costs no more memory than this.\n"
        f"max_packet_size {_PACKET_BYTES}\n"
        f"max_queued_bytes {_QUEUED_BYTES}\n"
        "persistence false\n"
    )


def access_list(cluster: str, nodes: Iterable[str]) -> str:
    """Who may read and write which topics; all else is forbidden."""
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
    blocks += [
        [
            f"user {node}",
            f"topic read {topics.work(node)}",
            f"topic write {topics.results(node)}",
            f"topic write {topics.telemetry(node)}",
            # Read as well: a node looks whether another one has its name.
            f"topic readwrite {topics.status(node)}",
        ]
        for node in sorted(nodes)
    ]
    return "\n".join("\n".join(block) + "\n" for block in blocks)
