"""Signed bundles: an Ed25519 signature over the manifest, which lists the SHA-256 of every file."""

import base64
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from common.errors import KeyFileError
from common.files import atomic_write
from common.private_files import read_private
from wire.errors import SignatureError
from wire.manifest import SIGNATURE_NAME, Manifest, decode_manifest, read_manifest

_PREFIX = b"wdmoe-ed25519-v1 "
_CONTEXT = b"wdmoe bundle manifest v1\n"
_MOST_BYTES = 4096


def sign(manifest: bytes, bundle: Path, key: Path) -> Path:
    """Write the signature of a manifest's bytes into its bundle.

    Args:
        key: Ed25519 private key in PEM, mode 600.

    Returns:
        Path of the signature.

    Raises:
        KeyFileError: the key can't be read, or is not an Ed25519 private key.
        StorageError: the signature can't be written.
    """
    try:
        private = load_pem_private_key(read_private(key), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise KeyFileError(f"{key} is not an Ed25519 private key in PEM: 'wdmoe-testbed keys init' makes one")
    path = bundle / SIGNATURE_NAME
    with atomic_write(path) as file:
        file.write(_PREFIX + base64.b64encode(private.sign(_CONTEXT + manifest)) + b"\n")
    return path


def load_trusted_manifest(bundle: Path, key: Path | None) -> Manifest:
    """The manifest of a bundle folder; with a public key, only if it was signed with the private half.

    The signature is checked before the manifest is parsed.

    Raises:
        KeyFileError: the key can't be read, or is not an Ed25519 public key.
        SignatureError: the bundle is not signed with the private half of `key`.
        BundleError: there is no manifest, or it is not a valid one of a readable schema version.
    """
    raw = read_manifest(bundle)
    if key is not None:
        check_signature(raw, bundle, key)
    return decode_manifest(raw, bundle)


def check_signature(manifest: bytes, bundle: Path, key: Path) -> None:
    """Make sure that a manifest's bytes were signed with the private half of `key`.

    Raises:
        KeyFileError: the key can't be read, or is not an Ed25519 public key.
        SignatureError: there is no signature, or it is not one of these bytes with this key.
    """
    try:
        public = load_pem_public_key(key.read_bytes())
    except OSError as error:
        raise KeyFileError(f"can't read {key}: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        public = None
    if not isinstance(public, Ed25519PublicKey):
        raise KeyFileError(f"{key} is not an Ed25519 public key in PEM")
    path = bundle / SIGNATURE_NAME
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES)
    except FileNotFoundError:
        raise SignatureError(f"{bundle} is not signed (no {SIGNATURE_NAME}): 'wdmoe-export sign' signs it") from None
    except OSError as error:
        raise SignatureError(f"can't read {path}: {error.strerror}") from None
    try:
        if not raw.startswith(_PREFIX):
            raise ValueError
        public.verify(base64.b64decode(raw[len(_PREFIX) :].strip(), validate=True), _CONTEXT + manifest)
    except (ValueError, InvalidSignature):
        raise SignatureError(
            f"{bundle} was not signed with the private half of {key}, or its manifest was changed since"
        ) from None
