"""What a network that sends its symbols uncoded answers over a noisy channel, level by level, beside quantised amplitudes (PAM)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models.channels import awgn
from models.coinference import CoInference
from models.jscc import AwgnCodec, ChannelCodec
from pipeline.data import Split
from pipeline.inference import outputs

DECIBELS = (0.0, 2.5, 5.0, 7.5, 10.0, 12.5, 15.0, 17.5, 20.0, 22.5, 25.0)
PROBABILITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)
PAM_BITS = (1, 2, 3, 4)
DRAWS = 3
BATCH = 500


def sigma(decibels: float) -> float:
    """Of noise that leaves a PSNR of `decibels` at peak 1."""
    return float(10 ** (-decibels / 20))


def over_noise(network: CoInference, split: Split) -> dict[str, Any]:
    """Accuracy of a jscc `network` at the least noisy level, and at every level of its channel by the level's name; for AWGN as PAM of 1 to 4 bits too."""
    codec = network.codec
    assert isinstance(codec, ChannelCodec)
    features = outputs(network.head, split[0])
    analogue = isinstance(codec, AwgnCodec)
    levels = {f"{level:g}": sigma(level) if analogue else level for level in (DECIBELS if analogue else PROBABILITIES)}
    found: dict[str, Any] = {"analogue" if analogue else "bits": {}}
    if analogue:
        found |= {f"pam {bits}": {} for bits in PAM_BITS}
    for name, noise in levels.items():
        codec.at(noise)

        def answer(part: Tensor, noise: float = noise) -> Tensor:
            logits: Tensor = network.tail(codec(part).decoded)
            return logits

        found["analogue" if analogue else "bits"][name] = _accuracy(features, split[1], answer)
        for bits in PAM_BITS if analogue else ():

            def quantised(part: Tensor, noise: float = noise, bits: int = bits) -> Tensor:
                codec(part)  # notes the level for the encoder
                logits: Tensor = network.tail(codec.decode(pam(codec.encode(part), bits, noise)))
                return logits

            found[f"pam {bits}"][name] = _accuracy(features, split[1], quantised)
    clean = max(DECIBELS) if analogue else min(PROBABILITIES)
    return {"accuracy": found["analogue" if analogue else "bits"][f"{clean:g}"], **found}


def pam(u: Tensor, bits: int, noise: float) -> Tensor:
    """u in [0, 1] as 2^bits amplitudes of the same peak over AWGN, each received as the nearest amplitude."""
    top = 2**bits - 1
    received = awgn(torch.round(u * top) / top, noise)
    return torch.round(received.clamp(0, 1) * top) / top


@torch.no_grad()
def _accuracy(features: Tensor, labels: Tensor, answer: Callable[[Tensor], Tensor]) -> float:
    torch.manual_seed(0)
    right = 0
    for _ in range(DRAWS):
        for part, truth in zip(torch.split(features, BATCH), torch.split(labels, BATCH), strict=True):
            right += int((answer(part).argmax(1) == truth).sum())
    return right / (DRAWS * len(labels))
