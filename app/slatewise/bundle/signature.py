"""Signatures of bundles: Ed25519 over the bytes of manifest.json, which has the digest of every other file.

`manifest.json.sig` holds the 64 bytes of the signature, as OpenSSL makes and checks them:

    openssl pkeyutl -sign -rawin -inkey private.pem -in manifest.json -out manifest.json.sig
    openssl pkeyutl -verify -rawin -pubin -inkey public.pem -in manifest.json -sigfile manifest.json.sig

Called by: `manifest.py`, when keys are set; `sign.py`. Calls: cryptography (extra `signing`).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "manifest.json.sig"


class SignatureFault(ValueError):
    """A key cannot be used, or a bundle is not signed by one of the keys. The message holds no private key."""


class PublicKeys:
    """The keys whose signatures are trusted; false if there are none, and then nothing is checked.

    Each is the base64 text between the first and the last line of the key's PEM file.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """Raises SignatureFault."""
        self.keys = [read_public_key(text) for text in texts]

    def __bool__(self) -> bool:
        return bool(self.keys)

    def check(self, folder: Path, manifest: bytes) -> None:
        """Raise SignatureFault unless the signature in `folder` is one of `manifest` by one of the keys."""
        from cryptography.exceptions import InvalidSignature

        try:
            signature = (folder / SIGNATURE).read_bytes()
        except OSError as error:
            reason = f"is not signed: no {SIGNATURE} ({error.strerror})"
            raise SignatureFault(f"{reason}, and SLATEWISE_BUNDLE_KEYS asks for one") from None
        for key in self.keys:
            try:
                return key.verify(signature, manifest)
            except InvalidSignature:
                pass
        raise SignatureFault(f"{SIGNATURE} is not by one of the {len(self.keys)} keys in SLATEWISE_BUNDLE_KEYS")


def read_public_key(text: str) -> Ed25519PublicKey:
    """Raises SignatureFault."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        key = load_der_public_key(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureFault("not the base64 text of an Ed25519 public key, which begins with MCowBQYDK2Vw")
    return key


def public_text(key: Ed25519PrivateKey) -> str:
    """Return the public key of a private one, as `PublicKeys` takes it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return base64.b64encode(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a PEM file without a passphrase. Raises SignatureFault."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise SignatureFault(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SignatureFault(f"{path} is not a private key in PEM, without a passphrase") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureFault(f"{path} is not an Ed25519 key")
    return key
