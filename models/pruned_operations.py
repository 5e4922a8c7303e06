"""The operations of a pruned half, without pruning it."""

from __future__ import annotations

from torch import Tensor, nn

from models.channel_plan import ChannelPlan
from models.operations import Operation


class PrunedOperations:
    """What `operations(rebuild(head, plan), example)` gives for any plan of `head`, in a millisecond or few.

    Args:
        head: the unpruned half, traced (`models.cutting.split`), untouched.
        example: one input of it.
    """

    def __init__(self, head: nn.Module, example: Tensor) -> None:
        raise NotImplementedError

    def of(self, plan: ChannelPlan) -> tuple[Operation, ...]:
        """The operations left by `plan`.

        Raises:
            ModelError: the plan is another network's.
        """
        raise NotImplementedError
