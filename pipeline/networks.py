"""The network that a candidate describes, on a backbone's weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from models.channel_plan import ChannelPlan
from models.codec import CodecSpec
from models.coinference import CoInference, build_split
from models.cutting import CutPoint
from models.pruning import Pruner
from pipeline.params import Codec
from pipeline.runtime.coder import CodecTables, build_embedded_tables, build_tables, entropy_bits, fits_contexts
from pipeline.runtime.context import fit_contexts
from pipeline.search.candidate import OUTPUT, Candidate

HELD_BACK = 10


def layers_up_to(cuts: Sequence[CutPoint], cut: str) -> dict[str, tuple[str, ...]]:
    """Block -> its layers, for the blocks on the device side of `cut`, in order: what a `Pruner` takes."""
    names = [point.name for point in cuts]
    return {point.name: point.layers for point in cuts[1 : names.index(cut) + 1]}


def pruner(head: nn.Module, example: Tensor, cuts: Sequence[CutPoint], cut: str, channel_block: int) -> Pruner:
    """What chooses the channels of `head`, the device half up to `cut`. The cut's own may go too, unless they are logits: a codec follows.

    Raises:
        ModelError: Torch-Pruning cannot follow the half.
    """
    return Pruner(head, example, layers_up_to(cuts, cut), channel_block, cut_channels=cut != OUTPUT)


def codec_spec(candidate: Candidate, settings: Codec | None = None) -> CodecSpec:
    """The codec of a split `candidate`; `settings` only matter while it is trained."""
    assert candidate.codec is not None
    assert candidate.code_channels is not None
    assert candidate.stride is not None
    assert candidate.bits is not None
    size = candidate.code_channels, candidate.stride, candidate.bits
    settings = settings or Codec()
    low, high = settings.noise
    return CodecSpec(candidate.codec, *size, candidate.rate_weight or 0.0, settings.commitment, (low, high), candidate.points)


def tables_of(candidate: Candidate, symbols: NDArray[np.uint8]) -> tuple[CodecTables, ...]:
    """The coder's tables of a split `candidate`, one for each operating point, from `symbols` uint8 (N, h, H, W) of its device half."""
    assert candidate.bits is not None
    if candidate.points:
        return tuple(build_embedded_tables(symbols, *point) for point in candidate.points)
    return (coder_tables(symbols, candidate.bits),)


def coder_tables(symbols: NDArray[np.uint8], bits: int) -> CodecTables:
    """Tables for `symbols` uint8 (N, h, H, W), with contexts if those shorten what was held back for that question, a tenth of the images.

    Raises:
        BundleError: no symbols, or `bits` they do not fit.
    """
    if not symbols.size or not fits_contexts(symbols.shape[1], bits):
        return build_tables(symbols, bits)
    held_back = max(1, len(symbols) // HELD_BACK)
    kept, probe = (symbols[:-held_back], symbols[-held_back:]) if len(symbols) > 1 else (symbols, symbols)
    tried = [build_tables(kept, bits, model) for model in (fit_contexts(kept), None)]
    best = min(tried, key=lambda tables: sum(entropy_bits(code, tables) for code in probe))
    return build_tables(symbols, bits, best.model)


def split_network(backbone: nn.Module, example: Tensor, candidate: Candidate, plan: ChannelPlan | None = None, settings: Codec | None = None) -> CoInference:
    """`backbone` cut, pruned by `plan` and with a fresh codec, as a split `candidate` says; see `build_split` and `codec_spec`.

    Raises:
        ModelError: an unknown cut, a plan of another network, or a codec that does not fit the feature at the cut.
    """
    return build_split(backbone, example, candidate.cut, codec_spec(candidate, settings), plan)
