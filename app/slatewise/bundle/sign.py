"""`slatewise sign`: makes a key, or signs bundles for servers with SLATEWISE_BUNDLE_KEYS.

Called by: cli.py. Calls: signature.py, and loader.py: only a bundle that can be served is signed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from slatewise.bundle.loader import check_files, check_variant_files
from slatewise.bundle.manifest import ManifestError, bundle_folder, read_manifest
from slatewise.bundle.signature import SIGNATURE, SignatureFault, public_text, read_private_key


def main(argv: Sequence[str]) -> None:
    """Raises ManifestError for a bundle whose files are not those of its manifest, and SignatureFault."""
    parser = argparse.ArgumentParser(
        "slatewise sign",
        description="Sign bundles with an Ed25519 key. The server loads only signed ones if SLATEWISE_BUNDLE_KEYS has "
        "the public key, which is printed.",
    )
    parser.add_argument("key", type=Path, metavar="KEY", help="file of the private key, in PEM")
    parser.add_argument("bundles", type=Path, nargs="*", metavar="BUNDLE", help="a bundle, or a ranker's folder")
    parser.add_argument("--new-key", action="store_true", help="make the key; the file must not exist")
    arguments = parser.parse_args(argv)
    if arguments.new_key:
        write_new_key(arguments.key)
    key = read_private_key(arguments.key)
    for path in arguments.bundles:
        folder = bundle_folder(path)
        content = (folder / "manifest.json").read_bytes()
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        for variant in manifest.variants:
            check_variant_files(folder, manifest, variant)
        if (folder / "manifest.json").read_bytes() != content:
            raise ManifestError(f"{folder}: manifest.json changed meanwhile")
        draft = folder / f".{SIGNATURE}"
        draft.write_bytes(key.sign(content))
        draft.replace(folder / SIGNATURE)
        print(f"signed {folder}")
    print(f"SLATEWISE_BUNDLE_KEYS={public_text(key)}")


def write_new_key(path: Path) -> None:
    """Write a new private key, readable by its owner alone. Raises SignatureFault if the file exists."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise SignatureFault(f"{path} exists: a key is not overwritten") from None
    with open(descriptor, "wb") as file:
        file.write(pem)
