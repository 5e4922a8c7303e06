"""What a candidate is worth: a short real training, a real validation pass through integer symbols and coder, predicted costs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from models.baseline_codecs import RawByteCodec
from models.channel_plan import rebuild
from models.codec import SymbolCodec
from models.coinference import CoInference
from pipeline.data import EVALUATION_BATCH, Sent, Split, normalise
from pipeline.inference import accuracy, outputs
from pipeline.networks import split_network, tables_of
from pipeline.runtime import coder
from pipeline.search.candidate import Candidate, Measurement
from pipeline.search.costing import Costing, Deployment, memory_bytes, parameters, weight_bytes
from pipeline.search.problem import Problem
from pipeline.search.trial_training import SAMPLE_IMAGES, TrialTraining


class Evaluator:
    """Measures candidates of `problem` on one deployment; every trial starts from the trained backbone and a fresh codec (METHODS 5).

    `train` and `validation` are (images uint8 (N, 3, S, S), labels int64 (N,)); of `train` a seeded subset of `search.train_images` is used.
    """

    def __init__(self, problem: Problem, train: Split, validation: Split, deployment: Deployment, seed: int) -> None:
        self.problem, self.validation = problem, validation
        self.training = TrialTraining(problem, train, seed)
        self.costing = Costing(problem, deployment, self.training.teacher_logits.shape[1])
        self.reference_accuracy = accuracy(problem.backbone, validation)

    def measure(self, candidate: Candidate, trial_seed: int) -> Measurement:
        """Accuracy, sizes and costs of `candidate`: a pure function of it and `trial_seed`.

        Raises:
            ModelError: the candidate prunes a layer to nothing, or its codec does not fit the cut.
            ProfileError: a profile lacks the backbone or a block.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial_seed)
            if candidate.image_format is not None and candidate.quality is not None:
                return self._measure_edge_only(candidate, Sent(candidate.image_format, candidate.quality))
            if candidate.kind == "device-only":
                return self._measure_device_only(candidate, trial_seed)
            return self._measure_split(candidate, trial_seed)

    def _measure_edge_only(self, candidate: Candidate, sent: Sent) -> Measurement:
        images, labels = self.validation
        received, files = sent.and_files(images)
        sizes = [len(file) for file in files]
        right, bundle_bytes = accuracy(self.problem.backbone, (received, labels)), 2 * weight_bytes(self.problem.backbone)  # the edge's, and the device's own
        return self.costing.measurement(candidate, right, sizes, 0, 4 * images[0].numel(), bundle_bytes)

    def _measure_device_only(self, candidate: Candidate, trial_seed: int) -> Measurement:
        network = rebuild(self.problem.head(candidate.cut), self.problem.plan(candidate.cut, dict(candidate.keep)))
        if candidate.keep:
            self.training.run(network, None, trial_seed, pruned=True)
        memory = memory_bytes(network, self.problem.example)
        return self.costing.measurement(candidate, accuracy(network, self.validation), [], parameters(network), memory, weight_bytes(network))

    def _measure_split(self, candidate: Candidate, trial_seed: int) -> Measurement:
        assert candidate.bits is not None
        network = split_network(
            self.problem.backbone, self.problem.example, candidate, self.problem.plan(candidate.cut, dict(candidate.keep)), self.problem.codec
        )
        if isinstance(network.codec, RawByteCodec):
            network.codec.calibrate(outputs(self.problem.head(candidate.cut), self.training.sample))
        self.training.run(network, candidate.cut, trial_seed, pruned=bool(candidate.keep))
        network.eval()
        codec, coded = network.codec, isinstance(network.codec, SymbolCodec)
        if coded:
            right, payloads = self._through_coder(network, candidate)
        else:
            right, payloads = accuracy(network, self.validation), [-(-codec.uncoded_bits // 8)]
        on_device = network.device_half() if coded else nn.Sequential(network.head, codec.encode).eval()
        on_edge = nn.Sequential(codec.decode, network.tail)
        bundle_bytes = weight_bytes(on_device, candidate.precision) + weight_bytes(on_edge) + weight_bytes(self.problem.backbone)
        return self.costing.measurement(candidate, right, payloads, parameters(on_device), memory_bytes(on_device, self.problem.example), bundle_bytes)

    def _through_coder(self, network: CoInference, candidate: Candidate) -> tuple[float, list[int]]:
        """Accuracy on validation by what the edge makes of integer symbols, and the coded bytes of some of its images."""
        on_device, on_edge, codec = network.device_half(), network.edge_half(), network.symbol_codec()
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
