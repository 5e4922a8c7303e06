"""What a student is told about its teacher (METHODS 3)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def label_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of logits (B, classes), mean over the batch; labels int64 (B,), or shares (B, K <= classes) of the first K classes."""
    if labels.ndim == 2:
        labels = F.pad(labels, (0, logits.shape[1] - labels.shape[1]))
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def logits_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of softened logits (B, classes), mean over the batch (arXiv 1503.02531)."""
    student, wanted = (F.log_softmax(values.float() / temperature, dim=1) for values in (logits, teacher))
    return temperature**2 * F.kl_div(student, wanted, reduction="batchmean", log_target=True)


def feature_loss(decoded: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of the decoded feature, as a share of the teacher's mean square, so that one weight suits every cut."""
    return F.mse_loss(decoded, wanted) / wanted.square().mean().clamp_min(1e-6)
