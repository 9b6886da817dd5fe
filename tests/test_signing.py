"""Signed bundles: made and checked, here and by openssl, and refused after any change."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resq_deploy import signing
from resq_deploy.bundle import Bundle
from resq_deploy.errors import BundleError, IntegrityError
from tests.test_bundle import write

PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, Path]:
    """A signed bundle, and the public key."""
    private, public = signing.generate_key(tmp_path / "key")
    bundle = write(tmp_path / "m.resq").path
    signing.sign_bundle(bundle, private)
    return bundle, public


def test_a_signed_bundle_opens_with_its_key(signed: tuple[Path, Path]) -> None:
    bundle, public = signed
    assert Bundle.open(bundle, key=public).manifest == Bundle.open(bundle).manifest
    assert (bundle / "manifest.sig").stat().st_size == 64


def test_a_private_key_is_for_its_owner_only(tmp_path: Path) -> None:
    private, public = signing.generate_key(tmp_path / "key")
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    assert public.name == "key.pub"
    assert len(signing.fingerprint(public)) == 64


def test_another_key_is_refused(signed: tuple[Path, Path], tmp_path: Path) -> None:
    _, other = signing.generate_key(tmp_path / "other")
    with pytest.raises(IntegrityError, match="was not signed with"):
        Bundle.open(signed[0], key=other)


def test_a_bundle_without_a_signature_is_refused(signed: tuple[Path, Path]) -> None:
    (signed[0] / "manifest.sig").unlink()
    with pytest.raises(IntegrityError, match="not signed"):
        Bundle.open(signed[0], key=signed[1])
    Bundle.open(signed[0])


@pytest.mark.parametrize("content", [b"", b"\0" * 63, b"\0" * 65, b"\0" * 10**6])
def test_a_signature_of_another_length_is_refused(
    signed: tuple[Path, Path], content: bytes
) -> None:
    (signed[0] / "manifest.sig").write_bytes(content)
    with pytest.raises(IntegrityError, match="not an Ed25519 signature"):
        Bundle.open(signed[0], key=signed[1])


def test_a_linked_signature_is_refused(signed: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.move(signed[0] / "manifest.sig", tmp_path / "sig")
    (signed[0] / "manifest.sig").symlink_to(tmp_path / "sig")
    with pytest.raises(IntegrityError, match="not signed"):
        Bundle.open(signed[0], key=signed[1])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.booleans())
def test_one_flipped_bit_of_manifest_or_signature_is_refused_before_parsing(
    signed: tuple[Path, Path], place: float, bit: int, which: bool
) -> None:
    bundle, public = signed
    path = bundle / ("manifest.json" if which else "manifest.sig")
    good = path.read_bytes()
    bad = bytearray(good)
    bad[int(place * len(bad))] ^= 1 << bit
    path.write_bytes(bytes(bad))
    try:
        with pytest.raises(IntegrityError, match="was not signed with"):
            Bundle.open(bundle, key=public)
    finally:
        path.write_bytes(good)


def test_a_changed_file_of_a_signed_bundle_is_refused(signed: tuple[Path, Path]) -> None:
    path = signed[0] / "eval.npz"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match=r"eval\.npz"):
        Bundle.open(signed[0], key=signed[1])
    with pytest.raises(IntegrityError, match=r"eval\.npz"):
        signing.sign_bundle(signed[0], signed[1].with_suffix(""))


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    private, public = signing.generate_key(tmp_path / "key", b"secret")
    bundle = write(tmp_path / "m.resq").path
    for wrong, says in ((None, "a passphrase is needed"), (b"wrong", "passphrase is wrong")):
        with pytest.raises(BundleError, match=says):
            signing.sign_bundle(bundle, private, wrong)
    signing.sign_bundle(bundle, private, b"secret")
    Bundle.open(bundle, key=public)


def test_a_passphrase_for_an_open_key_is_refused(tmp_path: Path) -> None:
    private, _ = signing.generate_key(tmp_path / "key")
    with pytest.raises(BundleError, match="no passphrase is needed"):
        signing.sign_bundle(write(tmp_path / "m.resq").path, private, b"secret")


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    private, public = signing.generate_key(tmp_path / "key")
    for leftover in (private, public):
        before = leftover.read_bytes()
        with pytest.raises(BundleError, match="exists already"):
            signing.generate_key(tmp_path / "key")
        assert leftover.read_bytes() == before
    public.unlink()
    with pytest.raises(BundleError, match="exists already"):
        signing.generate_key(tmp_path / "key")
    with pytest.raises(BundleError, match="cannot write"):
        signing.generate_key(tmp_path / "nowhere" / "key")


def _elliptic() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return key.public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _der() -> bytes:
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    return key.public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read the key"),
        (b"", "not a public key"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not a public key"),
        (b"x" * 10**6, "too large"),
        (_elliptic(), "not an Ed25519 key"),
        (_der(), "not a public key"),
    ],
    ids=["missing", "empty", "no key in it", "large", "another algorithm", "not text"],
)
def test_what_is_no_public_key_is_refused(
    signed: tuple[Path, Path], tmp_path: Path, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "odd").write_bytes(content)
    with pytest.raises(BundleError, match=says):
        Bundle.open(signed[0], key=tmp_path / "odd")


def test_a_public_key_cannot_sign(signed: tuple[Path, Path]) -> None:
    with pytest.raises(BundleError, match="not a private key"):
        signing.sign_bundle(signed[0], signed[1])


def test_openssl_agrees(signed: tuple[Path, Path]) -> None:
    bundle, public = signed
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    command += ["-in", str(bundle / "manifest.json"), "-sigfile", str(bundle / "manifest.sig")]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    with (bundle / "manifest.json").open("ab") as file:
        file.write(b" ")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0
