"""Backbones by name, and the weights that fit them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.backbones import build_backbone
from pipeline.errors import ModelError

GIVEN = Path(__file__).resolve().parents[3] / "shared" / "weights"


@pytest.mark.parametrize(
    ("name", "image_size"),
    [("resnet20", 16), ("cifar_resnet18", 16), ("mlp", 8), ("squeezenet1_1", 32), ("googlenet", 32), ("inception_v3", 75)],
)
def test_backbone_gives_one_logit_per_class(name: str, image_size: int) -> None:
    model = build_backbone(name, 7, image_size)
    for mode in (True, False):
        assert model.train(mode)(torch.rand(2, 3, image_size, image_size)).shape == (2, 7)


@pytest.mark.parametrize(("name", "params"), [("resnet20", 272_474), ("resnet56", 855_770)])
def test_given_weights_load(name: str, params: int) -> None:
    weights = GIVEN / f"{name}-cifar10jpeg.safetensors"
    if not weights.exists():
        pytest.skip(f"no given weights: {weights} does not exist")
    fresh = build_backbone(name, 10, 32)
    loaded = build_backbone(name, 10, 32, weights)
    assert sum(parameter.numel() for parameter in loaded.parameters()) == params
    assert not torch.equal(loaded.state_dict()["fc.weight"], fresh.state_dict()["fc.weight"])


def test_saved_weights_give_the_same_logits(tmp_path: Path) -> None:
    model = build_backbone("resnet20", 3, 8).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(build_backbone("resnet20", 3, 8, tmp_path / "weights.safetensors").eval()(images), model(images))


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = build_backbone("resnet20", 4, 8).state_dict()
    del state["bn1.weight"]
    state["extra"] = torch.zeros(1)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"1 missing \(bn1.weight\); 1 unexpected \(extra\); 2 misshapen \(fc.weight \[4, 64\] not \[3, 64\]"):
        build_backbone("resnet20", 3, 8, tmp_path / "weights.safetensors")


def test_a_long_list_of_misfits_is_cut_short(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"128 missing \(([\w.]+, ){5}\.\.\.\)"):
        build_backbone("resnet20", 3, 8, tmp_path / "weights.safetensors")


def test_weights_that_are_missing_or_no_safetensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent.safetensors cannot be read as safetensors"):
        build_backbone("resnet20", 3, 8, tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(ModelError, match=r"text.safetensors cannot be read as safetensors"):
        build_backbone("resnet20", 3, 8, tmp_path / "text.safetensors")


def test_an_unknown_name_gets_close_ones() -> None:
    with pytest.raises(ModelError, match=r"'resnt18' is unknown; .*did you mean .*resnet18"):
        build_backbone("resnt18", 10, 32)


def test_an_image_size_the_network_refuses_is_said() -> None:
    with pytest.raises(ModelError, match="vit_b_16 cannot be built for 30-pixel images"):
        build_backbone("vit_b_16", 10, 30)


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package of the user's own, on the path."""
    (tmp_path / "ownnets.py").write_text(
        "from torch import nn\n"
        "def small(num_classes, image_size):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))\n"
        "def unsized(num_classes):\n    return nn.Identity()\n"
        "def number(num_classes, image_size):\n    return 3\n"
        "def fragile(num_classes, image_size):\n    return nn.Linear(-1, num_classes)\n"
    )
    (tmp_path / "brokennets.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "ownnets"
    for name in ("ownnets", "brokennets"):
        sys.modules.pop(name, None)


def test_own_function_builds_the_backbone(own_package: str) -> None:
    assert build_backbone(f"{own_package}:small", 5, 4)(torch.rand(2, 3, 4, 4)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ownnets:smal", "has no function 'smal'; did you mean small"),
        ("ownnets:unsized", r"called as unsized\(num_classes=..., image_size=...\), but got an unexpected keyword argument 'image_size'"),
        ("ownnets:number", "returned int; return a torch.nn.Module"),
        ("ownnets:fragile", r"fragile raised RuntimeError \(.*negative dimension.*\); mend it"),
        ("brokennets:small", r"'brokennets' cannot be imported \(No module named 'no_such_library'\)"),
        ("absentnets:small", "'absentnets' cannot be imported"),
    ],
)
def test_own_function_that_cannot_serve_is_explained(own_package: str, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_backbone(name, 5, 4)
