"""What a failed TLS connection to a broker means: a refusal, or a fault that passes. Pure.

OpenSSL's reasons are in https://docs.openssl.org/master/man3/X509_STORE_CTX_get_error/, the alerts that the other side
sends in RFC 8446, section 6.
"""

import re
import ssl
from datetime import UTC, datetime

from wire.broker_address import BrokerAddress
from wire.errors import BrokerAuthError, BrokerError

_NOT_YET_VALID = 9
_ADVICE = {
    _NOT_YET_VALID: "this machine's clock says {now}; if that is wrong, wait for its time service",
    10: "renew the broker's certificate ('wdmoe-testbed keys rotate'), if this machine's clock, {now}, is right",
    23: "the broker's certificate was revoked; give it its new one",
    62: "use a name in the URL that the certificate has, or make one for this name ('wdmoe-testbed keys init --host')",
    64: "use an address in the URL that the certificate has, or make one for this address "
    "('wdmoe-testbed keys init --host')",
} | dict.fromkeys(
    (2, 18, 19, 20, 21), "name the CA that signed the broker's certificate by --ca-file: ca.crt of the cluster's keys"
)
"""What to do, by OpenSSL's X509_V_ERR_… number; 2 and 18 to 21 mean that no trusted CA signed the certificate."""
_PASSING_ALERTS = ("internal error", "user cancelled", "user canceled", "close notify")
_CERTIFICATE_ALERTS = {
    "certificate expired": "renew it ('wdmoe-testbed keys rotate'), if the broker's clock is right",
    "certificate revoked": "give this machine its new certificate",
    "certificate required": "give one by --tls-cert and --tls-key",
    "unknown ca": "--tls-cert must be signed by the CA that the broker trusts",
}
_ALERT = re.compile(r"(?:SSLV3|TLSV1|TLSV13)_ALERT_(\w+)")
_ENDED = ("UNEXPECTED_EOF_WHILE_READING", "SHUTDOWN_WHILE_IN_INIT", "APPLICATION_DATA_AFTER_CLOSE_NOTIFY")
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")


def handshake_error(error: ssl.SSLError, address: BrokerAddress) -> BrokerError:
    """The error for a TLS handshake that failed.

    Returns:
        A BrokerAuthError if trying again can't help, or helps only after somebody's change or once a clock is right
        (`BrokerAuthError.final`); else a BrokerError.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        advice = _ADVICE.get(error.verify_code, "give the broker a certificate of the cluster's CA").format(now=now)
        reason = error.verify_message.rstrip(". ")
        return BrokerAuthError(
            f"TLS with {address} failed: the broker's certificate is not accepted: {reason}: {advice}",
            final=error.verify_code != _NOT_YET_VALID,
        )
    if alert := alert_in(error.reason or ""):
        return refused_by_alert(alert, address)
    reason = (error.reason or "").upper()
    ended = isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)) or reason in _ENDED
    if ended:
        return BrokerError(
            f"{address} hung up during the TLS handshake: is the broker starting, or behind a forwarder?"
        )
    if reason in _NO_TLS:
        return BrokerAuthError(f"TLS with {address} failed: no TLS at this port ({reason}): is the port right?")
    return BrokerAuthError(f"TLS with {address} failed: {error.reason or error}")


def alert_in(text: str) -> str:
    """The alert in OpenSSL's reason or in a message that contains it, such as `unknown ca`; empty if there is none."""
    found = _ALERT.search(text)
    return found[1].replace("_", " ").lower() if found else ""


def refused_by_alert(alert: str, address: BrokerAddress) -> BrokerError:
    """The error for an alert by which the broker ended the connection (`alert_in`)."""
    if alert in _PASSING_ALERTS:
        return BrokerError(f"the broker at {address} ended the TLS handshake: {alert}")
    if advice := _CERTIFICATE_ALERTS.get(alert):
        return BrokerAuthError(f"the broker at {address} refused our certificate: {alert}: {advice}")
    whose = "our certificate" if "cert" in alert or alert in ("access denied", "decrypt error") else "TLS with us"
    return BrokerAuthError(f"the broker at {address} refused {whose}: {alert}")
