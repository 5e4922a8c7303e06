"""Makes the keys of an edge and its devices (see `guard`); needs the `edge` extra."""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pipeline.errors import KeysError
from pipeline.files import atomic_path
from pipeline.runtime.guard import AUTHORITY, CERTIFICATE, KEY, TOKEN, TOKENS, digest, token_names
from pipeline.runtime.hello import DEVICE_NAME

EDGE, AUTHORITY_KEY = "edge", "ca.key"
TAKEN = (EDGE, AUTHORITY_KEY, AUTHORITY)  # by what is no device in the folder of all keys
AUTHORITY_DAYS = 3650
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
ALWAYS = ("localhost", "127.0.0.1", "::1")  # an edge is tried on its own machine, and behind a relay, under these names


def make_keys(folder: Path, edge: Sequence[str], devices: Sequence[str], days: int = 730) -> list[Path]:
    """Write the keys of an edge that is reached under the names or addresses `edge` to `folder`/edge, and of each device to `folder`/NAME.

    What is there is kept: the authority, the edge where `edge` is empty, other devices. A device that is there gets new keys and a new token.
    Returns the folders written, each to be copied to its machine.

    Raises:
        KeysError: a name that cannot be used, nothing to make, or an authority or a list of tokens that is broken; nothing is written then.
        CoinferError: `folder` cannot be written.
    """
    for name in devices:
        if not DEVICE_NAME.fullmatch(name) or name in TAKEN:
            raise KeysError(f"a device cannot be called {name[:80]!r}; give up to 64 letters, digits and _.- other than {', '.join(TAKEN)}.")
    if not edge and not devices:
        raise KeysError("there are no keys to make; say with --edge under which name or address devices reach the edge, or name a device with --device.")
    if not edge and not os.path.exists(folder / EDGE / CERTIFICATE):
        raise KeysError(f"{folder} has no keys of an edge yet; say with --edge under which name or address devices reach it.")
    names = [_general_name(name) for name in dict.fromkeys((*edge, *ALWAYS))]
    tokens = folder / EDGE / TOKENS
    known = {name: kept for kept, name in token_names(tokens).items()} if os.path.lexists(tokens) else {}
    authority = _authority(folder)
    written = []
    if edge:
        _signed(folder / EDGE, authority, edge[0], ExtendedKeyUsageOID.SERVER_AUTH, names, days)
        written.append(folder / EDGE)
    for device in devices:
        token = secrets.token_urlsafe(32)
        _signed(folder / device, authority, device, ExtendedKeyUsageOID.CLIENT_AUTH, [], days)
        _write(folder / device / TOKEN, f"{device} {token}\n".encode())
        known[device] = digest(token)
        written.append(folder / device)
    _write(tokens, "".join(f"{name} {kept}\n" for name, kept in sorted(known.items())).encode())
    return written


Authority = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def _authority(folder: Path) -> Authority:
    try:
        key = serialization.load_pem_private_key((folder / AUTHORITY_KEY).read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / AUTHORITY).read_bytes())
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ValueError("key and certificate are not of one pair")
        return certificate, key
    except (OSError, ValueError, TypeError) as error:
        if os.path.lexists(folder / AUTHORITY_KEY) or os.path.lexists(folder / AUTHORITY):
            raise KeysError(f"the authority in {folder} cannot be used ({error}); restore it, or begin anew in another folder.") from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"coinfer {secrets.token_hex(4)}")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = _builder(name, key.public_key(), AUTHORITY_DAYS).issuer_name(name)
    builder = builder.add_extension(x509.BasicConstraints(True, 0), True).add_extension(usage, True)
    certificate = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False).sign(key, hashes.SHA256())
    _write(folder / AUTHORITY_KEY, _pem(key))
    _write(folder / AUTHORITY, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate, key


def _signed(folder: Path, authority: Authority, common_name: str, use: x509.ObjectIdentifier, names: Sequence[x509.GeneralName], days: int) -> None:
    certificate, key = authority
    own = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])]), own.public_key(), days).issuer_name(certificate.subject)
    builder = builder.add_extension(x509.BasicConstraints(False, None), True).add_extension(x509.ExtendedKeyUsage([use]), False)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    _write(folder / KEY, _pem(own))
    _write(folder / CERTIFICATE, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    _write(folder / AUTHORITY, certificate.public_bytes(serialization.Encoding.PEM))


def _builder(name: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(subject_name=name, public_key=key, serial_number=x509.random_serial_number())
    early = now - datetime.timedelta(days=1)  # a device's clock may be behind
    return builder.not_valid_before(early).not_valid_after(now + datetime.timedelta(days=days))


def _general_name(name: str) -> x509.GeneralName:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        pass
    else:
        if address.is_unspecified:
            raise KeysError(f"{name} is where an edge listens, not where devices reach it; give a name or address of its machine.")
        return x509.IPAddress(address)
    try:
        ascii_name = name.encode("idna").decode()
    except UnicodeError:
        ascii_name = ""
    if not _HOST.fullmatch(ascii_name):
        raise KeysError(f"{name[:80]!r} is no name or address of a machine; give one without a port.")
    return x509.DNSName(ascii_name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _write(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.unlink(missing_ok=True)  # of a run that was killed; whoever has it open would read the next one too
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
