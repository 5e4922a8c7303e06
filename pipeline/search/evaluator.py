"""What a candidate is worth: a real validation pass through integer symbols and coder, on a supernet's weights or after a short training; predicted costs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.baseline_codecs import RawByteCodec
from models.channel_plan import rebuild
from models.codec import SymbolCodec
from models.coinference import CoInference
from models.cutting import count_macs
from models.integers import integer_half
from pipeline.data import EVALUATION_BATCH, Sent, Split, normalise
from pipeline.errors import ModelError
from pipeline.inference import accuracy, outputs, recalibrated
from pipeline.networks import split_network, tables_of
from pipeline.runtime import coder
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.costing import Costing, Deployment, memory_bytes, parameters
from pipeline.search.problem import Problem
from pipeline.search.supernet import Supernet
from pipeline.search.trial_training import SAMPLE_IMAGES, TrialTraining

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
        self.costing = Costing(problem, deployment, self.training.teacher_logits.shape[1])
        self.reference_accuracy = accuracy(problem.backbone, validation)

    def measure(self, candidate: Candidate, trial_seed: int) -> Measurement:
        """Accuracy, sizes and costs of `candidate`: a pure function of it and `trial_seed`.

        Raises:
            ModelError: the candidate prunes a layer to nothing, its codec does not fit the cut, or its device half does not bear int8.
            ProfileError: a profile lacks the backbone or a block.
        """
        return self._measured(candidate, trial_seed, trains=not self.is_estimate(candidate))

    def rescore(self, candidate: Candidate, trial_seed: int) -> Measurement:
        """`measure`, after a short training also where the supernet has weights to start from."""
        return self._measured(candidate, trial_seed, trains=True)

    def is_estimate(self, candidate: Candidate) -> bool:
        """Whether `measure` takes the supernet's word, untrained for this candidate alone."""
        return self.supernet is not None and self.supernet.covers(candidate)

    def _measured(self, candidate: Candidate, trial_seed: int, *, trains: bool) -> Measurement:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial_seed)
            if candidate.quality is not None:
                return self._measure_edge_only(candidate, candidate.quality)
            network = self._network(candidate)
            if trains and (candidate.kind == "split" or candidate.keep):
                cut = candidate.cut if candidate.kind == "split" else None
                self.training.run(network, cut, trial_seed, pruned=bool(candidate.keep))
            elif isinstance(network, CoInference) and not candidate.keep:
                recalibrated(network, self.training.sample, [network.codec, network.tail])  # the head's know their weights
            elif candidate.keep:
                recalibrated(network, self.training.sample)
            return self._measure_split(network, candidate) if isinstance(network, CoInference) else self._measure_device_only(network, candidate)

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

    def _measure_edge_only(self, candidate: Candidate, quality: int) -> Measurement:
        images, labels = self.validation
        received, files = Sent("webp", quality).and_files(images)
        costs = self.costing.half_costs(candidate, {}, quality=quality)
        return self.costing.measurement(costs, accuracy(self.problem.backbone, (received, labels)), [len(file) for file in files], 0, 4 * images[0].numel())

    def _measure_device_only(self, network: nn.Module, candidate: Candidate) -> Measurement:
        costs = self.costing.half_costs(candidate, self.costing.block_macs(network, candidate.cut))
        return self.costing.measurement(costs, accuracy(network, self.validation), [], parameters(network), memory_bytes(network, self.problem.example))

    def _measure_split(self, network: CoInference, candidate: Candidate) -> Measurement:
        network.eval()
        codec, coded = network.codec, isinstance(network.codec, SymbolCodec)
        if coded:
            right, payloads = self._through_coder(network, candidate)
        else:
            right, payloads = accuracy(network, self.validation), [-(-codec.uncoded_bits // 8)]
        feature, code = torch.zeros(1, *codec.feature_shape), torch.zeros(1, *codec.code_shape)
        costs = self.costing.half_costs(
            candidate,
            self.costing.block_macs(network.head, candidate.cut),
            encoder_macs=sum(count_macs(codec.encode, feature).values()),
            decoder_macs=sum(count_macs(codec.decode, code).values()),
            symbols=code.numel() if coded else 0,
        )
        on_device = network.device_half() if coded else nn.Sequential(network.head, codec.encode).eval()
        return self.costing.measurement(costs, right, payloads, parameters(on_device), memory_bytes(on_device, self.problem.example))

    def _integers(self, network: CoInference) -> nn.Module:
        """The device half of `network` in int8: images -> symbols."""
        calibration = torch.split(self.training.sample[:CALIBRATION_IMAGES], EVALUATION_BATCH)
        rounded = integer_half(nn.Sequential(network.head, network.codec.encode), (normalise(images) for images in calibration))
        return nn.Sequential(rounded, network.symbol_codec().quantise).eval()

    def _through_coder(self, network: CoInference, candidate: Candidate) -> tuple[float, list[int]]:
        """Accuracy on validation by what the edge makes of integer symbols, and the coded bytes of some of its images."""
        right, payloads = self._through(network.device_half(), network, candidate)
        if candidate.precision == "int8":
            fp32, (right, payloads) = right, self._through(self._integers(network), network, candidate)
            if right < fp32 - LARGEST_INT8_LOSS:
                raise ModelError(
                    f"the device half of {candidate.label()} does not bear int8, which takes its accuracy from {fp32:.3f} to {right:.3f}; leave it in fp32."
                )
        return right, payloads

    def _through(self, on_device: nn.Module, network: CoInference, candidate: Candidate) -> tuple[float, list[int]]:
        on_edge, codec = network.edge_half(), network.symbol_codec()
        images, labels = self.validation
        right = 0
        coded: list[NDArray[np.uint8]] = []
        for part, truth in zip(torch.split(images, EVALUATION_BATCH), torch.split(labels, EVALUATION_BATCH), strict=True):
            with torch.no_grad():
                symbols = on_device(normalise(part))
                right += int((on_edge(codec.received(symbols)).argmax(1) == truth).sum())
            coded.extend(symbols.numpy()[: max(0, SAMPLE_IMAGES - len(coded))])
        tables = tables_of(candidate, outputs(on_device, self.training.sample).numpy())[0]
        return right / len(labels), [len(coder.encode(symbols, tables)) + (len(candidate.points) > 1) for symbols in coded]  # a byte says which point


def _some(split: Split, count: int | None, seed: int) -> Split:
    """`count` of `split`, drawn by `seed`, in their order; all of them where that is None or more than there are."""
    if count is None or count >= len(split[1]):
        return split
    chosen = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(split[1]))[:count]))
    return split[0][chosen], split[1][chosen]
