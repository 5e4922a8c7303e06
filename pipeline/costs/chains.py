"""Random small ONNX models that a device is measured with, so that kernels never measured can be foreseen (METHODS 4)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.onnx_export import OPSET
from pipeline.quantising import quantise

CHAINS = 480  # measured in half a minute of a server's core
MAX_MACS = 40e6  # of a convolution: what takes ten milliseconds says no more than what takes two
MAX_ELEMENTS = 1 << 20  # of a tensor
_ACTIVATIONS = ("", "Relu", "Relu", "HardSwish", "Silu", "Clip", "Sigmoid", "HardSigmoid")
_INT8_SHARE = 3  # one chain in so many


@dataclass(frozen=True)
class Chain:
    """An ONNX model of a few nodes with one input (batch, ...), float32, or uint8 where it begins with a decoder."""

    model: bytes
    precision: Literal["fp32", "int8"]


def random_chains(count: int = CHAINS, seed: int = 0) -> list[Chain]:
    """`count` chains over the kernels of classifiers' halves at 8 to 224 pixels; the same ones for the same seed.

    They are stems, plain, residual, inverted (with squeeze-excitation), dense and pooled blocks, classifiers, encoders and decoders, half of them with widths
    that are multiples of 8. All are cheap: they run in a millisecond or few on a processor of a phone or better.
    """
    draw = random.Random(seed)
    return [_chain(draw, "int8" if number % _INT8_SHARE == _INT8_SHARE - 1 else "fp32", number) for number in range(count)]


def _chain(draw: random.Random, precision: Literal["fp32", "int8"], number: int) -> Chain:
    kinds = _INT8 if precision == "int8" else _FLOAT
    graph = kinds[number // _INT8_SHARE % len(kinds)](draw)
    if precision == "fp32":
        return Chain(graph.model(), precision)
    example = np.random.default_rng(number).standard_normal((2, *graph.input_shape)).astype(np.float32)
    return Chain(quantise(graph.model(), [example]), precision)


class _Graph:
    """A model under construction: each method adds a layer after `at`, the last one unless told, and returns its name."""

    def __init__(self, draw: random.Random, input_shape: tuple[int, ...], element: int = TensorProto.FLOAT) -> None:
        self.draw, self.input_shape, self.element = draw, input_shape, element
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.shapes: dict[str, tuple[int, ...]] = {"x": input_shape}
        self.at = "x"
        self.random = np.random.default_rng(draw.getrandbits(32))

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        self.at = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [self.at], name=self.at, **attributes))
        self.shapes[self.at] = shape
        return self.at

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weights(self, *shape: int) -> str:
        return self.constant((self.random.standard_normal(shape) / math.sqrt(max(math.prod(shape[1:]), 1))).astype(np.float32))

    def conv(self, width: int, kernel: int = 3, stride: int = 1, groups: int = 1, activation: str = "", at: str | None = None) -> str:
        source = at or self.at
        channels, height, wide = self.shapes[source]
        out = (height - 1) // stride + 1, (wide - 1) // stride + 1
        weights = [self.weights(width, channels // groups, kernel, kernel), self.weights(width)]
        sizes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4, "group": groups}
        self.node("Conv", [source, *weights], (width, *out), **sizes)
        return self.activate(activation)

    def activate(self, activation: str) -> str:
        source, shape = self.at, self.shapes[self.at]
        if activation == "Silu":
            return self.node("Mul", [source, self.node("Sigmoid", [source], shape)], shape)
        if activation == "Clip":
            return self.node("Clip", [source, self.constant(np.float32(0)), self.constant(np.float32(6))], shape)
        if activation == "HardSigmoid":
            return self.node(activation, [source], shape, alpha=1 / 6)
        return self.node(activation, [source], shape) if activation else source

    def join(self, op: str, first: str, second: str) -> str:
        shapes = self.shapes[first], self.shapes[second]
        if op == "Concat":
            return self.node(op, [first, second], (shapes[0][0] + shapes[1][0], *shapes[0][1:]), axis=1)
        return self.node(op, [first, second], max(shapes, key=math.prod))

    def pool(self, op: str, kernel: int, stride: int, padding: int) -> str:
        channels, *sides = self.shapes[self.at]
        out = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
        return self.node(op, [self.at], (channels, *out), kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[padding] * 4)

    def mean(self) -> str:
        return self.node("ReduceMean", [self.at, self.constant(np.array([-1, -2]))], (self.shapes[self.at][0], 1, 1), keepdims=1)

    def linear(self, width: int, activation: str = "") -> str:
        features = self.shapes[self.at][0]
        self.node("Gemm", [self.at, self.weights(width, features), self.weights(width)], (width,), transB=1)
        return self.activate(activation)

    def scalar(self, op: str, value: float) -> str:
        return self.node(op, [self.at, self.constant(np.float32(value))], self.shapes[self.at])

    def model(self) -> bytes:
        last = next(node for node in self.nodes if node.output[0] == self.at)
        output = TensorProto.UINT8 if last.op_type == "Cast" else TensorProto.FLOAT
        shapes = [helper.make_tensor_value_info(name, kind, ["batch", *self.shapes[name]]) for name, kind in (("x", self.element), (self.at, output))]
        graph = helper.make_graph(self.nodes, "chain", shapes[:1], shapes[1:], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        data: bytes = model.SerializeToString(deterministic=True)
        return data


def _side(draw: random.Random, least: int = 2, most: int = 112) -> int:
    return round(math.exp(draw.uniform(math.log(least), math.log(most))))


def _width(draw: random.Random, side: int, least: int = 4, most: int = 512) -> int:
    """Channels of a map of `side`, of a tensor that is not too large, half of the time a multiple of 8."""
    most = max(least, min(most, MAX_ELEMENTS // side**2, round(math.sqrt(MAX_MACS / (9 * side**2)))))
    width = round(math.exp(draw.uniform(math.log(least), math.log(most))))
    return max(8, width // 8 * 8) if draw.random() < 0.5 else width


def _stem(draw: random.Random) -> _Graph:
    side, kernel, stride = draw.choice(
        [(32, 3, 1), (32, 3, 1), (64, 3, 2), (96, 3, 2), (128, 3, 2), (224, 3, 2), (224, 7, 2), (64, 7, 2), (8, 3, 1), (28, 3, 1)]
    )
    graph = _Graph(draw, (3, side, side))
    graph.conv(_width(draw, side // stride, 8, 64), kernel, stride, activation=draw.choice(_ACTIVATIONS[1:5]))
    if kernel == 7:
        graph.pool("MaxPool", 3, 2, 1)
    graph.conv(_width(draw, graph.shapes[graph.at][1], 8, 64), activation="Relu")
    return graph


def _plain(draw: random.Random) -> _Graph:
    side = _side(draw)
    graph = _Graph(draw, (_width(draw, side), side, side))
    for _ in range(3):
        side = graph.shapes[graph.at][1]
        graph.conv(_width(draw, side), draw.choice((1, 1, 3, 3, 3, 5)), draw.choice((1, 1, 2)), activation=draw.choice(_ACTIVATIONS))
    return graph


def _residual(draw: random.Random) -> _Graph:
    side = _side(draw)
    width, between, stride = _width(draw, side), _width(draw, side), draw.choice((1, 1, 2))
    graph = _Graph(draw, (_width(draw, side), side, side))
    start = graph.conv(width, activation="Relu")
    wide = width if stride == 1 else _width(draw, side // 2)
    graph.conv(between, 3, stride, activation="Relu")
    end = graph.conv(wide)
    shortcut = start if stride == 1 else graph.conv(wide, 1, stride, at=start)
    graph.join("Add", end, shortcut)
    graph.activate("Relu")
    graph.conv(_width(draw, graph.shapes[graph.at][1]), 1)
    return graph


def _inverted(draw: random.Random) -> _Graph:
    side, activation = _side(draw), draw.choice(("Relu", "HardSwish", "Silu", "Clip"))
    width, wide = _width(draw, side, 8, 96), _width(draw, side, 16, 576)
    graph = _Graph(draw, (width, side, side))
    start = graph.conv(width, 1)
    graph.conv(wide, 1, activation=activation)
    stride = draw.choice((1, 1, 2))
    inner = graph.conv(wide, draw.choice((3, 3, 5)), stride, groups=wide, activation=activation)
    if draw.random() < 0.5:
        graph.mean()
        graph.conv(max(1, round(wide / draw.choice((4, 8, 24)))), 1, activation=draw.choice(("Relu", "Silu")))
        graph.join("Mul", graph.conv(wide, 1, activation=draw.choice(("HardSigmoid", "Sigmoid"))), inner)
    end = graph.conv(width, 1)
    if stride == 1:
        graph.join("Add", end, start)
    graph.conv(_width(draw, graph.shapes[graph.at][1], 8, 128), 1)
    return graph


def _dense(draw: random.Random) -> _Graph:
    side = _side(draw, 2, 56)
    growth = _width(draw, side, 4, 48)
    graph = _Graph(draw, (_width(draw, side, 16, 256), side, side))
    start = graph.conv(_width(draw, side, 16, 512), 1)
    graph.conv(_width(draw, side, 16, 128), 1, activation="Relu")
    graph.join("Concat", start, graph.conv(growth))
    width, *sides = graph.shapes[graph.at]
    numbers = [graph.constant(np.full(width, value, np.float32)) for value in (1.1, 0.1, 0.1, 0.9)]
    graph.node("BatchNormalization", [graph.at, *numbers], (width, *sides))
    graph.activate("Relu")
    graph.conv(_width(draw, side, 16, 128), 1)
    return graph


def _pooled(op: str, draw: random.Random) -> _Graph:
    side = _side(draw, 4, 64)
    graph = _Graph(draw, (_width(draw, side), side, side))
    graph.conv(_width(draw, side), activation="Relu")
    graph.pool(op, *draw.choice(((2, 2, 0), (2, 2, 0), (3, 2, 1))))
    graph.conv(_width(draw, graph.shapes[graph.at][1]), draw.choice((1, 3)), activation="Relu")
    return graph


def _classifier(draw: random.Random) -> _Graph:
    side = _side(draw, 2, 14)
    graph = _Graph(draw, (_width(draw, side, 8, 256), side, side))
    width = _width(draw, side, 16, 768)
    graph.conv(width, 1, activation=draw.choice(_ACTIVATIONS[1:5]))
    graph.mean()
    graph.node("Reshape", [graph.at, graph.constant(np.array([-1, width]))], (width,))
    graph.linear(round(math.exp(draw.uniform(math.log(16), math.log(1024)))), draw.choice(("Relu", "HardSwish", "")))
    graph.linear(draw.choice((10, 100, 1000)))
    return graph


def _encoder(draw: random.Random) -> _Graph:
    side = _side(draw, 4, 56)
    graph = _Graph(draw, (_width(draw, side), side, side))
    graph.conv(_width(draw, side), activation="Relu")
    graph.conv(draw.choice((1, 2, 4, 6, 8, 12, 16, 32)), *draw.choice(((1, 1), (3, 2))))
    graph.scalar("Div", 4)
    graph.scalar("Add", 0.5)
    graph.node("Clip", [graph.at, graph.constant(np.float32(0)), graph.constant(np.float32(1))], graph.shapes[graph.at])
    graph.scalar("Mul", 15)
    graph.node("Round", [graph.at], graph.shapes[graph.at])
    graph.node("Cast", [graph.at], graph.shapes[graph.at], to=TensorProto.UINT8)
    return graph


def _decoder(draw: random.Random) -> _Graph:
    side, stride = _side(draw, 2, 28), draw.choice((1, 2, 2))
    code, width = draw.choice((1, 2, 4, 8, 16, 32)), _width(draw, side * stride)
    graph = _Graph(draw, (code, side, side), TensorProto.UINT8)
    graph.node("Cast", [graph.at], graph.shapes[graph.at], to=TensorProto.FLOAT)
    graph.scalar("Div", 15)
    kernel, weights = 2 * stride - 1, [graph.weights(code, width, 2 * stride - 1, 2 * stride - 1), graph.weights(width)]
    sizes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [stride - 1] * 4, "output_padding": [stride - 1] * 2}
    graph.node("ConvTranspose", [graph.at, *weights], (width, side * stride, side * stride), **sizes)
    graph.activate(draw.choice(("", "Relu")))
    graph.conv(_width(draw, side * stride), activation="Relu")
    return graph


_MAX, _AVERAGE = partial(_pooled, "MaxPool"), partial(_pooled, "AveragePool")
_Kinds = tuple[Callable[[random.Random], _Graph], ...]
_FLOAT: _Kinds = (_stem, _plain, _plain, _residual, _inverted, _inverted, _dense, _MAX, _AVERAGE, _classifier, _encoder, _decoder)
_INT8: _Kinds = (_stem, _plain, _residual, _inverted, _inverted, _dense, _MAX, _AVERAGE, _classifier, _encoder)
