"""The weights that trials start from instead of training their own: for each cut one slimmable codec and tail, and one network that bears pruning."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from models.channel_plan import ChannelPlan, rebuild, silenced
from models.coinference import CoInference
from models.cutting import split
from models.slimmable import SlimmableCodec
from pipeline.errors import CoinferError
from pipeline.networks import codec_spec
from pipeline.search.candidate import OUTPUT, Candidate
from pipeline.search.problem import Problem


class SplitSupernet(nn.Module):
    """All codecs that the space of `problem` has at `cut`, kind by kind, and one edge half for them: feature (B, C, H, W) -> logits (B, classes)."""

    def __init__(self, problem: Problem, cut: str) -> None:
        super().__init__()
        point = next(point for point in problem.cuts if point.name == cut)
        kinds = itertools.groupby(problem.specs(cut), lambda spec: spec.kind)
        self.codecs = nn.ModuleDict({kind: SlimmableCodec(list(specs), point.shape) for kind, specs in kinds})
        self.tail = copy.deepcopy(split(problem.backbone, problem.example, cut)[1])

    def codec(self, kind: str) -> SlimmableCodec:
        """What all codecs of `kind`, one of `codecs`, are taken from."""
        codec = self.codecs[kind]
        assert isinstance(codec, SlimmableCodec)
        return codec


def pruned_output(network: nn.Module, plan: ChannelPlan, images: Tensor) -> Tensor:
    """What `network` makes of `images` with the channels silenced that `plan` leaves out; in the mode it is in, with gradients for what is left."""
    made: Tensor = functional_call(network, silenced(network, plan), (images,))
    return made


class Supernet:
    """What the stage `supernet` trained for `problem`, as the networks that its candidates describe.

    `splits` holds a network for each cut with codecs; `body` is the whole backbone, trained with any of its channels silenced, or None where nothing can
    be pruned. A device half that is not pruned is the backbone's own.
    """

    def __init__(self, problem: Problem, body: nn.Module | None, splits: Mapping[str, SplitSupernet]) -> None:
        self.problem, self.body, self.splits = problem, body, splits
        self._heads: dict[str, nn.Module] = {}

    @classmethod
    def load(cls, problem: Problem, folder: Path) -> Supernet | None:
        """What `folder` holds, as `coinfer supernet` wrote it; None where it trained nothing.

        Raises:
            CoinferError: a file is missing, damaged, or of another space or backbone.
        """
        if not folder.is_dir():
            raise CoinferError(f"{folder} is missing; run `dvc repro` to make it.")
        if not any(folder.glob("*.safetensors")):
            return None
        splits = {cut: SplitSupernet(problem, cut) for cut in problem.space().codes if problem.specs(cut)}
        body = copy.deepcopy(problem.backbone) if prunable_cuts(problem) else None
        for name, network in (*splits.items(), *([(OUTPUT, body)] if body is not None else [])):
            try:
                network.load_state_dict(load_file(weights_file(folder, name)))
            except (OSError, SafetensorError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise CoinferError(f"{weights_file(folder, name)} is missing or of another search space ({reason}); run `dvc repro` to make it.") from error
            network.eval()
        return cls(problem, body, splits)

    def covers(self, candidate: Candidate) -> bool:
        """Whether it has weights for `candidate`; not for edge-only or a feature that crosses as it is, which need none, nor for a codec not searched."""
        if candidate.kind == "device-only":
            return bool(candidate.keep) and self.body is not None
        return candidate.cut in self.splits and candidate.codec in list(self.splits[candidate.cut].codecs)

    def head(self, cut: str, plan: ChannelPlan) -> nn.Module:
        """The device half up to `cut` made by `plan`; where that prunes, its batch norms want recalibration."""
        if not plan.kept or self.body is None:
            return copy.deepcopy(self.problem.head(cut))
        if cut not in self._heads:
            self._heads[cut] = split(self.body, self.problem.example, cut)[0]
        return rebuild(self._heads[cut], plan)

    def network(self, candidate: Candidate) -> nn.Module:
        """The split network or, of a device-only candidate, the whole, in eval mode, with copies of the weights; its batch norms want recalibration.

        Raises:
            ModelError: a candidate that prunes a layer to nothing, or with a codec that is not in the space.
        """
        plan = self.problem.plan(candidate.cut, dict(candidate.keep))
        head = self.head(candidate.cut, plan)
        if candidate.kind == "device-only":
            return head.eval()
        trained, spec = self.splits[candidate.cut], codec_spec(candidate, self.problem.codec)
        codec = trained.codec(spec.kind).at(spec, self.problem.feature_channels(candidate.cut, plan))
        return CoInference(head, codec, copy.deepcopy(trained.tail)).eval()


def weights_file(folder: Path, cut: str) -> Path:
    """Where the weights for `cut` lie; those of the body are for the cut `output`."""
    return folder / f"{cut}.safetensors"


def prunable_cuts(problem: Problem) -> list[str]:
    """The cuts, the whole network's among them, before which the space prunes."""
    return [cut for cut in (*problem.space().codes, OUTPUT) if problem.legal_keep(cut)]


def feature_of(tensor: Tensor, channels: tuple[int, ...] | None) -> Tensor:
    """The `channels` of a feature (B, C, ...), all where None."""
    return tensor if channels is None else tensor.index_select(1, torch.tensor(channels))
