import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.errors import ParamsError
from pipeline.params import Params, load_params, markdown, parse_params

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("params_file", [ROOT / "params.yaml", ROOT / "examples/cifar10/params.yaml"], ids=["root", "cifar10"])
def test_committed_params_are_valid(params_file):
    assert load_params(params_file).devices


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("search.bitz", [1], ["search.bitz is not a parameter", "bits"]),
        ("devices.camera.link.rate", 1, ["devices.camera.link.rate is not a parameter", "rate_mbps"]),
        ("run.threads", "two", ["run.threads is 'two'", "integer"]),
        ("search.bits", [0], ["search.bits.0 is 0", "greater than or equal to 1"]),
        ("search.bits", [9], ["search.bits.0 is 9", "less than or equal to 8"]),
        ("search.keep", [-0.1], ["search.keep.0 is -0.1", "greater than or equal to 0"]),
        ("search.strides", [3], ["search.strides.0 is 3", "1, 2, 4 or 8"]),
        ("search.bits", [2, 2], ["search.bits is [2, 2]", "values repeat"]),
        ("search.method", "guess", ["search.method is 'guess'", "'tpe', 'nsga2', 'random', 'uniform' or 'ddpg'"]),
        ("search.workers", 0, ["search.workers is 0", "greater than or equal to 1"]),
        ("search.ray_address", "here:1", ["search: executor is local and ray_address here:1; give executor ray an address, and local none"]),
        ("search.executor", "ray", ["search: executor is ray and ray_address None"]),
        ("search.precision", ["fp32", "fp32"], ["search.precision is ['fp32', 'fp32']", "values repeat"]),
        ("search.images", {}, ["search.images is {}"]),
        ("search.images", {"avif": [50]}, ["search.images.avif", "'webp', 'jpeg', 'jpeg-bare' or 'png'"]),
        ("search.images", {"webp": [50, 50]}, ["search.images", "webp has a quality twice; name each once"]),
        ("search.images", {"webp": []}, ["search.images", "webp has no quality"]),
        ("search.images", {"png": [50]}, ["search.images", "png is lossless; give it the quality 100 alone"]),
        ("search.images", {"jpeg": [100]}, ["search.images", "jpeg is never lossless; choose qualities of at most 99"]),
        ("data.source", "mnist", ["data.source is 'mnist'", "'digits', 'cifar10' or 'folder'"]),
        ("devices.camera.link.rate_mbps", -1.0, ["devices.camera.link.rate_mbps is -1.0", "greater than 0"]),
        ("devices.camera.link.rate_mbps", float("inf"), ["devices.camera.link.rate_mbps is inf"]),
        ("devices", {}, ["devices is {}"]),
        ("codec.kind", "rate", ["codec.kind is not a parameter; it is search.codecs, a list, now; known here: shares"]),
        ("search.codecs", [], ["search.codecs is []", "at least 1 item"]),
        ("search.codecs", ["rate", "zip"], ["search.codecs.1 is 'zip'", "'uniform', 'codebook', 'rate'"]),
        ("search.codecs", ["rate", "rate"], ["search.codecs is ['rate', 'rate']", "values repeat"]),
        ("search.codecs", ["rate", "raw-8bit"], ["search.codecs is ['rate', 'raw-8bit']", "raw-8bit sends the whole feature", "search it alone"]),
        ("codec.noise", [0.0, 0.1], ["codec.noise.0 is 0.0", "greater than 0"]),
        ("codec.noise", [0.1, float("nan")], ["codec.noise.1 is nan"]),
        ("codec.noise", [0.1], ["codec.noise is [0.1]", "at least 2 items"]),
        ("finetune.importance", "taylor", ["finetune: importance is taylor", "prune_epochs"]),
    ],
)
def test_wrong_key_type_or_range_names_the_path_and_what_is_allowed(digits_fields, path, value, words):
    *sections, key = path.split(".")
    target = digits_fields
    for section in sections:
        target = target[section]
    target[key] = value
    with pytest.raises(ParamsError) as caught:
        parse_params(digits_fields, "params.yaml")
    message = str(caught.value)
    assert message.startswith("params.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_key_is_named(digits_fields):
    del digits_fields["objective"]["minimize"]
    with pytest.raises(ParamsError, match=r"objective\.minimize is missing"):
        parse_params(digits_fields)


def test_a_device_cannot_take_the_folder_of_another_artefact(digits_fields):
    digits_fields["devices"]["data"] = digits_fields["devices"]["camera"]
    with pytest.raises(ParamsError, match="artifacts/data is taken"):
        parse_params(digits_fields)


def test_unknown_device_lists_the_known_ones(digits_params):
    with pytest.raises(ParamsError, match=r"no device robot; it has camera"):
        digits_params.device("robot")


def test_repeated_yaml_keys_are_refused(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("run: {seed: 1}\nrun: {seed: 2}\n")
    with pytest.raises(ParamsError, match="the key run appears twice"):
        load_params(file)


def test_scientific_notation_without_a_point_is_a_number(digits_fields, tmp_path):
    text = yaml.safe_dump(digits_fields).replace(f"weight_decay: {digits_fields['pretrain']['weight_decay']}", "weight_decay: 1e-4")
    (tmp_path / "params.yaml").write_text(text)
    assert load_params(tmp_path / "params.yaml").pretrain.weight_decay == pytest.approx(1e-4)


def test_a_missing_file_says_where_to_run(tmp_path):
    with pytest.raises(ParamsError, match="root of the repository"):
        load_params(tmp_path / "params.yaml")


def test_a_typo_stops_a_stage_before_torch_is_imported(workdir):
    text = (workdir / "params.yaml").read_text().replace("trials:", "trails:")
    (workdir / "params.yaml").write_text(text)
    code = "import sys; from pipeline.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code, "search"], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False)
    assert run.returncode == 1
    assert "search.trails is not a parameter" in run.stderr
    assert "Traceback" not in run.stderr


def test_documentation_of_params_is_up_to_date():
    assert markdown() in (ROOT / "docs/params.md").read_text()


def test_every_field_is_documented_with_its_meaning():
    def walk(section):
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                yield from walk(field.annotation)
            elif name != "devices":
                yield name, field.description

    assert [name for name, description in walk(Params) if not description] == []


def test_a_key_that_is_no_word_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text("run: {? [1, 2] : 3}\n")
    with pytest.raises(ParamsError, match="a key must be a word"):
        load_params(tmp_path / "params.yaml")
