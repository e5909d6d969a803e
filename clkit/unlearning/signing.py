"""Signing certificates with an Ed25519 key (``pip install 'clkit[signing]'``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from clkit.errors import RequestError
from clkit.files import disk_errors


def new_key(path: Path) -> str:
    """Make a private key file (PEM, readable by its owner only); returns the public key, hexadecimal.

    Raises:
        RequestError: the file exists, or ``cryptography`` is missing.
    """
    key = _ed25519().Ed25519PrivateKey.generate()
    serialization = _serialization()
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise RequestError(f"{path}: exists already; a key is never written over. Choose another name.") from error
    except OSError as error:
        raise RequestError(f"{path}: can't be written ({error.strerror})") from error
    with disk_errors(path), os.fdopen(descriptor, "wb") as file:
        file.write(text)
    return _public(key)


def load_key(path: Path) -> Any:
    """A private key file.

    Raises:
        RequestError: it can't be read, or is not an Ed25519 key without a password.
    """
    kind, serialization = _ed25519().Ed25519PrivateKey, _serialization()
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise RequestError(
            f"{path}: can't be read as a private key ({type(error).__name__}); make one with --new-key"
        ) from error
    if not isinstance(key, kind):
        raise RequestError(f"{path}: is not an Ed25519 key; make one with --new-key")
    return key


def sign(key: Any, digest: str) -> dict[str, str]:
    """The signature of a certificate's digest, as it stands in the certificate."""
    return {"algorithm": "Ed25519", "public_key": _public(key), "value": key.sign(_message(digest)).hex()}


def holds(signature: Any, digest: str) -> bool:
    """Whether a signature is one of that digest by the key that it names."""
    from cryptography.exceptions import InvalidSignature

    try:
        public = _ed25519().Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature["public_key"]))
        public.verify(bytes.fromhex(signature["value"]), _message(digest))
    except (InvalidSignature, ValueError, KeyError, TypeError):
        return False
    return bool(signature.get("algorithm") == "Ed25519")


def _message(digest: str) -> bytes:
    return f"clkit deletion certificate {digest}".encode()


def _public(key: Any) -> str:
    raw: bytes = key.public_key().public_bytes_raw()
    return raw.hex()


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise RequestError("signatures need cryptography: pip install 'clkit[signing]'") from error
    return ed25519


def _serialization() -> Any:
    from cryptography.hazmat.primitives import serialization

    return serialization
