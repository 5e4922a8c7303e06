"""What a candidate is worth: a short real training, a real validation pass through integer symbols and coder, predicted costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models.baseline_codecs import RawByteCodec
from models.channel_plan import ChannelPlan, rebuild
from models.channels import check_noise
from models.codec import SymbolCodec, code_shape
from models.coinference import CoInference
from models.cutting import CutPoint, count_macs, split
from models.pruning import Pruner, Scores
from pipeline.costs.device_profile import DeviceProfile
from pipeline.costs.energy import RASPBERRY_PI_4, energy_mj
from pipeline.costs.latency import HalfCosts, mean_wire_bytes, predict, reply_frame_bytes
from pipeline.costs.link import Link, wire_bytes
from pipeline.data import EVALUATION_BATCH, Sent, Split, normalise
from pipeline.errors import ModelError, ParamsError
from pipeline.inference import accuracy, outputs, recalibrated
from pipeline.losses import feature_loss, logits_loss
from pipeline.networks import layers_up_to, pruner, split_network, tables_of
from pipeline.params import Codec, Search
from pipeline.runtime import coder
from pipeline.runtime.frame import OVERHEAD_BYTES
from pipeline.search.candidate import Candidate
from pipeline.search.candidate import Measurement as Measurement
from pipeline.search.optuna import Space

TEMPERATURE = 2.0
FEATURE_WEIGHT = 1.0
# The backbone is trained already and only adapts; the codec starts from nothing.
BACKBONE_RATE = 0.3
SAMPLE_IMAGES = 512  # for coder tables, batch-norm statistics, and of validation to be coded: means do not change beyond
FEATURE_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Deployment:
    """Where a candidate would run: the two profiles, the backbone's key in them, and the link."""

    backbone_key: str
    device: DeviceProfile
    edge: DeviceProfile
    link: Link


class Evaluator:
    """Measures candidates of one backbone on one deployment; every trial starts from the trained backbone and a fresh codec (METHODS 5).

    `train` and `validation` are (images uint8 (N, 3, S, S), labels int64 (N,)); of `train` a seeded subset of `settings.train_images` is used.
    `backbone` is the teacher; it is put into eval mode and not changed otherwise.
    """

    def __init__(
        self,
        backbone: nn.Module,
        cuts: Sequence[CutPoint],
        train: Split,
        validation: Split,
        settings: Search,
        codec: Codec,
        deployment: Deployment,
        seed: int,
    ) -> None:
        self.backbone = backbone.eval().to(memory_format=torch.channels_last)
        self.cuts, self.validation, self.settings, self.codec, self.deployment = cuts, validation, settings, codec, deployment
        chosen = np.random.default_rng(seed).permutation(len(train[1]))[: settings.train_images]
        self.images, self.labels = (tensor[torch.from_numpy(chosen)] for tensor in train)
        self.example = torch.zeros(1, 3, *validation[0].shape[2:])
        self._teacher_logits = outputs(self.backbone, self.images)
        self._features: dict[str, Tensor] = {}
        self._heads: dict[str, nn.Module] = {}
        self._pruners: dict[str, tuple[Pruner, Scores] | ModelError] = {}
        self._keep: dict[str, dict[str, tuple[float, ...]]] = {}
        self._whole_macs = count_macs(self.backbone, self.example)
        self.reference_accuracy = accuracy(self.backbone, validation)

    def space(self) -> Space:
        """The candidates that can run: legal codecs for every cut, legal keep ratios for every block with channels to prune.

        Raises:
            ParamsError: a width, stride or keep ratio that fits nowhere.
        """
        self._check_settings()
        codes = {}
        for point in self._coded_cuts():
            channels = [width for width in self.settings.code_channels if _codec_fits(point.shape, width, 1)]
            strides = [stride for stride in self.settings.strides if _codec_fits(point.shape, 1, stride)]
            if self._raw:
                channels, strides = [point.shape[0]], [1]
            if channels and strides:
                codes[point.name] = (channels, strides)
        settings = self.settings
        several = self.codec.kind == "multi-rate"
        return Space(
            codes,
            [8] if several or self._raw or self.codec.kind.startswith("jscc") else settings.bits,
            settings.webp_qualities,
            self.legal_keep,
            self.codec.kind,
            settings.rate_weights,
            settings.precision,
            list(zip(self.codec.shares, self.codec.bits, strict=True)) if several else (),
        )

    @property
    def _raw(self) -> bool:
        """Whether features cross as they are: all channels, at every place."""
        return self.codec.kind.startswith("raw")

    def _coded_cuts(self) -> list[CutPoint]:
        """Where a codec fits: at maps, or at vectors where all are, since what pools a map to a vector on the device classifies there (METHODS 3)."""
        fitting = [point for point in self.cuts[1:-1] if _codec_fits(point.shape, 1, 1)]
        return [point for point in fitting if len(point.shape) == 3] or fitting

    def _check_settings(self) -> None:
        if self.codec.kind.startswith("jscc"):
            try:
                check_noise(self.codec.kind, *self.codec.noise)
            except ModelError as error:
                raise ParamsError(f"codec.noise: {error}") from None
        shapes = [point.shape for point in self._coded_cuts()] if not self._raw else []
        for number, width in enumerate(self.settings.code_channels):
            if shapes and not any(_codec_fits(shape, width, 1) for shape in shapes):
                widest = max(shape[0] for shape in shapes)
                cut = "cut of 2x2 or more" if len(shapes[0]) == 3 else "cut"
                raise ParamsError(f"search.code_channels.{number} is {width}, but no {cut} has over {widest} channels; choose at most that.")
        for number, stride in enumerate(self.settings.strides):
            if shapes and not any(_codec_fits(shape, 1, stride) for shape in shapes):
                why = "leaves less than 2x2 of the feature at every cut" if len(shapes[0]) == 3 else "does not suit vectors, which all cuts give"
                raise ParamsError(f"search.strides.{number} is {stride}, which {why}; choose a smaller one.")
        whole = self.cuts[-1].name
        blocks = list(layers_up_to(self.cuts, whole))
        for number, ratio in enumerate(self.settings.keep):
            answers = [self._lost(whole, block, ratio) for block in blocks]
            refusals = [answer for answer in answers if isinstance(answer, ModelError)]
            if refusals and not isinstance(self._pruners[whole], ModelError) and not any(answer is True for answer in answers):
                raise ParamsError(f"search.keep.{number} is {ratio}, which suits no block: {refusals[0]}")

    def remarks(self) -> list[str]:
        """What of the settings comes to nothing with this backbone, a sentence each."""
        coded, whole = self._coded_cuts(), self.cuts[-1].name
        found = []
        if not coded:
            found.append("no cut gives a map or vector that a codec fits, so only sending the image and staying on the device are compared.")
        self.legal_keep(whole)
        if isinstance(reason := self._pruners.get(whole), ModelError):
            cuts = [point.name for point in (*coded, self.cuts[-1]) if not self.legal_keep(point.name)]
            found.append(f"search.keep comes to nothing for the device halves that end at {', '.join(cuts)}: {reason}")
        return found

    def legal_keep(self, cut: str) -> Mapping[str, Sequence[float]]:
        """For each block before `cut` that loses channels when pruned: the ratios that leave every layer some, and 1.0."""
        if self._raw and cut != self.cuts[-1].name:
            return {}
        if cut not in self._keep:
            ratios = [ratio for ratio in sorted(self.settings.keep) if ratio < 1]
            legal = {block: [ratio for ratio in ratios if self._lost(cut, block, ratio) is True] for block in layers_up_to(self.cuts, cut)}
            self._keep[cut] = {block: (*found, 1.0) for block, found in legal.items() if found}
        return self._keep[cut]

    def _lost(self, cut: str, block: str, ratio: float) -> bool | ModelError:
        """Whether the block loses channels when pruned so, or why it cannot be."""
        try:
            return bool(self._plan(cut, {block: ratio}).kept)
        except ModelError as error:
            return error

    def _head(self, cut: str) -> nn.Module:
        """The device half of the backbone, sharing its weights."""
        if cut not in self._heads:
            self._heads[cut], _ = split(self.backbone, self.example, cut)
        return self._heads[cut]

    def _plan(self, cut: str, keep: Mapping[str, float]) -> ChannelPlan:
        if not keep:
            return ChannelPlan()
        if cut not in self._pruners:
            head = self._head(cut)
            try:
                chooser = pruner(head, self.example, self.cuts, cut, self.deployment.device.channel_block)
                self._pruners[cut] = chooser, chooser.scores(head)
            except ModelError as error:  # kept: finding out takes seconds, and is asked for every block
                self._pruners[cut] = error
        known = self._pruners[cut]
        if isinstance(known, ModelError):
            raise known
        chooser, scores = known
        return chooser.plan(keep, scores)

    def measure(self, candidate: Candidate, trial_seed: int) -> Measurement:
        """Accuracy, sizes and costs of `candidate`: a pure function of it and `trial_seed`.

        Raises:
            ModelError: the candidate prunes a layer to nothing, or its codec does not fit the cut.
            ProfileError: a profile lacks the backbone or a block.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(trial_seed)
            if candidate.quality is not None:
                return self._measure_edge_only(candidate, candidate.quality)
            if candidate.kind == "device-only":
                return self._measure_device_only(candidate, trial_seed)
            return self._measure_split(candidate, trial_seed)

    def _measure_edge_only(self, candidate: Candidate, quality: int) -> Measurement:
        images, labels = self.validation
        received, files = Sent("webp", quality).and_files(images)
        costs = self._half_costs(candidate, {}, quality=quality)
        return self._measurement(costs, accuracy(self.backbone, (received, labels)), [len(file) for file in files], 0, 4 * images[0].numel())

    def _measure_device_only(self, candidate: Candidate, trial_seed: int) -> Measurement:
        network = rebuild(self._head(candidate.cut), self._plan(candidate.cut, dict(candidate.keep)))
        if candidate.keep:
            self._train(network, None, trial_seed, pruned=True)
        costs = self._half_costs(candidate, self._block_macs(network, candidate.cut))
        return self._measurement(costs, accuracy(network, self.validation), [], _parameters(network), _memory_bytes(network, self.example))

    def _measure_split(self, candidate: Candidate, trial_seed: int) -> Measurement:
        assert candidate.bits is not None
        network = split_network(self.backbone, self.example, candidate, self._plan(candidate.cut, dict(candidate.keep)), self.codec)
        if isinstance(network.codec, RawByteCodec):
            network.codec.calibrate(outputs(self._head(candidate.cut), self.images[:SAMPLE_IMAGES]))
        self._train(network, candidate.cut, trial_seed, pruned=bool(candidate.keep))
        network.eval()
        codec, coded = network.codec, isinstance(network.codec, SymbolCodec)
        if coded:
            right, payloads = self._through_coder(network, candidate)
        else:
            right, payloads = accuracy(network, self.validation), [-(-codec.uncoded_bits // 8)]
        feature, code = torch.zeros(1, *codec.feature_shape), torch.zeros(1, *codec.code_shape)
        costs = self._half_costs(
            candidate,
            self._block_macs(network.head, candidate.cut),
            encoder_macs=sum(count_macs(codec.encode, feature).values()),
            decoder_macs=sum(count_macs(codec.decode, code).values()),
            symbols=code.numel() if coded else 0,
        )
        on_device = network.device_half() if coded else nn.Sequential(network.head, codec.encode).eval()
        return self._measurement(costs, right, payloads, _parameters(on_device), _memory_bytes(on_device, self.example))

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
        tables = tables_of(candidate, outputs(on_device, self.images[:SAMPLE_IMAGES]).numpy())[0]
        return right / len(labels), [len(coder.encode(symbols, tables)) + (len(candidate.points) > 1) for symbols in coded]  # a byte says which point

    def _half_costs(
        self,
        candidate: Candidate,
        block_macs: Mapping[str, float],
        *,
        encoder_macs: float = 0,
        decoder_macs: float = 0,
        symbols: int = 0,
        quality: int | None = None,
    ) -> Callable[[float], HalfCosts]:
        """All that latency needs but the mean frame size, which is still to come."""
        classes = self._teacher_logits.shape[1]

        def with_frame(frame_bytes: float) -> HalfCosts:
            return HalfCosts(
                kind=candidate.kind,
                backbone_key=self.deployment.backbone_key,
                cut=candidate.cut,
                block_macs=block_macs,
                encoder_macs=encoder_macs,
                decoder_macs=decoder_macs,
                symbols=symbols,
                frame_bytes=frame_bytes,
                quality=quality,
                reply_bytes=reply_frame_bytes(classes),
            )

        return with_frame

    def _measurement(
        self, costs_of: Callable[[float], HalfCosts], accuracy: float, payload_sizes: Sequence[int], device_params: int, memory_bytes: int
    ) -> Measurement:
        frames = [size + OVERHEAD_BYTES for size in payload_sizes]
        frame_bytes = float(np.mean(frames)) if frames else 0.0
        costs = costs_of(frame_bytes)
        parts = predict(costs, self.deployment.device, self.deployment.edge, self.deployment.link)
        return Measurement(
            accuracy=accuracy,
            **parts,
            payload_bits=8 * float(np.mean(payload_sizes)) if frames else 0.0,
            frame_bytes=frame_bytes,
            wire_bytes=float(np.mean([wire_bytes(frame) for frame in frames])) if frames else 0.0,
            energy_mj=energy_mj(parts, RASPBERRY_PI_4, self.deployment.link.transmit_ms(mean_wire_bytes(frame_bytes)) if frames else 0.0),
            device_macs=int(sum(costs.block_macs.values()) + costs.encoder_macs),
            device_params=device_params,
            device_memory_mb=memory_bytes / 1e6,
        )

    def _block_macs(self, network: nn.Module, cut: str) -> dict[str, float]:
        """MACs of each device block: what it had, less what its layers lost. (Products outside layers, as in attention, are not pruned.)"""
        now, whole = count_macs(network, self.example), self._whole_macs
        full = {after.name: after.macs - before.macs for before, after in itertools.pairwise(self.cuts)}

        def lost(layer: str) -> int:
            return sum(macs - now.get(name, 0) for name, macs in whole.items() if name == layer or name.startswith(f"{layer}."))

        return {block: float(full[block] - sum(map(lost, layers))) for block, layers in layers_up_to(self.cuts, cut).items()}

    def _train(self, network: nn.Module, cut: str | None, trial_seed: int, *, pruned: bool) -> None:
        """A few one-cycle steps of Adam on cross-entropy, the teacher's logits and, for a split, its feature at the cut (METHODS 3)."""
        network.train().to(memory_format=torch.channels_last)
        split_network = network if isinstance(network, CoInference) else None
        whole_head = split_network is not None and not pruned
        codec = list(split_network.codec.parameters()) if split_network else []
        apart = {id(parameter) for parameter in [*codec, *(split_network.head.parameters() if split_network and whole_head else [])]}
        rates = [self.settings.learning_rate, self.settings.learning_rate * BACKBONE_RATE]
        groups = [(group, rate) for group, rate in zip((codec, [p for p in network.parameters() if id(p) not in apart]), rates, strict=True) if group]
        optimiser = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in groups])
        steps = self.settings.codec_steps
        # One-cycle divides by what lies between its phases, which very few steps leave empty.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [rate for _, rate in groups], total_steps=max(steps, 10))
        for chosen in itertools.islice(self._batches(trial_seed), steps):
            labels = self.labels[chosen]
            if split_network is not None:
                assert cut is not None
                feature = self._teacher_feature(cut, chosen)
                # A head that is not pruned stays as it is, so what it gives is known already: most of a step's time.
                decoded, loss = split_network.codec(feature if whole_head else split_network.head(normalise(self.images[chosen])))
                logits = split_network.tail(decoded)
                loss = loss + FEATURE_WEIGHT * feature_loss(decoded, feature)
            else:
                logits = network(normalise(self.images[chosen]))
                loss = torch.zeros(())
            loss = loss + F.cross_entropy(logits, labels) + logits_loss(logits, self._teacher_logits[chosen], TEMPERATURE)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
        trained = [split_network.codec, split_network.tail] if split_network and whole_head else [network]
        recalibrated(network, self.images[:SAMPLE_IMAGES], trained)

    def _batches(self, trial_seed: int) -> Iterator[Tensor]:
        """Indices into the subset, epoch after epoch in a fresh order."""
        rng = np.random.default_rng(trial_seed)
        size = min(self.settings.batch_size, len(self.labels))
        while True:
            order = torch.from_numpy(rng.permutation(len(self.labels)))
            yield from torch.split(order[: len(order) // size * size], size)

    def _teacher_feature(self, cut: str, chosen: Tensor) -> Tensor:
        """The unsplit backbone's feature at `cut` for `chosen` images of the subset; kept from trial to trial while memory allows."""
        point = next(point for point in self.cuts if point.name == cut)
        needed = 4 * point.elements * len(self.labels)
        if cut not in self._features:
            head = self._head(cut)
            if needed > FEATURE_CACHE_BYTES:
                with torch.no_grad():
                    return head(normalise(self.images[chosen]))
            while self._features and sum(feature.nbytes for feature in self._features.values()) + needed > FEATURE_CACHE_BYTES:
                self._features.pop(next(iter(self._features)))
            self._features[cut] = outputs(head, self.images)
        return self._features[cut][chosen]


def _codec_fits(shape: tuple[int, ...], code_channels: int, stride: int) -> bool:
    try:
        code_shape(shape, code_channels, stride)
    except ModelError:
        return False
    return True


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def _memory_bytes(network: nn.Module, example: Tensor) -> int:
    """fp32 weights and the largest tensor that enters or leaves a layer, for one image."""
    largest = 0

    def see(_: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal largest
        largest = max([largest, *(tensor.numel() for tensor in (*inputs, output) if isinstance(tensor, Tensor))])

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(see) for module in leaves]
    try:
        network(example)
    finally:
        for hook in hooks:
            hook.remove()
    return 4 * (_parameters(network) + largest)
