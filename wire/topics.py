"""MQTT topics of a cluster, and what each carries.

    wdmoe/v1/<cluster>/nodes/<node>/status    node → all   retained JSON (`wire.status`), also the last will
    wdmoe/v1/<cluster>/nodes/<node>/telemetry node → BS    JSON (`wire.telemetry`), once a second
    wdmoe/v1/<cluster>/nodes/<node>/work      BS → node    frames: WORK, PING
    wdmoe/v1/<cluster>/results/<node>         node → BS    frames: RESULT, ERROR, PONG
    wdmoe/v1/<cluster>/control/<client>/echo  client → itself, to measure the broker

A broker's access list needs one line per node and direction.
"""

import re
from typing import NamedTuple

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NODE = rf"(?P<node>{_NAME.pattern})"
_STATUS = re.compile(rf"wdmoe/v1/(?P<cluster>[^/]+)/nodes/{_NODE}/status")
_TELEMETRY = re.compile(rf"wdmoe/v1/(?P<cluster>[^/]+)/nodes/{_NODE}/telemetry")
_RESULT = re.compile(rf"wdmoe/v1/(?P<cluster>[^/]+)/results/{_NODE}")


def check_name(kind: str, name: str) -> str:
    """Return `name` if it is allowed in a topic.

    Raises:
        ValueError: it is empty, too long, or contains `/`, `+`, `#` or other characters with a meaning in MQTT.
    """
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{kind} {name[:80]!r} is not valid: use 1 to 64 letters, digits, '.', '_' or '-', the first a letter or "
            "digit"
        )
    return name


class Topics(NamedTuple):
    """Topic names of one cluster.

    Attributes:
        cluster: name that separates several clusters on one broker.
    """

    cluster: str

    @property
    def _root(self) -> str:
        return f"wdmoe/v1/{self.cluster}"

    def status(self, node: str) -> str:
        """Topic of the retained status of `node`; `+` for all nodes."""
        return f"{self._root}/nodes/{node}/status"

    def telemetry(self, node: str) -> str:
        """Topic of the telemetry of `node`; `+` for all nodes."""
        return f"{self._root}/nodes/{node}/telemetry"

    def work(self, node: str) -> str:
        """Topic of the frames to `node`."""
        return f"{self._root}/nodes/{node}/work"

    def results(self, node: str) -> str:
        """Topic of the answers of `node`; `+` for all nodes."""
        return f"{self._root}/results/{node}"

    def echo(self, client: str) -> str:
        """Topic of messages from `client` to itself."""
        return f"{self._root}/control/{client}/echo"

    def node_of_status(self, topic: str) -> str | None:
        """The node of a status topic of this cluster; None for any other topic."""
        match = _STATUS.fullmatch(topic)
        return match["node"] if match and match["cluster"] == self.cluster else None

    def node_of_telemetry(self, topic: str) -> str | None:
        """The node of a telemetry topic of this cluster; None for any other topic."""
        match = _TELEMETRY.fullmatch(topic)
        return match["node"] if match and match["cluster"] == self.cluster else None

    def node_of_result(self, topic: str) -> str | None:
        """The node of a results topic of this cluster; None for any other topic."""
        match = _RESULT.fullmatch(topic)
        return match["node"] if match and match["cluster"] == self.cluster else None
