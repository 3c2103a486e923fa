"""The folder with all keys of a cluster, with a subfolder for each machine to copy there.

    ca.key  ca.crt  crl.pem  bundle.key     stay with the operator
    broker/   ca.crt crl.pem broker.crt broker.key acl mosquitto.conf
    bs/       ca.crt bs.crt bs.key cluster.key bundle.pub
    nodes/N/  ca.crt node.crt node.key frame.key bundle.pub
    home-assistant/  ca.crt home-assistant.crt home-assistant.key prefix    if asked for

All of it is readable by its owner only.
"""

import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from common.errors import KeyFileError, StorageError
from common.files import atomic_write
from common.names import check_host, first_twice
from common.private_files import read_private
from edge_node.home_assistant import check_prefix
from testbed.keys.authority import Authority, Issued, expiry, hosts_of, new_authority
from testbed.keys.mosquitto import BASE_STATION, HOME_ASSISTANT, access_list, configuration
from testbed.keys.validity import AUTHORITY_DAYS
from wire.frame_auth import KEY_BYTES, ClusterKey, cluster_key_line, node_key_line
from wire.topics import check_name

BROKER = "broker"
FRAMES = "frames"
_RESERVED = (BASE_STATION, BROKER, FRAMES, HOME_ASSISTANT)


class Expiry(NamedTuple):
    """Owner of a certificate, and when it expires."""

    name: str
    until: datetime


def create(
    folder: Path, *, cluster: str, hosts: Sequence[str], nodes: Sequence[str], days: float, port: int,
    broker_folder: PurePosixPath,
) -> "KeyFolder":  # fmt: skip
    """Make all keys of a new cluster. The folder appears complete or not at all.

    Args:
        folder: where to make it; must not exist or be empty.
        cluster: name of the cluster.
        hosts: names and addresses of the broker.
        nodes: node ids.
        days: validity of certificates in days.
        port: port of the broker.
        broker_folder: path of `broker/` on the broker's machine.

    Raises:
        KeyFileError: the folder is not empty, or the name of a host, node or the cluster is not valid.
        StorageError: the folder can't be written.
    """
    try:
        check_name("cluster", cluster)
        hosts = [check_host(host) for host in hosts]
    except ValueError as error:
        raise KeyFileError(str(error)) from None
    if zoned := [host for host in hosts if "%" in host]:
        raise KeyFileError(f"'{zoned[0]}' has a zone, which means something on one machine only: give another address")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise KeyFileError(
            f"{folder} exists already: give a new folder, or change this one with 'keys add' or 'keys rotate'"
        )
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            part = Path(temporary) / "keys"
            part.mkdir(mode=0o700)
            authority = new_authority(f"WDMoE {cluster}", days=AUTHORITY_DAYS)
            _put(part / "ca.crt", authority.certificate)
            _put(part / "ca.key", authority.key)
            _put(part / "crl.pem", Authority(*authority).revocations(None))
            _put(part / "bundle.key", _signing_key())
            _put(part / "bs" / "cluster.key", cluster_key_line(ClusterKey(cluster, secrets.token_bytes(KEY_BYTES))))
            _put(part / "broker" / "mosquitto.conf", configuration(broker_folder, port=port).encode())
            keys = KeyFolder(part)
            keys.renew_broker(hosts, days=days)
            keys.renew_base_station(days=days)
            keys.add(nodes, days=days)
            if folder.exists():
                folder.rmdir()
            part.rename(folder)
    return KeyFolder(folder)


class KeyFolder:
    """An existing folder with all keys of a cluster."""

    def __init__(self, path: Path) -> None:
        """Open the folder.

        Raises:
            KeyFileError: `path` is not a folder of keys, or other users can read them.
        """
        self.path = path
        if not (path / "ca.key").is_file():
            raise KeyFileError(f"{path} holds no keys: 'wdmoe-testbed keys init {path}' makes them")
        try:
            self._authority = Authority((path / "ca.crt").read_bytes(), read_private(path / "ca.key"))
        except (OSError, ValueError) as error:
            raise KeyFileError(f"{path} holds no usable authority: {error}") from None

    @property
    def nodes(self) -> list[str]:
        """Ids of the nodes that have keys, sorted."""
        folder = self.path / "nodes"
        return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []

    @property
    def home_assistant(self) -> str | None:
        """Prefix of the discovery topics of the Home Assistant that has keys; None if none has."""
        file = self.path / HOME_ASSISTANT / "prefix"
        return file.read_text(encoding="utf-8").strip() if file.is_file() else None

    @property
    def cluster_key(self) -> ClusterKey:
        """The cluster key, from which all frame keys are derived."""
        _, cluster, secret = read_private(self.path / "bs" / "cluster.key").decode().split()
        return ClusterKey(cluster, bytes.fromhex(secret))

    def add(self, names: Sequence[str], *, days: float) -> None:
        """Make the keys of new nodes.

        Raises:
            KeyFileError: a name has keys already, is reserved, or is not a valid node id.
        """
        for name in names:
            try:
                check_name("node id", name)
            except ValueError as error:
                raise KeyFileError(str(error)) from None
            if name.lower() in _RESERVED:
                raise KeyFileError(f"'{name}' is a reserved name")
        if twice := first_twice([*self.nodes, *names]):
            raise KeyFileError(
                f"'{twice}' has keys already (upper and lower case count as equal): 'keys rotate' renews them"
            )
        with _writing(self.path):
            for name in names:
                self._renew_node(name, days=days)
            self._write_access()

    def admit_home_assistant(self, prefix: str, *, days: float) -> None:
        """Make the certificate of a Home Assistant, and let nodes announce themselves to it.

        Args:
            prefix: of its discovery topics.
            days: validity in days.

        Raises:
            KeyFileError: a topic can't begin with the prefix, or a node has the name that Home Assistant needs.
        """
        try:
            check_prefix(prefix)
        except ValueError as error:
            raise KeyFileError(str(error)) from None
        if HOME_ASSISTANT in self.nodes:
            raise KeyFileError(f"a node has the name '{HOME_ASSISTANT}': give it another one first")
        with _writing(self.path):
            self._put_pair(self.path / HOME_ASSISTANT, HOME_ASSISTANT, self._authority.issue(HOME_ASSISTANT, days=days))
            _put(self.path / HOME_ASSISTANT / "prefix", f"{prefix}\n".encode())
            self._write_access()

    def revoke(self, names: Sequence[str]) -> None:
        """Revoke nodes' certificates, and remove their access rights and key files.

        Raises:
            KeyFileError: a node has no keys in this folder.
        """
        self._check_known(names)
        folders = [self.path / "nodes" / name for name in names]
        with _writing(self.path):
            self._revoke([(folder / "node.crt").read_bytes() for folder in folders])
            for folder in folders:
                shutil.rmtree(folder)
            self._write_access()

    def rotate(self, names: Sequence[str], *, days: float, revoke_old: bool) -> None:
        """Replace keys.

        Args:
            names: node ids, `bs`, `broker`, `home-assistant`, or `frames` for the cluster's frame key and all keys
                derived from it.
            days: validity of the new certificates in days.
            revoke_old: revoke the old certificates; otherwise they stay valid until they expire.

        Raises:
            KeyFileError: a name is none of these.
        """
        self._check_known([name for name in names if name not in _RESERVED])
        if HOME_ASSISTANT in names and self.home_assistant is None:
            raise KeyFileError(f"Home Assistant has no keys in {self.path}: 'keys home-assistant' makes them")
        with _writing(self.path):
            replaced = [self._certificate(name).read_bytes() for name in names if name != FRAMES]
            for name in names:
                if name == BROKER:
                    self.renew_broker(hosts_of(self._certificate(BROKER).read_bytes()), days=days)
                elif name == BASE_STATION:
                    self.renew_base_station(days=days)
                elif name == HOME_ASSISTANT:
                    self.admit_home_assistant(self.home_assistant or "", days=days)
                elif name == FRAMES:
                    key = ClusterKey(self.cluster_key.cluster, secrets.token_bytes(KEY_BYTES))
                    _put(self.path / "bs" / "cluster.key", cluster_key_line(key))
                    for node in self.nodes:
                        _put(self.path / "nodes" / node / "frame.key", node_key_line(key, node))
                else:
                    self._renew_node(name, days=days)
            if revoke_old:
                self._revoke(replaced)

    def expiries(self) -> list[Expiry]:
        """Expiry of all certificates, the earliest first."""
        with _writing(self.path):
            files = {"ca": self.path / "ca.crt"}
            files |= {name: self._certificate(name) for name in self._owners()}
            found = [Expiry(name, expiry(path.read_bytes())) for name, path in files.items()]
        return sorted(found, key=lambda e: e.until)

    def renew_broker(self, hosts: Sequence[str], *, days: float) -> None:
        """Make a new certificate for the broker.

        Args:
            hosts: names and addresses of the broker.
            days: validity in days.
        """
        folder = self.path / "broker"
        self._put_pair(folder, "broker", self._authority.issue(BROKER, days=days, hosts=hosts))
        _put(folder / "crl.pem", (self.path / "crl.pem").read_bytes())
        self._write_access()

    def renew_base_station(self, *, days: float) -> None:
        """Make a new certificate for the base station, valid for `days`."""
        self._put_pair(self.path / "bs", "bs", self._authority.issue(BASE_STATION, days=days))
        self._put_verifier(self.path / "bs")

    def _renew_node(self, name: str, *, days: float) -> None:
        folder = self.path / "nodes" / name
        self._put_pair(folder, "node", self._authority.issue(name, days=days))
        self._put_verifier(folder)
        _put(folder / "frame.key", node_key_line(self.cluster_key, name))

    def _put_pair(self, folder: Path, stem: str, issued: Issued) -> None:
        _put(folder / "ca.crt", (self.path / "ca.crt").read_bytes())
        _put(folder / f"{stem}.key", issued.key)
        _put(folder / f"{stem}.crt", issued.certificate)

    def _put_verifier(self, folder: Path) -> None:
        _put(folder / "bundle.pub", _public_half(read_private(self.path / "bundle.key")))

    def _write_access(self) -> None:
        acl = access_list(self.cluster_key.cluster, self.nodes, home_assistant=self.home_assistant)
        _put(self.path / "broker" / "acl", acl.encode())

    def _revoke(self, certificates: Sequence[bytes]) -> None:
        path = self.path / "crl.pem"
        revoked = self._authority.revocations(path.read_bytes(), certificates)
        _put(path, revoked)
        _put(self.path / "broker" / "crl.pem", revoked)

    def _certificate(self, name: str) -> Path:
        folder = self.path if name in _RESERVED else self.path / "nodes"
        return folder / name / f"{name if name in _RESERVED else 'node'}.crt"

    def _owners(self) -> list[str]:
        """Names of all that have a certificate."""
        return [BROKER, BASE_STATION, *([HOME_ASSISTANT] if self.home_assistant else []), *self.nodes]

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self.nodes]
        if unknown:
            raise KeyFileError(f"'{unknown[0]}' has no keys in {self.path}; nodes with keys: {', '.join(self.nodes)}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"can't write keys to {folder}: {error.strerror or error}") from None


def _put(path: Path, content: bytes) -> None:
    for folder in (path.parent.parent, path.parent):
        folder.mkdir(mode=0o700, exist_ok=True)
    with atomic_write(path, mode=0o600) as file:
        file.write(content)


def _signing_key() -> bytes:
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _public_half(private: bytes) -> bytes:
    public = load_pem_private_key(private, None).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
