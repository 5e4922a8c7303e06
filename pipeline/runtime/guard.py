"""Who belongs: keys of both sides, certificates each way and a token per device.

A side's keys are a folder with the names that Kubernetes gives TLS secrets: `ca.crt` (who may speak to it), `tls.crt` and `tls.key` (its own),
beside them the device's `token`, and at the edge `tokens`: a line `NAME SHA256` per device, read again as it changes. `coinfer keys` makes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import re
import ssl
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import KeysError
from pipeline.runtime.hello import DEVICE_NAME, Hello

AUTHORITY, CERTIFICATE, KEY, TOKEN, TOKENS = "ca.crt", "tls.crt", "tls.key", "token", "tokens"
Fingerprint = tuple[int, int, int]
_LINE = re.compile(rf"({DEVICE_NAME.pattern})\s+([0-9a-f]{{64}})", re.ASCII)


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine is reached at `host`; a name other than localhost is not asked for."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def digest(token: str) -> str:
    """What an edge keeps of a token, which has to be long and random."""
    return hashlib.sha256(token.encode()).hexdigest()


class Keys:
    """The keys of one side: `context` makes use of them."""

    def __init__(self, folder: Path, protocol: ssl._SSLMethod) -> None:
        self._folder = folder
        self.context = _context(folder, protocol)

    def pems(self) -> tuple[bytes, bytes, bytes]:
        """Key, certificate and authority, for who makes no use of `context`."""
        return _pems(self._folder)


class EdgeKeys(Keys):
    """The keys of an edge, and the devices that may ask it. Its certificate ends at `ends_s` (s since 1970).

    Raises:
        KeysError: one is missing or cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ssl.PROTOCOL_TLS_SERVER)
        self.context.num_tickets = 0  # a connection lasts; a ticket would only be bytes
        try:
            self.ends_s = _end_s(folder, shown_by_server=True)
        except ssl.SSLError as error:
            raise KeysError(f"no device would take {folder / CERTIFICATE} ({_reason(error)}); make another with `coinfer keys`.") from error
        self._tokens = folder / TOKENS
        self._seen = _fingerprint(self._tokens)
        self._names = token_names(self._tokens)

    def refuses(self, hello: Hello | None, certified: str) -> str | None:
        """Why a client that said this (None: nothing) and has a certificate of that common name may not ask; None if it may."""
        self._follow()
        if hello is None or not hello.token:
            return "this edge wants a token; give the device the keys that `coinfer keys` made for it."
        if (name := self._names.get(digest(hello.token))) is None:
            return "the token is none of this edge's; give the device the keys that `coinfer keys` made for it."
        if name != hello.device:
            return f"the token is {name}'s, not {hello.device or 'of a device without a name'}'s; give each device its own keys."
        if certified != name:
            return f"the certificate is that of {certified[:80]!r}, not of {name}; give each device its own keys."
        return None

    def _follow(self) -> None:
        if (found := _fingerprint(self._tokens)) == self._seen:
            return
        self._seen = found
        try:
            self._names = token_names(self._tokens)
        except KeysError as error:
            print(f"coinfer: the tokens stay as they were: {error}", file=sys.stderr, flush=True)


class DeviceKeys(Keys):
    """The keys of a device. It is warned of a certificate that no edge takes, for it can go on alone, and its clock may be set later.

    Raises:
        KeysError: one is missing or cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ssl.PROTOCOL_TLS_CLIENT)
        try:
            _end_s(folder, shown_by_server=False)
        except ssl.SSLError as error:
            print(f"coinfer: no edge will take {folder / CERTIFICATE} ({_reason(error)}); make another with `coinfer keys`.", file=sys.stderr, flush=True)
        try:
            self.device, _, self.token = (folder / TOKEN).read_text().strip().partition(" ")
        except (OSError, UnicodeDecodeError) as error:
            raise _unusable(folder / TOKEN, error) from error
        if not (DEVICE_NAME.fullmatch(self.device) and re.fullmatch(r"[!-~]+", self.token)):
            raise KeysError(f"{folder / TOKEN} holds no line NAME TOKEN; make the keys again with `coinfer keys`.")


def edge_keys(folder: Path | None, host: str) -> EdgeKeys | None:
    """The keys in `folder`, without which an edge listens on loopback only.

    Raises:
        KeysError: there are none, and `host` is no loopback address; or one cannot be used.
    """
    if folder is None and not is_loopback(host):
        raise KeysError(f"{host} is reached from other machines, which needs keys; give --keys, made by `coinfer keys`, or listen on 127.0.0.1.")
    return EdgeKeys(folder) if folder else None


def device_keys(folder: Path | None, host: str) -> DeviceKeys | None:
    """The keys in `folder`, without which a device asks edges on its own machine only.

    Raises:
        KeysError: there are none, and `host` is no loopback address; or one cannot be used.
    """
    if folder is None and not is_loopback(host):
        raise KeysError(f"{host} is another machine, which needs keys; give --keys, made by `coinfer keys`.")
    return DeviceKeys(folder) if folder else None


def _pems(folder: Path) -> tuple[bytes, bytes, bytes]:
    found = []
    for name in (KEY, CERTIFICATE, AUTHORITY):
        try:
            found.append((folder / name).read_bytes())
        except OSError as error:
            raise _unusable(folder / name, error) from error
    key, certificate, authority = found
    return key, certificate, authority


def token_names(path: Path) -> dict[str, str]:
    """Device by digest, of the edge's `tokens`.

    Raises:
        KeysError: the file cannot be read, or a line is none.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError as error:
        raise _unusable(path, error) from error
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); restore or remove it, and make the devices' keys again with `coinfer keys`."
        ) from error
    names = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            if not (found := _LINE.fullmatch(line.strip())):
                raise KeysError(f"{path}, line {number}, is no NAME SHA256; remove it, and make that device's keys again with `coinfer keys`.")
            names[found[2]] = found[1]
    return names


def _context(folder: Path, protocol: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    _pems(folder)
    try:
        _load(context, folder)
        context.load_verify_locations(folder / AUTHORITY)
    except (ssl.SSLError, ValueError) as error:
        raise KeysError(f"the keys in {folder} cannot be used ({_reason(error)}); make them again with `coinfer keys`.") from error
    return context


def _load(context: ssl.SSLContext, folder: Path) -> None:
    context.load_cert_chain(folder / CERTIFICATE, folder / KEY, password=lambda: b"")  # or it would be asked for on the terminal


def _end_s(folder: Path, *, shown_by_server: bool) -> float:
    """When its certificate ends (s since 1970). OpenSSL tells that of one that it has verified, so it is shown, in memory, to a side that trusts it.

    Raises:
        ssl.SSLError: it has ended, or not begun, or is for another use.
    """
    client, server = (ssl.SSLContext(protocol) for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER))
    verifier = client if shown_by_server else server
    for context in (client, server):
        context.check_hostname, context.verify_mode = False, ssl.CERT_REQUIRED if context is verifier else ssl.CERT_NONE
        _load(context, folder)
    verifier.load_verify_locations(folder / CERTIFICATE)
    verifier.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking, asked = client.wrap_bio(back, there), server.wrap_bio(there, back, server_side=True)
    for side in (asking, asked, asking, asked):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    found = (asking if shown_by_server else asked).getpeercert()
    assert found is not None
    return ssl.cert_time_to_seconds(str(found["notAfter"]))


def common_name(certificate: Mapping[str, Any]) -> str:
    """Whose a certificate is, of those that `ssl` has verified."""
    return next((value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"), "")


def _fingerprint(path: Path) -> Fingerprint | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ctime_ns, found.st_size, found.st_ino  # the time tells of new permissions too


def _unusable(path: Path, error: Exception) -> KeysError:
    return KeysError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); make the keys with `coinfer keys`, or check --keys.")


def _reason(error: Exception) -> str:
    return getattr(error, "verify_message", None) or getattr(error, "reason", None) or str(error)
