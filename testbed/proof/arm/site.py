"""Broker and keys as in a deployment: TLS, client certificates, frame keys, an access list, signed bundles."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bs_coordinator.broker.processes import LOOPBACK, broker_process, free_port, mosquitto_path
from testbed.keys.folder import create
from wire.broker_address import BrokerAddress
from wire.broker_url import Access, parse_broker_url
from wire.errors import BrokerError
from wire.manifest import MANIFEST_NAME
from wire.signature import sign

CLUSTER = "arm"
_DAYS = 1.0


@dataclass(frozen=True, slots=True)
class Site:
    """A running broker, and the folder of all keys.

    Attributes:
        address: broker address for the base station, with its certificate.
        keys: folder of all keys.
    """

    address: BrokerAddress
    keys: Path

    @property
    def cluster_key(self) -> Path:
        """File of the base station's cluster key, for frames."""
        return self.keys / "bs/cluster.key"

    def node_options(self, node: str) -> list[str]:
        """Options of `wdmoe-node` with the key files of `node`."""
        files = {
            "--ca-file": "ca.crt", "--tls-cert": "node.crt", "--tls-key": "node.key", "--frame-key": "frame.key",
            "--bundle-key": "bundle.pub",
        }  # fmt: skip
        return [word for option, file in files.items() for word in (option, str(self.keys / "nodes" / node / file))]

    def sign(self, bundle: Path) -> None:
        """Sign a bundle with the cluster's key."""
        sign((bundle / MANIFEST_NAME).read_bytes(), bundle, self.keys / "bundle.key")


@contextmanager
def open_site(nodes: Sequence[str]) -> Iterator[Site]:
    """Run a mosquitto with new keys for the duration of the context.

    Raises:
        BrokerError: mosquitto is not installed, or does not start.
    """
    mosquitto = mosquitto_path()
    if mosquitto is None:
        raise BrokerError("mosquitto is not installed: 'apt install mosquitto'")
    with tempfile.TemporaryDirectory(prefix="wdmoe-arm-") as folder:
        keys, port = Path(folder) / "keys", free_port()
        broker = keys / "broker"
        create(
            keys, cluster=CLUSTER, hosts=[LOOPBACK], nodes=nodes, days=_DAYS, port=port,
            broker_folder=PurePosixPath(broker),
        )  # fmt: skip
        if os.getuid() == 0:
            with (broker / "mosquitto.conf").open("a") as file:
                file.write("user root\n")  # else mosquitto switches to a user that can't read the folder
        argv = [mosquitto, "-c", str(broker / "mosquitto.conf")]
        with broker_process(argv, (LOOPBACK, port), "mosquitto", Path(folder) / "broker.log"):
            access = Access(ca_file=keys / "bs/ca.crt", tls_cert=keys / "bs/bs.crt", tls_key=keys / "bs/bs.key")
            yield Site(parse_broker_url(f"mqtts://{LOOPBACK}:{port}", access), keys)
