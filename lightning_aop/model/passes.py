"""How many images go through a model at once, and how many have gone through it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_aop.model.isolation import unwrap

__all__ = ["Evaluations", "count_evaluations"]


@dataclass
class Evaluations:
    """How many images went through a model: `forward`, and back again: `backward`."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """The cost in model evaluations: a forward is 1, a forward with its backward is 2."""
        return self.forward + self.backward


@contextmanager
def count_evaluations(
    model: nn.Module, on_change: Callable[[Evaluations], None] | None = None
) -> Iterator[Evaluations]:
    """Count the images that pass through `model` inside the block."""
    count = Evaluations()

    def backward(gradient: Tensor) -> None:
        count.backward += len(gradient)

    def forward(module: nn.Module, args: object, output: object) -> None:
        logits = getattr(output, "logits", output)
        if isinstance(logits, Tensor):
            count.forward += len(logits)
            if logits.requires_grad:
                logits.register_hook(backward)
            if on_change is not None:
                on_change(count)

    handle = unwrap(model).register_forward_hook(forward)
    try:
        yield count
    finally:
        handle.remove()
