"""Failed TLS connections, against real sockets: refusals say why, and faults that pass are no refusals."""

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from testbed.keys.authority import Authority, Issued, new_authority
from wire.broker_address import BrokerAddress
from wire.errors import BrokerAuthError, BrokerError
from wire.tls_errors import alert_in, refused_by_alert
from wire.transports import connect

HOST = "127.0.0.1"
_CA = new_authority("lab", days=1)
_OTHER_CA = new_authority("elsewhere", days=1)


def _issue(name: str = "broker", *, ca: Issued = _CA, days: float = 1, hosts: tuple[str, ...] = (HOST,)) -> Issued:
    return Authority(*ca).issue(name, days=days, hosts=hosts)


@contextmanager
def _listening(serve: Callable[[socket.socket], object], folder: Path, **options: Any) -> Iterator[BrokerAddress]:
    """A listener whose connections `serve` handles; yields the address to connect to, which trusts the lab's CA."""
    (folder / "ca.crt").write_bytes(_CA.certificate)
    done = threading.Event()
    with socket.create_server((HOST, 0)) as listener:

        def run() -> None:
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    if done.is_set():
                        return
                    serve(connection)

        thread = threading.Thread(target=run)
        thread.start()
        port = listener.getsockname()[1]
        yield replace(BrokerAddress(HOST, port, "mqtts", tls=True, ca_file=folder / "ca.crt"), **options)
        done.set()
        socket.create_connection((HOST, port), 10).close()
        thread.join(10)
        assert not thread.is_alive()


def _with_certificate(issued: Issued, folder: Path, *, wants_one: bool = False) -> Callable[[socket.socket], object]:
    for name, content in issued._asdict().items():
        (folder / f"broker.{name}").write_bytes(content)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "broker.certificate", folder / "broker.key")
    if wants_one:
        context.load_verify_locations(cadata=_CA.certificate.decode())
        context.verify_mode = ssl.CERT_REQUIRED

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            while secured.recv(4096):
                pass

    return serve


def _failure(serve: Callable[[socket.socket], object], folder: Path, **options: Any) -> BrokerError:
    with (
        _listening(serve, folder, **options) as address,
        pytest.raises(BrokerError) as caught,
    ):
        connect(address, "t", timeout_s=5.0)
    assert "\n" not in str(caught.value)
    return caught.value


# paho leaves a socket whose handshake failed to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize(
    ("issued", "reason", "advice"),
    [
        (_issue(days=-0.5), "expired", "keys rotate"),
        (_issue(hosts=("10.0.0.7",)), "not valid for '127.0.0.1'", "keys init --host"),
        (_issue(ca=_OTHER_CA), "issuer certificate", "--ca-file"),
    ],
)
def test_refused_certificates_of_brokers(issued: Issued, reason: str, advice: str, tmp_path: Path) -> None:
    error = _failure(_with_certificate(issued, tmp_path), tmp_path)
    assert isinstance(error, BrokerAuthError)
    assert error.final
    assert reason in str(error)
    assert advice in str(error)


def test_a_certificate_that_is_not_valid_yet_may_become_so(tmp_path: Path) -> None:
    """As on a board without a battery-backed clock, before its time service has started."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "broker")])
    begin = datetime.now(UTC) + timedelta(days=2)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 7, begin, begin + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "own.crt").write_bytes(certificate)
    serve = _with_certificate(Issued(certificate, private), tmp_path)
    error = _failure(serve, tmp_path, ca_file=tmp_path / "own.crt")
    assert isinstance(error, BrokerAuthError)
    assert not error.final
    assert "not yet valid" in str(error)
    assert f"{datetime.now(UTC):%Y-%m-%d}" in str(error)


@pytest.mark.parametrize(
    ("client", "reason"),
    [
        (None, "certificate required"),
        (_issue("pi1", days=-0.5, hosts=()), "expired"),
        (_issue("pi1", ca=_OTHER_CA, hosts=()), "unknown ca"),
    ],
)
def test_refused_certificates_of_clients(client: Issued | None, reason: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if client is not None:
        options = {"tls_cert": tmp_path / "pi1.crt", "tls_key": tmp_path / "pi1.key"}
        (tmp_path / "pi1.crt").write_bytes(client.certificate)
        (tmp_path / "pi1.key").write_bytes(client.key)
    error = _failure(_with_certificate(_issue(), tmp_path, wants_one=True), tmp_path, **options)
    assert isinstance(error, BrokerAuthError)
    assert error.final
    assert f"refused our certificate: {reason}" in str(error).replace("certificate expired", "expired")


def _reset(connection: socket.socket) -> None:
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _reads(connection: socket.socket) -> None:
    connection.recv(4096)


def _answers_without_tls(connection: socket.socket) -> None:
    connection.recv(4096)
    connection.sendall(bytes(64))


def _after_handshake(folder: Path, then: Callable[[ssl.SSLSocket], object]) -> Callable[[socket.socket], object]:
    _with_certificate(_issue(), folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "broker.certificate", folder / "broker.key")

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            then(secured)

    return serve


def test_faults_that_pass_are_no_refusals(tmp_path: Path) -> None:
    for serve in (
        lambda connection: None,  # a port forwarder without a broker behind it
        _reads,
        _reset,
        _after_handshake(tmp_path, lambda secured: None),
        _after_handshake(tmp_path, _reads),
        _after_handshake(tmp_path, _reset),
    ):
        error = _failure(serve, tmp_path)
        assert not isinstance(error, BrokerAuthError), error


def test_a_port_without_tls_is_a_wrong_port(tmp_path: Path) -> None:
    error = _failure(_answers_without_tls, tmp_path)
    assert isinstance(error, BrokerAuthError)
    assert "no TLS at this port" in str(error)


@pytest.mark.parametrize("content", [b"", b"no key", None])
def test_files_that_are_no_keys(content: bytes | None, tmp_path: Path) -> None:
    issued = _issue("pi1", hosts=())
    if content is None:  # an encrypted key: OpenSSL would ask for its password on the terminal
        key = serialization.load_pem_private_key(issued.key, None)
        content = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"hush"),
        )  # fmt: skip
    (tmp_path / "pi1.crt").write_bytes(issued.certificate)
    (tmp_path / "pi1.key").write_bytes(content)
    address = BrokerAddress(HOST, 9, "mqtts", tls=True, tls_cert=tmp_path / "pi1.crt", tls_key=tmp_path / "pi1.key")
    with pytest.raises(BrokerAuthError, match="--tls-key"):
        connect(address, "t", timeout_s=5.0)


def test_alerts() -> None:
    address = BrokerAddress(HOST, 8883, "mqtts", tls=True)
    assert alert_in("[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca (_ssl.c:2580)") == "unknown ca"
    assert alert_in("TLSV13_ALERT_CERTIFICATE_REQUIRED") == "certificate required"
    assert alert_in("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF") == ""
    assert isinstance(refused_by_alert("protocol version", address), BrokerAuthError)
    assert not isinstance(refused_by_alert("internal error", address), BrokerAuthError)
