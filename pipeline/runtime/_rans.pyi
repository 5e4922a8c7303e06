from numpy import int16, int32, uint8, uint16, uint32
from numpy.typing import NDArray

def encode(
    symbols: bytes,
    freqs: NDArray[uint16],
    starts: NDArray[uint16],
    slots: NDArray[uint16],
    weights: NDArray[int16],
    biases: NDArray[int32],
    centres: NDArray[uint8],
    plane: int,
    levels: int,
    precision: int,
    width: int,
    contexts: int,
) -> bytes: ...
def decode(
    payload: bytes,
    freqs: NDArray[uint16],
    entries: NDArray[uint32],
    weights: NDArray[int16],
    biases: NDArray[int32],
    centres: NDArray[uint8],
    plane: int,
    levels: int,
    precision: int,
    width: int,
    contexts: int,
) -> bytes: ...
