"""params.yaml as frozen models: an unknown key, a wrong type or a value out of range is one sentence with the key's path."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import ParamsError
from pipeline.paths import PARAMS
from pipeline.runtime.images import LOSSLESS, Format

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Precision = Literal["auto", "fp32", "bf16"]
MOVED = {"codec.kind": "search.codecs, a list,"}  # what older files call otherwise


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Run(Section):
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")
    threads: int = Field(2, ge=1, le=256, description="torch threads; part of what makes results reproducible")


class Data(Section):
    source: Literal["digits", "cifar10", "folder"] = Field(description="scikit-learn's digits, torchvision's CIFAR10, or an image folder")
    path: str = Field(min_length=1, description="folder: holds train/CLASS/* and test/CLASS/*; cifar10: where torchvision keeps its files; digits: not read")
    image_size: int = Field(ge=8, le=1024, description="pixels; the shorter side is resized to this, then the centre cropped")
    validation_fraction: float = Field(
        0.1, gt=0, le=0.5, description="share of each class held out of training, evenly spread, alternately for validation and gate"
    )


class Backbone(Section):
    name: str = Field(min_length=1, description="one of ours, a torchvision classifier, or package.module:function")
    weights: str | None = Field(None, description="safetensors file to start from; keep it under weights/, whose content DVC watches")


class Training(Section):
    epochs: int = Field(ge=0, description="passes over the training images")
    batch_size: Count = Field(64, description="images a step")
    learning_rate: Positive = Field(description="peak of the one-cycle schedule")
    weight_decay: NonNegative = Field(5e-4, description="on matrices and filters only")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="decay per step of the averaged weights that are kept; 0 = off")
    precision: Precision = Field("auto", description="auto picks bf16 where the processor computes it natively")
    crop_padding: int = Field(4, ge=0, description="pixels of reflected border for random crops; 0 = off")
    flip: bool = Field(False, description="random horizontal flips")
    cutmix: float = Field(0.0, ge=0, le=1, description="share of batches in which a rectangle of each image is of another one; with a teacher, who sees it too")


class Pretrain(Training):
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the cross-entropy")
    teachers: dict[str, str] = Field(
        {}, description="trained networks that teach the backbone, `weights/FILE.safetensors: BACKBONE`; their logits are averaged"
    )
    distill_logits: NonNegative = Field(
        1.0, description="weight of the KL divergence to the teachers, if there are any; where it is large, choose a smaller learning_rate"
    )
    temperature: Positive = Field(2.0, description="of the distilled logits")


class Codec(Section):
    shares: list[Fraction] = Field([1.0, 0.5, 0.25], min_length=1, description="multi-rate: of the code's channels, at each operating point, most first")
    bits: list[Annotated[int, Field(ge=1, le=8)]] = Field([4, 3, 2], min_length=1, description="multi-rate: of a symbol, at each of these points")
    commitment: NonNegative = Field(0.25, description="codebook: weight of the pull of the code towards its nearest value")
    noise: list[Positive] = Field(
        [0.05, 0.3], min_length=2, max_length=2, description="jscc: least and largest noise trained for, sigma at peak 1 or the share of bits lost or flipped"
    )

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if len(self.shares) != len(self.bits):
            raise ValueError(f"shares has {len(self.shares)} values and bits {len(self.bits)}; give one of each for every operating point")
        if any(list(values) != sorted(values, reverse=True) for values in (self.shares, self.bits)):
            raise ValueError("shares or bits rise from one operating point to the next; name the most expensive first")
        return self


class Finetune(Training):
    prune_epochs: int = Field(0, ge=0, description="passes in which channels of the device half are silenced, more each round, before the least important go")
    prune_rounds: Count = Field(4, description="times that the channels to silence are chosen anew")
    importance: Literal["l1", "l2", "taylor"] = Field("l1", description="of a channel: norm of its weights, or |weight x gradient|")
    frozen_epochs: int = Field(0, ge=0, description="passes that first train codec and edge half behind the frozen device half: cheap, its features are kept")
    frozen_learning_rate: Positive = Field(0.05, description="peak in those passes")
    distill_logits: NonNegative = Field(1.0, description="weight of the KL divergence to the unsplit teacher")
    distill_feature: NonNegative = Field(0.1, description="weight of the squared error on the feature at the cut")
    temperature: Positive = Field(2.0, description="of the distilled logits")

    @model_validator(mode="after")
    def _taught(self) -> Self:
        if self.importance == "taylor" and not self.prune_epochs:
            raise ValueError("importance is taylor, whose gradients come from prune_epochs, and those are 0; choose l1 or l2, or at least one such epoch")
        return self


class Power(Section):
    board: Literal["raspberry-pi-4", "jetson-nano"] = Field("raspberry-pi-4", description="whose published power stands for what is not given here")
    cpu_w: NonNegative | None = Field(None, description="W of the whole device while one core computes")
    tx_w: NonNegative | None = Field(None, description="W while it sends")
    idle_w: NonNegative | None = Field(None, description="W while it waits")


class LinkParams(Section):
    rate_mbps: Positive = Field(description="Mbit/s (1e6), each way")
    rtt_ms: NonNegative = Field(description="round-trip propagation")


class Device(Section):
    profile: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="profiles/NAME.json, or `measure` for this machine")
    slowdown: float = Field(1, ge=1, allow_inf_nan=False, description="the device is this many times slower than its profile")
    edge_profile: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="the edge server's profile")
    edge_slowdown: float = Field(1, ge=1, allow_inf_nan=False, description="the edge is this many times slower than its profile")
    memory_mb: Positive = Field(description="what the device half may need: weights and largest activations")
    link: LinkParams = Field(description="between device and edge")
    power: Power = Field(Power(), description="of the device, from which energy is predicted")


class Supernet(Section):
    epochs: int = Field(0, ge=0, description="passes over the training images, once for each cut and once for the network; 0: every trial trains its own codec")
    batch_size: Count = Field(64, description="images a step")
    learning_rate: Positive = Field(0.01, description="peak of the one-cycle schedule, of codecs; the backbone takes less")
    precision: Precision = Field("auto", description="auto picks bf16 where the processor computes it natively")


class Ddpg(Section):
    cut: str | None = Field(None, description="the cut that is searched; null = all, those that do best for longer")
    reward: Literal["linear", "log"] = Field("linear", description="accuracy - weight x latency / device-only's, or -error x ln(1 + that ratio)")
    reward_weights: list[NonNegative] = Field([], description="of latency in reward `linear`; several, in turn, trace a front; none = 0.03, 0.1 and 0.3")

    @model_validator(mode="after")
    def _weighted(self) -> Self:
        if self.reward == "log" and len(self.reward_weights) > 1:
            raise ValueError("reward log takes no weight, but reward_weights has several; give one, or reward linear")
        return self


class Search(Section):
    trials: Count = Field(description="evaluations, baselines not counted")
    method: Literal["tpe", "nsga2", "random", "uniform", "ddpg"] = Field(
        "tpe", description="what proposes candidates; `uniform` keeps one fraction of all channels and draws the rest at random"
    )
    executor: Literal["local", "ray"] = Field("local", description="where candidates are evaluated: on this machine, or by actors of a Ray cluster")
    workers: int = Field(
        1, ge=1, le=256, description="evaluations at a time, each with `run.threads` / workers threads; tpe, nsga2 and ddpg then vary a little"
    )
    ray_address: str | None = Field(
        None, description="`HOST:PORT` of the cluster for executor `ray`, or `auto`; its machines need this folder under the same path and the same packages"
    )
    ddpg: Ddpg = Field(Ddpg(), description="of method ddpg")
    codec_steps: Count = Field(description="training steps of a rescored trial, and of every trial where there is no supernet")
    train_images: Count = Field(description="training images that these draw from")
    batch_size: Count = Field(64, description="images a step")
    learning_rate: Positive = Field(0.01, description="of a trial's training")
    validation_images: Count | None = Field(None, description="validation images that trials are judged by, drawn once; null = all")
    rescored: int = Field(4, ge=0, description="best trials of a supernet that are trained and measured again, from which the choice is made; 0 = none")
    cuts: Literal["blocks", "all"] = Field("blocks", description="where to cut: after each block, or wherever a single tensor crosses")
    keep: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        min_length=1, description="kept fractions of each group of channels that can only be pruned together; 0 drops blocks with a shortcut"
    )
    codecs: list[Literal["uniform", "codebook", "rate", "multi-rate", "raw-8bit", "raw-fp32", "jscc-awgn", "jscc-bec", "jscc-bsc"]] = Field(
        ["uniform"],
        min_length=1,
        description="how the feature is sent (docs/split.md); `raw-fp32` and the jscc kinds are trained and evaluated, but cannot be exported",
    )
    code_channels: list[Count] = Field(min_length=1, description="channels of the code")
    strides: list[Literal[1, 2, 4, 8]] = Field(min_length=1, description="spatial strides of the encoder")
    bits: list[Annotated[int, Field(ge=1, le=8)]] = Field(min_length=1, description="bits a symbol")
    precision: list[Literal["fp32", "int8"]] = Field(["fp32"], min_length=1, description="of the device half of a split")
    rate_weights: list[NonNegative] = Field([1e-4, 1e-3], min_length=1, description="codec `rate`: loss per coded bit of an image")
    images: dict[Format, list[Annotated[int, Field(ge=1, le=100)]]] = Field(
        min_length=1, description="edge-only baselines, `FORMAT: [QUALITY, ...]`; formats webp, jpeg, jpeg-bare and png; 100 = lossless"
    )

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if (self.executor == "ray") != (self.ray_address is not None):
            raise ValueError(f"executor is {self.executor} and ray_address {self.ray_address}; give executor ray an address, and local none")
        return self

    @field_validator("images")
    @classmethod
    def _images(cls, images: dict[Format, list[int]]) -> dict[Format, list[int]]:
        for name, qualities in images.items():
            if not qualities or len(set(qualities)) != len(qualities):
                raise ValueError(f"{name} has {'no quality' if not qualities else 'a quality twice'}; name each once")
            if name == "png" and qualities != [LOSSLESS]:
                raise ValueError(f"png is lossless; give it the quality {LOSSLESS} alone")
            if name.startswith("jpeg") and LOSSLESS in qualities:
                raise ValueError(f"{name} is never lossless; choose qualities of at most {LOSSLESS - 1}")
        return images

    @field_validator("keep", "codecs", "code_channels", "strides", "bits", "precision", "rate_weights")
    @classmethod
    def _distinct(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise ValueError("values repeat; name each once")
        return values

    @field_validator("codecs")
    @classmethod
    def _raw_alone(cls, kinds: list[str]) -> list[str]:
        raw = [kind for kind in kinds if kind.startswith("raw")]
        if raw and len(kinds) > 1:
            raise ValueError(f"{raw[0]} sends the whole feature of a half that nothing is pruned from, another space than the rest; search it alone")
        return kinds


class Objective(Section):
    minimize: Literal["latency_ms", "wire_bytes", "energy_mj"] = Field(description="what the chosen candidate has least of")
    max_accuracy_drop: float = Field(ge=0, lt=1, description="below the unsplit backbone, on validation")
    max_latency_ms: Positive | None = Field(None, description="end to end; null = any")
    latency_rates_mbps: list[Positive] = Field([], description="link rates at which max_latency_ms must hold; none = the device's link.rate_mbps")
    latency_probabilities: list[Fraction] = Field([], description="of these rates, which sum to 1; none = it must hold at each of them")
    latency_share: Fraction = Field(0.95, description="of requests, by these probabilities, that must be within max_latency_ms")
    max_energy_mj: Positive | None = Field(None, description="of the device, an image; null = any")
    max_bundle_mb: Positive | None = Field(None, description="MB (1e6 bytes) of the bundle's networks; null = any")

    @model_validator(mode="after")
    def _rates(self) -> Self:
        if self.max_latency_ms is None and (self.latency_rates_mbps or self.latency_probabilities):
            raise ValueError("latency_rates_mbps says where max_latency_ms must hold, and that is not set; set it, or leave the rates out")
        if self.latency_probabilities and len(self.latency_probabilities) != len(self.latency_rates_mbps):
            given = f"latency_rates_mbps has {len(self.latency_rates_mbps)} values and latency_probabilities {len(self.latency_probabilities)}"
            raise ValueError(f"{given}; give one for each rate")
        if self.latency_probabilities and not math.isclose(sum(self.latency_probabilities), 1, abs_tol=1e-6):
            raise ValueError(f"latency_probabilities sum to {sum(self.latency_probabilities):g}; they must sum to 1")
        return self


class Evaluate(Section):
    latency_images: Count = Field(200, description="test images timed through the emulated link")
    warmup_images: int = Field(20, ge=0, description="images run before timing starts")


class Params(Section):
    run: Run
    data: Data
    backbone: Backbone
    pretrain: Pretrain
    codec: Codec = Codec()
    devices: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")], Device] = Field(min_length=1)
    supernet: Supernet = Supernet()
    search: Search
    objective: Objective
    finetune: Finetune
    evaluate: Evaluate

    @field_validator("devices")
    @classmethod
    def _no_clash(cls, devices: dict[str, Device]) -> dict[str, Device]:
        for name in ("data", "backbone"):
            if name in devices:
                raise ValueError(f"a device cannot be called {name}, artifacts/{name} is taken")
        return devices

    def device(self, name: str) -> Device:
        if name not in self.devices:
            raise ParamsError(f"params.yaml has no device {name}; it has {', '.join(self.devices)}.")
        return self.devices[name]


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses repeated keys and, as people expect, reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word, not a list or a mapping", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def parse_params(fields: Any, where: str = "params") -> Params:
    """Check `fields` (as read from YAML).

    Raises:
        ParamsError: the path of the first wrong key, what is there and what is allowed.
    """
    try:
        return Params.model_validate(fields)
    except ValidationError as error:
        raise ParamsError("\n".join(f"{where}: {_explain(item)}" for item in error.errors())) from None


def _explain(item: Any) -> str:
    path = ".".join(str(part) for part in item["loc"] if part != "[key]") or "the file"
    if item["type"] == "extra_forbidden":
        model: Any = Params
        for part in item["loc"][:-1]:
            field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
            if field is None:
                model = Device if item["loc"][0] == "devices" and len(item["loc"]) == 3 else LinkParams if item["loc"][0] == "devices" else model
            else:
                model = field.annotation
        known = ", ".join(getattr(model, "model_fields", {}))
        moved = f"it is {MOVED[path]} now; " if path in MOVED else ""
        return f"{path} is not a parameter; {moved}known here: {known}."
    if item["type"] == "missing":
        return f"{path} is missing; add it (docs/params.md says what it means)."
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error" and isinstance(item["input"], dict):  # what several keys of a section say together
        return f"{path}: {message}."
    return f"{path} is {item['input']!r}: {message[0].lower()}{message[1:]}."


def load_params(path: Path = PARAMS) -> Params:
    """Read and check `path`.

    Raises:
        ParamsError: the file is missing, is not YAML, or holds a wrong key, type or range.
    """
    try:
        fields = yaml.load(path.read_text(), Loader=_StrictLoader)
    except FileNotFoundError:
        raise ParamsError(f"{path} is missing; run in a folder that has one, for example the root of the repository.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ParamsError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None
    return parse_params(fields, str(path))


def _allowed(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " &#124; ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_allowed(option) for option in schema["anyOf"])
    words = f"list of {_allowed(schema['items'])}" if "items" in schema else str(schema.get("type", schema.get("const", "")))
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return ", ".join([words, *(f"{sign} {schema[key]}" for key, sign in limits.items() if key in schema)])


def markdown() -> str:
    """Every parameter as a Markdown table: key, what is allowed, default, meaning."""
    lines = ["| parameter | allowed | default | meaning |", "|---|---|---|---|"]

    def rows(section: type[Section], prefix: str) -> None:
        properties = section.model_json_schema()["properties"]
        for key, field in section.model_fields.items():
            annotation = Device if key == "devices" else field.annotation
            if isinstance(annotation, type) and issubclass(annotation, Section):
                rows(annotation, f"{prefix}{key}.NAME." if key == "devices" else f"{prefix}{key}.")
            else:
                default = "" if field.is_required() else f"`{'null' if field.default is None else field.default}`"
                lines.append(f"| `{prefix}{key}` | {_allowed(properties[key])} | {default} | {field.description or ''} |")

    rows(Params, "")
    return "\n".join(lines)
