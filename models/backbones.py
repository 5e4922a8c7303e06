"""Image classifiers by name: ours, any torchvision one, or the user's own function."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from models.cifar import MLP, CifarResNet, cifar_resnet18
from pipeline.errors import ModelError

OURS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet8": lambda num_classes, image_size: CifarResNet(8, num_classes),
    "resnet20": lambda num_classes, image_size: CifarResNet(20, num_classes),
    "resnet56": lambda num_classes, image_size: CifarResNet(56, num_classes),
    "cifar_resnet18": lambda num_classes, image_size: cifar_resnet18(num_classes),
    "mlp": MLP,
}


def _one_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "").strip().rstrip(".") or type(error).__name__


def _torchvision(name: str, num_classes: int, image_size: int) -> nn.Module:
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options["image_size"] = image_size
    elif name == "maxvit_t":
        options["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):  # auxiliary heads would make training return a tuple
        options = {"aux_logits": False, "init_weights": True}
    try:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    except (AssertionError, ValueError) as error:
        raise ModelError(
            f"backbone {name} cannot be built for {image_size}-pixel images: {_one_line(error)}; change data.image_size or backbone.name."
        ) from error


def _own(name: str, num_classes: int, image_size: int) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module runs on import and may raise anything
        raise ModelError(f"backbone {name}: module {module_name!r} cannot be imported ({_one_line(error)}); run from the folder that holds it.") from error
    build = getattr(module, function_name, None)
    if not callable(build):
        raise ModelError(f"backbone {name}: module {module_name} has no function {function_name!r}{_close(function_name, dir(module))}.")
    try:
        inspect.signature(build).bind(num_classes=num_classes, image_size=image_size)
    except TypeError as error:
        raise ModelError(f"backbone {name}: {function_name} is called as {function_name}(num_classes=..., image_size=...), but {_one_line(error)}.") from error
    try:
        model = build(num_classes=num_classes, image_size=image_size)
    except Exception as error:  # the user's function may raise anything
        raise ModelError(f"backbone {name}: {function_name} raised {type(error).__name__} ({_one_line(error)}); mend it.") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"backbone {name}: {function_name} returned {type(model).__name__}; return a torch.nn.Module.")
    return model


def _close(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(matches)}?" if matches else ""


def _load(model: nn.Module, name: str, path: Path) -> None:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"weights {path} cannot be read as safetensors ({_one_line(error)}); give a file written by safetensors.torch.save_file.") from error
    expected = model.state_dict()
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "misshapen": [
            f"{key} {list(state[key].shape)} not {list(expected[key].shape)}" for key in expected if key in state and state[key].shape != expected[key].shape
        ],
    }
    found = [f"{len(keys)} {kind} ({', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''})" for kind, keys in problems.items() if keys]
    if found:
        raise ModelError(f"weights {path} do not fit {name}: {'; '.join(found)}; give weights of this backbone with this many classes, or none.")
    model.load_state_dict(state)


def build_backbone(name: str, num_classes: int, image_size: int, weights: Path | None = None) -> nn.Module:
    """The classifier called `name`: float images (B, 3, image_size, image_size) -> logits (B, num_classes).

    `name` is one of ours (`OURS`), a torchvision classifier (built without a download), or `package.module:function`, called as
    `function(num_classes=..., image_size=...)`. `weights` is a safetensors file that must fit name by name and shape by shape.
    Fresh weights are drawn from torch's global generator: seed it first.

    Raises:
        ModelError: an unknown name, a function that cannot be imported or called, an image size the network refuses, weights that do not fit.
    """
    classifiers = torchvision.models.list_models(module=torchvision.models)
    if ":" in name:
        model = _own(name, num_classes, image_size)
    elif name in OURS:
        model = OURS[name](num_classes, image_size)
    elif name in classifiers:
        model = _torchvision(name, num_classes, image_size)
    else:
        hint = _close(name, [*OURS, *classifiers])
        raise ModelError(f"backbone {name!r} is unknown; use {', '.join(OURS)}, a torchvision classifier or package.module:function{hint}.")
    if weights is not None:
        _load(model, name, weights)
    return model
