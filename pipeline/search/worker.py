"""`python -m pipeline.search.worker`: evaluates trials for a driver, JSON lines in by stdin and out by stdout."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading

from pipeline.search.executor import Served


def main() -> None:
    """Answer until stdin ends, as it does when the driver dies; then a trial in progress is of no use any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver ends its workers in its own order
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not pass for a reply

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    served = Served(lines.get())
    print(served.ready(), file=replies, flush=True)
    while True:
        print(served.answer(lines.get()), file=replies, flush=True)


if __name__ == "__main__":
    main()
