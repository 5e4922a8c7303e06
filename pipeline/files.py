"""Writing files whole or not at all, and reading JSON with a sentence when it is missing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import CoinferError


def _cannot_write(path: Path, error: OSError) -> CoinferError:
    return CoinferError(f"cannot write {path}: {error.strerror or error}; free some space or check the permissions there, then run again.")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` that becomes `path` when the block ends well and vanishes otherwise.

    Raises:
        CoinferError: the folder cannot be written or has no space left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` whole or not at all."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path, value: Any) -> None:
    """Write `value` as stable JSON (sorted keys) to `path` whole or not at all; NaN is refused."""
    atomic_write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that replaces `path` when the block ends well.

    Raises:
        CoinferError: the folder cannot be written or has no space left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        temporary.chmod(0o755)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path, what: str) -> Any:
    """The JSON in `path`; `what` names it in the message.

    Raises:
        CoinferError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CoinferError(f"{what} {path} is missing; run `dvc repro` to make it.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CoinferError(f"{what} {path} cannot be read ({error}); delete it and run `dvc repro` again.") from error
