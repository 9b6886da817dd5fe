"""Signed bundles: an Ed25519 signature over manifest.json, which holds the hash of every other file.

`manifest.sig` is the plain 64-byte signature and keys are PEM files, so that stock tools check them too:

    openssl pkeyutl -verify -pubin -inkey key.pub -rawin -in manifest.json -sigfile manifest.sig
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resq_deploy.errors import BundleError, IntegrityError, MissingExtra

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SIGNATURE = "manifest.sig"

_LENGTH = 64
_KEY_LIMIT = 64 * 2**10
_MAKE = "make one with: resq keygen"


def generate_key(
    path: str | os.PathLike[str], passphrase: bytes | None = None
) -> tuple[Path, Path]:
    """Write a new private key to `path` (readable by its owner only) and its public half to `path`.pub.

    Both are PEM; the private one is encrypted where a passphrase is given. Raises BundleError where a file exists.
    """
    ed25519, s11n = _library()
    private = Path(path)
    public = private.with_name(private.name + ".pub")
    key = ed25519.Ed25519PrivateKey.generate()
    locked = s11n.BestAvailableEncryption(passphrase) if passphrase else s11n.NoEncryption()
    secret = key.private_bytes(s11n.Encoding.PEM, s11n.PrivateFormat.PKCS8, locked)
    shared = key.public_key().public_bytes(
        s11n.Encoding.PEM, s11n.PublicFormat.SubjectPublicKeyInfo
    )
    if public.exists():
        raise BundleError(f"{public} exists already", "choose another name")
    _create(private, secret, 0o600)
    _create(public, shared, 0o644)
    return private, public


def sign_bundle(
    bundle: str | os.PathLike[str], key: str | os.PathLike[str], passphrase: bytes | None = None
) -> Path:
    """Check a bundle, sign its manifest with a private key, and return the path of the signature.

    Raises BundleError for a key that cannot be used, IntegrityError for a bundle that is not whole.
    """
    from resq_deploy.bundle import MANIFEST, Bundle

    private = _private(Path(key), passphrase)
    opened = Bundle.open(bundle)
    target = opened.path / SIGNATURE
    part = target.with_name(f".{SIGNATURE}.part")
    try:
        part.write_bytes(private.sign((opened.path / MANIFEST).read_bytes()))
        os.replace(part, target)
    except OSError as error:
        raise BundleError(f"cannot write {target}: {error.strerror}") from error
    return target


def check_signature(content: bytes, signature: Path, key: str | os.PathLike[str]) -> None:
    """Check the signature file over `content` (the bytes of manifest.json) against a public key.

    Raises IntegrityError where it is missing or does not fit, BundleError for a file that is no public Ed25519 key.
    """
    public = _public(Path(key))
    from cryptography.exceptions import InvalidSignature

    given = _signature(signature)
    try:
        public.verify(given, content)
    except InvalidSignature as error:
        raise IntegrityError(
            f"{signature.parent} was not signed with the key {key}, or was changed afterwards",
            "do not use it; get the bundle again from who signed it",
        ) from error


def fingerprint(key: str | os.PathLike[str]) -> str:
    """sha256 (hex) of a public key's 32 raw bytes: what two people compare over the telephone."""
    import hashlib

    _, s11n = _library()
    raw = _public(Path(key)).public_bytes(s11n.Encoding.Raw, s11n.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()


def _signature(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise IntegrityError(
            f"{path.parent} is not signed: it has no {SIGNATURE}", "resq sign signs a bundle"
        )
    with path.open("rb") as file:
        given = file.read(_LENGTH + 1)
    if len(given) != _LENGTH:
        raise IntegrityError(f"{path} is not an Ed25519 signature", "sign the bundle again")
    return given


def _public(path: Path) -> Ed25519PublicKey:
    _, s11n = _library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = s11n.load_pem_public_key(_read(path))
    except (ValueError, TypeError, _unsupported()) as error:
        raise BundleError(f"{path} is not a public key in PEM", _MAKE) from error
    if not isinstance(key, Ed25519PublicKey):
        raise BundleError(f"{path} is not an Ed25519 key", _MAKE)
    return key


def _private(path: Path, passphrase: bytes | None) -> Ed25519PrivateKey:
    _, s11n = _library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = s11n.load_pem_private_key(_read(path), passphrase or None)
    except TypeError as error:
        raise BundleError(
            f"{path}: {'no ' if passphrase else 'a '}passphrase is needed", "see resq sign --help"
        ) from error
    except (ValueError, _unsupported()) as error:
        raise BundleError(
            f"{path} is not a private key in PEM, or the passphrase is wrong", _MAKE
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError(f"{path} is not an Ed25519 key", _MAKE)
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_KEY_LIMIT + 1)
    except OSError as error:
        raise BundleError(f"cannot read the key {path}: {error.strerror}", _MAKE) from error
    if len(content) > _KEY_LIMIT:
        raise BundleError(f"{path} is too large to be a key", _MAKE)
    return content


def _create(path: Path, content: bytes, mode: int) -> None:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
    except FileExistsError as error:
        raise BundleError(f"{path} exists already", "choose another name") from error
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error.strerror}") from error


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise MissingExtra("cryptography", "sign") from error
    return ed25519, serialization


def _unsupported() -> type[Exception]:
    from cryptography.exceptions import UnsupportedAlgorithm

    return UnsupportedAlgorithm
