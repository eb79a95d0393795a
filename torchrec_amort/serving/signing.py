"""Signatures of packages: whether one of whom we trust has made them, which checksums alone do not tell.

What is signed, with Ed25519, is `manifest.json`, byte by byte, and it has the checksums of all other files. The
signature lies beside it in `manifest.sig`, as its 64 bytes: `openssl pkeyutl` makes and verifies such files, too. Of a
delta it is `delta.json`, and its signature is in `delta.sig`.
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from torchrec_amort.errors import InputError, one_line
from torchrec_amort.serving.package import DELTA_FILE

_BEGIN = b"-----BEGIN "


def read_signing_key(path: str | Path) -> Ed25519PrivateKey:
    """The key that signs.

    Args:
        path: PEM file of an Ed25519 private key without passphrase.

    Raises:
        InputError: it cannot be read, or is another kind of key.
    """
    try:
        key = load_pem_private_key(Path(path).read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"signing_key: {path}: not a PEM file of a private key without passphrase ({one_line(error)}): make one "
            "with openssl genpkey -algorithm ed25519 -out KEY.pem"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(
            f"signing_key: {path}: is of another algorithm ({type(key).__name__}): make one with openssl genpkey "
            "-algorithm ed25519 -out KEY.pem"
        )
    return key


def read_trusted_keys(path: str | Path) -> list[Ed25519PublicKey]:
    """The keys of whom we trust.

    Args:
        path: PEM file of one Ed25519 public key or several, one after the other.

    Raises:
        InputError: it cannot be read, has no key, or has anything else than such keys.
    """
    try:
        blocks = Path(path).read_bytes().split(_BEGIN)[1:]
        keys = [load_pem_public_key(_BEGIN + block) for block in blocks]
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"trusted_key: {path}: not a PEM file of public keys alone ({one_line(error)}): make each with openssl "
            "pkey -in KEY.pem -pubout"
        ) from error
    trusted = [key for key in keys if isinstance(key, Ed25519PublicKey)]
    if not keys or len(trusted) < len(keys):
        kinds = ", ".join(type(key).__name__ for key in keys) or "none"
        raise InputError(
            f"trusted_key: {path}: its public keys have to be of Ed25519, one at least, but there are: {kinds}: make "
            "each with openssl pkey -in KEY.pem -pubout"
        )
    return trusted


def sign(path: Path, key: Ed25519PrivateKey) -> None:
    """Sign a package or a delta, in place of a signature that is there.

    Args:
        path: of the manifest, or of `delta.json`, in its last form.
        key: whose public key those have who are to trust it.
    """
    _signature_of(path).write_bytes(key.sign(path.read_bytes()))


def refuse_unsigned(signed: Path, content: bytes, trusted_key: str | Path) -> None:
    """Refuse a package or a delta that nobody has signed whom we trust.

    Args:
        signed: path of the manifest, or of `delta.json`.
        content: the bytes of it that are acted on: the file may be another one by now.
        trusted_key: see `read_trusted_keys`.

    Raises:
        InputError: there is no signature, or none of these keys has made it for these bytes; or as
            `read_trusted_keys`.
    """
    keys = read_trusted_keys(trusted_key)
    path = _signature_of(signed)
    if not path.is_file():
        kind = "delta" if signed.name == DELTA_FILE else "package"
        raise InputError(
            f"{path}: no such file: the {kind} is not signed, and a key of {trusted_key} has to have signed it: "
            "export it with signing_key"
        )
    signature = path.read_bytes()
    if not any(_has_signed(key, signature, content) for key in keys):
        raise InputError(
            f"{path}: none of the {len(keys)} keys of {trusted_key} has signed this {signed.name}: one of the two "
            "files was changed, or another key has signed: do not serve it; export it with a key that is trusted"
        )


def _signature_of(signed: Path) -> Path:
    return signed.with_suffix(".sig")


def _has_signed(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True
