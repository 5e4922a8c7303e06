"""What a candidate is worth: a real validation pass through integer symbols and coder, on a supernet's weights or after a short training; predicted costs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from models.baseline_codecs import RawByteCodec
from models.channel_plan import rebuild
from models.codec import SymbolCodec
from models.coinference import CoInference
from models.integers import integer_half
from pipeline.data import EVALUATION_BATCH, Sent, Split, normalise
from pipeline.errors import ModelError
from pipeline.inference import accuracy, outputs, recalibrate, recalibrated
from pipeline.networks import split_network, tables_of
from pipeline.runtime import coder
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.costing import Costing, Deployment, memory_bytes, parameters, weight_bytes
from pipeline.search.problem import Problem
from pipeline.search.supernet import Supernet
from pipeline.search.trial_training import FEATURE_CACHE_BYTES, SAMPLE_IMAGES, TrialTraining

CALIBRATION_IMAGES = 256  # of an int8 device half, as many as its export takes
LARGEST_INT8_LOSS = 0.05  # of accuracy, by which int8 may differ from fp32 before a candidate is refused


class Evaluator:
    """Measures candidates of `problem` on one deployment (METHODS 5).

    A trial takes its weights from the `supernet` and recalibrates their batch norms, or, where there is none, trains the backbone with a fresh codec.
    `train` and `validation` are (images uint8 (N, 3, S, S), labels int64 (N,)); of both seeded subsets are used, of `search.train_images` and
    `search.validation_images`.
    """

    def __init__(self, problem: Problem, train: Split, validation: Split, deployment: Deployment, seed: int, supernet: Supernet | None = None) -> None:
        self.problem, self.supernet, self.validation = problem, supernet, _some(validation, problem.settings.validation_images, seed)
        self.training = TrialTraining(problem, train, seed)
        self._features: dict[str, tuple[Tensor, Tensor]] = {}
        self.costing = Costing(problem, deployment, self.training.teacher_logits.shape[1])
        self.reference_accuracy = accuracy(problem.backbone, self.validation)

    def measure(self, candidate: Candidate, trial_seed: int, *, rescores: bool = False) -> Measurement:
        """Accuracy, sizes and costs of `candidate`: a pure function of the arguments.

        Where the supernet has weights for it they are taken as they are (`is_estimate`), unless this `rescores`: then a short training goes before.

        Raises:
            ModelError: the candidate prunes a layer to nothing, its codec does not fit the cut, or its device half does not bear int8.
            ProfileError: a profile lacks the backbone or a block.
        """
        trains = rescores or not self.is_estimate(candidate)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial_seed)
            if candidate.image_format is not None and candidate.quality is not None:
                return self._measure_edge_only(candidate, Sent(candidate.image_format, candidate.quality))
            network = self._network(candidate)
            if trains and (candidate.kind == "split" or candidate.keep):
                cut = candidate.cut if candidate.kind == "split" else None
                self.training.run(network, cut, trial_seed, pruned=bool(candidate.keep))
            elif isinstance(network, CoInference) and not candidate.keep:
                self._recalibrate_behind(network, candidate.cut)
            elif candidate.keep:
                recalibrated(network, self.training.sample)
            return self._measure_split(network, candidate) if isinstance(network, CoInference) else self._measure_device_only(network, candidate)

    def is_estimate(self, candidate: Candidate) -> bool:
        """Whether `measure` takes the supernet's word, untrained for this candidate alone."""
        return self.supernet is not None and self.supernet.covers(candidate)

    @torch.no_grad()
    def _recalibrate_behind(self, network: CoInference, cut: str) -> None:
        """Recalibrate codec and tail of a split whose head is the backbone's own."""
        sample = self._seen(cut)[0]
        recalibrate([network.codec, network.tail], lambda: [network.tail(network.codec(feature).decoded) for feature in torch.split(sample, EVALUATION_BATCH)])

    def _seen(self, cut: str) -> tuple[Tensor, Tensor]:
        """What the backbone's own head gives at `cut` for the sample and for the validation images; kept from trial to trial while memory allows."""
        if cut not in self._features:
            head, size = self.problem.head(cut), 4 * next(point for point in self.problem.cuts if point.name == cut).elements
            needed = size * (len(self.training.sample) + len(self.validation[1]))
            while self._features and needed + sum(sample.nbytes + judged.nbytes for sample, judged in self._features.values()) > FEATURE_CACHE_BYTES:
                self._features.pop(next(iter(self._features)))
            self._features[cut] = outputs(head, self.training.sample), outputs(head, self.validation[0])
        return self._features[cut]

    def _network(self, candidate: Candidate) -> nn.Module:
        """The network of a split or device-only `candidate`, as a trial starts from it."""
        if self.supernet is not None and self.supernet.covers(candidate):
            return self.supernet.network(candidate)
        problem, plan = self.problem, self.problem.plan(candidate.cut, dict(candidate.keep))
        if candidate.kind == "device-only":
            return rebuild(problem.head(candidate.cut), plan).eval()
        network = split_network(problem.backbone, problem.example, candidate, plan, problem.codec)
        if isinstance(network.codec, RawByteCodec):
            network.codec.calibrate(outputs(problem.head(candidate.cut), self.training.sample))
        return network

    def _measure_edge_only(self, candidate: Candidate, sent: Sent) -> Measurement:
        images, labels = self.validation
        received, files = sent.and_files(images)
        sizes = [len(file) for file in files]
        right, bundle_bytes = accuracy(self.problem.backbone, (received, labels)), 2 * weight_bytes(self.problem.backbone)  # the edge's, and the device's own
        return self.costing.measurement(candidate, right, sizes, 0, 4 * images[0].numel(), bundle_bytes)

    def _measure_device_only(self, network: nn.Module, candidate: Candidate) -> Measurement:
        memory = memory_bytes(network, self.problem.example)
        return self.costing.measurement(candidate, accuracy(network, self.validation), [], parameters(network), memory, weight_bytes(network))

    def _measure_split(self, network: CoInference, candidate: Candidate) -> Measurement:
        network.eval()
        codec, coded = network.codec, isinstance(network.codec, SymbolCodec)
        if coded:
            right, payloads = self._through_coder(network, candidate)
        else:
            right, payloads = accuracy(network, self.validation), [-(-codec.uncoded_bits // 8)]
        on_device = network.device_half() if coded else nn.Sequential(network.head, codec.encode).eval()
        on_edge = nn.Sequential(codec.decode, network.tail)
        bundle_bytes = weight_bytes(on_device, candidate.precision) + weight_bytes(on_edge) + weight_bytes(self.problem.backbone)
        return self.costing.measurement(
            candidate, right, payloads, parameters(on_device), memory_bytes(on_device, self.problem.example, candidate.precision), bundle_bytes
        )

    def _through_coder(self, network: CoInference, candidate: Candidate) -> tuple[float, list[int]]:
        """Accuracy on validation by what the edge makes of integer symbols, and the coded bytes of some of its images."""
        encoder, images = nn.Sequential(network.codec.encode, network.symbol_codec().quantise), (self.training.sample, self.validation[0])
        if self.is_estimate(candidate) and not candidate.keep:
            sample, judged = (_batched(encoder, torch.split(seen, EVALUATION_BATCH)) for seen in self._seen(candidate.cut))
        else:
            sample, judged = (outputs(nn.Sequential(network.head, encoder), seen) for seen in images)
        right = self._right(network, judged)
        if candidate.precision == "int8":
            calibration = torch.split(self.training.sample[:CALIBRATION_IMAGES], EVALUATION_BATCH)
            rounded = integer_half(nn.Sequential(network.head, network.codec.encode), (normalise(part) for part in calibration))
            sample, judged = (outputs(nn.Sequential(rounded, encoder[1]), seen) for seen in images)
            fp32, right = right, self._right(network, judged)
            if right < fp32 - LARGEST_INT8_LOSS:
                raise ModelError(
                    f"the device half of {candidate.label()} does not bear int8, which takes its accuracy from {fp32:.3f} to {right:.3f}; leave it in fp32."
                )
        tables = tables_of(candidate, sample.numpy())[0]
        several = len(candidate.points) > 1  # a byte says which point
        return right, [len(coder.encode(symbols, tables)) + several for symbols in judged[:SAMPLE_IMAGES].numpy()]

    def _right(self, network: CoInference, symbols: Tensor) -> float:
        """The share of the validation images that the edge half classifies rightly by their `symbols`."""
        logits = _batched(network.edge_half(), torch.split(network.symbol_codec().received(symbols), EVALUATION_BATCH))
        return int((logits.argmax(1) == self.validation[1]).sum()) / len(symbols)


@torch.no_grad()
def _batched(network: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    return torch.cat([network(batch) for batch in batches])


def _some(split: Split, count: int | None, seed: int) -> Split:
    """`count` of `split`, drawn by `seed`, in their order; all of them where that is None or more than there are."""
    if count is None or count >= len(split[1]):
        return split
    chosen = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(split[1]))[:count]))
    return split[0][chosen], split[1][chosen]
