"""The journal of a search: one JSON line for every finished trial, which survives whatever ends the search."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import CoinferError, ParamsError
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.pareto import Trial


class Journal:
    """The trials in the file `path`, made if need be; open it by `journal`.

    `trials` are those of earlier runs, in the order in which they finished. A last line that a power cut left unfinished is dropped.

    Raises:
        CoinferError: the file is damaged, or cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = path.read_bytes() if path.exists() else b""
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                with path.open("r+b") as file:
                    file.truncate(whole)
            self._file = path.open("ab")
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            self.trials = [_trial(line) for line in data[:whole].splitlines()]
            if len({trial.number for trial in self.trials}) < len(self.trials):
                raise ValueError("a trial twice")
        except (AttributeError, KeyError, TypeError, ValueError, ParamsError) as error:
            self._file.close()
            raise CoinferError(f"the search's journal {path} is damaged; delete {path.parent} and run again to search afresh.") from error

    def append(self, trial: Trial) -> None:
        """Add `trial`, on the disk when this returns.

        Raises:
            CoinferError: it cannot be written.
        """
        measured = None if trial.measurement is None else trial.measurement.to_dict()
        fields = {**vars(trial), "candidate": trial.candidate.to_dict(), "measurement": measured}
        try:
            self._file.write(json.dumps(fields).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was said by `append`
            self._file.close()


@contextmanager
def journal(path: Path) -> Iterator[Journal]:
    """Hold the journal's folder while it is open; the kernel lets go of it when the process dies, however it dies.

    Raises:
        CoinferError: another search holds it, or see `Journal`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = (path.parent / "lock").open("w")
    except OSError as error:
        raise _cannot_write(path, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CoinferError(f"another search is writing {path}; wait for it to end or stop it.") from None
        opened = Journal(path)
        try:
            yield opened
        finally:
            opened.close()


def _trial(line: bytes) -> Trial:
    fields = json.loads(line)
    measured = fields["measurement"]
    measurement = None if measured is None else Measurement(**measured)
    if measurement is None and not isinstance(fields["failure"], str):
        raise ValueError("neither a measurement nor a failure")
    return Trial(int(fields["number"]), Candidate.from_dict(fields["candidate"]), measurement, fields["duplicate_of"], fields["failure"])


def _cannot_write(path: Path, error: OSError) -> CoinferError:
    return CoinferError(f"cannot write {path}: {error.strerror or error}; free some space or check the permissions there, then run again.")
