"""Every artefact path, once. All are relative to the current directory, so a copy of the repository writes its own files."""

from pathlib import Path

PARAMS = Path("params.yaml")
PROFILES = Path("profiles")
ARTIFACTS = Path("artifacts")
STATE = Path(".coinfer")  # resumable state, outside the DVC outs

DATA = ARTIFACTS / "data"
DATA_CARD = DATA / "card.json"
BACKBONE = ARTIFACTS / "backbone"
BACKBONE_WEIGHTS = BACKBONE / "weights.safetensors"
BACKBONE_METRICS = BACKBONE / "metrics.json"
BACKBONE_CURVES = BACKBONE / "curves.csv"
STUDIES = STATE / "studies"
CHECKPOINTS = STATE / "checkpoints"


def split_file(split: str) -> Path:
    """The tensors of one split: `train`, `validation`, `gate` or `test`."""
    return DATA / f"{split}.safetensors"


def profile_file(name: str) -> Path:
    """The committed profile (or, for `measure`, the measuring plan) called `name`."""
    return PROFILES / f"{name}.json"


class DevicePaths:
    """Artefacts of the stages that run once per device."""

    def __init__(self, device: str) -> None:
        self.root = ARTIFACTS / device
        self.cuts = self.root / "profile" / "cuts.json"
        self.device_profile = self.root / "profile" / "device.json"
        self.edge_profile = self.root / "profile" / "edge.json"
        self.supernet = self.root / "supernet"
        self.trials = self.root / "search" / "trials.csv"
        self.pareto = self.root / "search" / "pareto.json"
        self.chosen = self.root / "search" / "chosen.json"
        self.progress = self.root / "search" / "progress.csv"
        self.importances = self.root / "search" / "importances.csv"
        self.learning = self.root / "search" / "learning.csv"
        self.split_weights = self.root / "finetune" / "split.safetensors"
        self.split_spec = self.root / "finetune" / "split.json"
        self.reference_weights = self.root / "finetune" / "reference.safetensors"
        self.finetune_metrics = self.root / "finetune" / "metrics.json"
        self.finetune_curves = self.root / "finetune" / "curves.csv"
        self.bundle = self.root / "bundle"
        self.reference_onnx = self.root / "export" / "reference.onnx"
        self.parity = self.root / "export" / "parity.json"
        self.metrics = self.root / "evaluate" / "metrics.json"
        self.plots = self.root / "evaluate" / "plots"
        self.timing = self.root / "timing.json"  # not locked: measured times differ from run to run
