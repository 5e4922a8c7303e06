"""Bundles that somebody vouches for: an Ed25519 signature beside the manifest, whose id knows every byte of the bundle. Needs the `edge` extra."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pipeline.errors import BundleError, KeysError
from pipeline.files import atomic_write_text
from pipeline.runtime.bundle import Bundle

SIGNATURE = "manifest.sig"
_PURPOSE = b"coinfer bundle "  # so that a key used elsewhere too signs nothing there that would pass here


def sign(bundle: Bundle, key: Path) -> Path:
    """Sign `bundle` with the private key in the PEM file `key`; returns the file written, in the bundle's folder, whose other files stay as they are.

    Raises:
        KeysError: no private Ed25519 key without a password is in that file.
        CoinferError: the folder cannot be written.
    """
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except OSError as error:
        raise KeysError(f"{key} cannot be read ({error.strerror}); give a private Ed25519 key.") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeysError(f"{key} holds no private key that can sign; give an Ed25519 key in PEM, without a password.") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise KeysError(f"{key} is no Ed25519 key; make one with openssl genpkey -algorithm ed25519.")
    atomic_write_text(bundle.path / SIGNATURE, base64.b64encode(private.sign(_signed(bundle))).decode() + "\n")
    return bundle.path / SIGNATURE


class Signer:
    """Whoever has the private key to the public one in the PEM file `key`.

    Raises:
        KeysError: no public Ed25519 key is in that file.
    """

    def __init__(self, key: Path) -> None:
        self._path = key
        try:
            public = serialization.load_pem_public_key(key.read_bytes())
        except OSError as error:
            raise KeysError(f"{key} cannot be read ({error.strerror}); give a public Ed25519 key.") from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise KeysError(f"{key} holds no public key; give an Ed25519 one in PEM, as openssl pkey -pubout writes it.") from error
        if not isinstance(public, Ed25519PublicKey):
            raise KeysError(f"{key} is no Ed25519 key; give the public half of the key that signs.")
        self._key = public

    def check(self, bundle: Bundle) -> None:
        """Raises:
        BundleError: the signer did not sign `bundle` as it was loaded.
        """
        file = bundle.path / SIGNATURE
        try:
            self._key.verify(base64.b64decode(file.read_text("ascii").strip(), validate=True), _signed(bundle))
        except OSError as error:
            raise BundleError(f"{file} cannot be read ({error.strerror}); sign the bundle with `coinfer bundle sign`.") from error
        except (InvalidSignature, binascii.Error, UnicodeDecodeError) as error:
            raise BundleError(f"{file} is no signature of this bundle by the key to {self._path}; fetch the bundle again, or sign it.") from error


def _signed(bundle: Bundle) -> bytes:
    return _PURPOSE + str(bundle.manifest["bundle_id"]).encode()
