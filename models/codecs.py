"""Every codec by the name that `search.codecs` and `CodecSpec.kind` give it."""

from __future__ import annotations

from collections.abc import Sequence

from models.baseline_codecs import BottleNetCodec, PublicCodeCodec, PublicVectorCodec, RawByteCodec, RawFloatCodec
from models.codec import CodebookCodec, CodecSpec, FeatureCodec, MultiRateCodec, RateCodec, UniformCodec
from models.jscc import AwgnCodec, BitFlipCodec, ErasureCodec
from pipeline.errors import ModelError

_OURS = (UniformCodec, CodebookCodec, RateCodec, MultiRateCodec, AwgnCodec, ErasureCodec, BitFlipCodec)
_BASELINES = (RawFloatCodec, RawByteCodec, BottleNetCodec, PublicCodeCodec, PublicVectorCodec)

CODECS: dict[str, type[FeatureCodec]] = {codec.kind: codec for codec in (*_OURS, *_BASELINES)}


def build_codec(spec: CodecSpec, shape: Sequence[int], restored_channels: int | None = None) -> FeatureCodec:
    """The codec `spec` describes for a feature of `shape`, untrained.

    Raises:
        ModelError: an unknown kind, or one that does not fit the feature.
    """
    if spec.kind not in CODECS:
        raise ModelError(f"codec: kind is {spec.kind}; choose one of {', '.join(CODECS)}.")
    return CODECS[spec.kind](spec, shape, restored_channels)
