"""A target of `benchmarks.runtime_fuzz` that fails in every way one can."""

import os
import time


class Traps:
    def __init__(self, folder):
        self.kept = []

    def generate(self, rng):
        return rng.randbytes(8), rng.random() < 0.5

    def check(self, data):
        kind = data[0] % 16
        if kind == 1:
            raise KeyError("a surprise")
        if kind == 2:
            os._exit(3)
        if kind == 3:
            time.sleep(60)
        if kind == 4:
            self.kept.append(b"\1" * (300 << 20))
        if kind == 5:
            bytes(1 << 40)
        return "answered" if kind % 2 else "refused"

    def close(self):
        pass
