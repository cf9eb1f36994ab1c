"""How many images go through a model at once, and how many have gone through it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_aop.checks import require_positive
from lightning_aop.model.batches import members
from lightning_aop.model.isolation import hooked, unwrap

__all__ = ["Evaluations", "Passes", "count_evaluations", "pass_size"]

T = TypeVar("T")

_USUAL = 32  # images in a pass, where nobody has said how many
_PATIENCE = 8  # pieces of work that went well before a larger pass is tried again


# --------------------------------------------------------------------------------------------------
# how many at once


def pass_size(wanted: int | None) -> int:
    """Return how many images to take through the model in one pass.

    Args:
        wanted: the `eval_batch_size` of a method or a metric; None for the usual number.

    Returns:
        `wanted`, or fewer inside `Passes.within_memory` where there was too little memory for it.
    """
    active = _active.get()
    if active is None:
        return wanted or _USUAL
    size = wanted or active.usual
    if active.limit is not None:
        size = min(size, active.limit)
    active.largest = max(active.largest, size)
    return size


class Passes:
    """The number of images in a pass, halved while there is too little memory.

    Attributes:
        usual: images in a pass where a method or metric doesn't ask for another number.
        limit: the most images in a pass, and the most that a method or metric is given at once; None
            as long as memory has sufficed.
        largest: the largest pass of the work that is being done.
    """

    def __init__(self, usual: int | None = None) -> None:
        if usual is not None:
            require_positive("Passes", eval_batch_size=usual)
        self.usual = usual or _USUAL
        self.limit: int | None = None
        self.largest = 0
        self._first: int | None = None  # the pass that was too large at first
        self._went_well = 0

    def within_memory(self, work: Callable[[], T], images: int) -> tuple[T, bool]:
        """Do the work, again with half as many images in a pass where memory runs out.

        Args:
            work: what is done; it asks `pass_size` and `at_once`.
            images: how many images it is about.

        Returns:
            Its result, and whether memory ran out on the way.

        Raises:
            Exception: what the work raised; out of memory with one image in a pass.
        """
        ran_out = False
        while True:
            self.largest = 0
            token = _active.set(self)
            try:
                result = work()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                size = self.limit or self.largest or images
                if not out_of_memory(error) or size == 1:
                    raise
            else:
                self._grow()
                return result, ran_out
            finally:
                _active.reset(token)
            # Out of the handler, whose traceback holds on to the tensors of the failed pass.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            ran_out, self._went_well = True, 0
            self._first = self._first or size
            self.limit = size // 2

    def at_once(self, images: int) -> int:
        """Return how many of the images to hand to a method or metric, which may take no chunks."""
        return max(1, min(images, self.limit or images))

    def in_parts(self, work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return what the work makes of the tensors, as many rows at once as `at_once` says."""
        size = self.at_once(len(tensors[0]))
        parts = zip(*(each.split(size) for each in tensors), strict=True)
        return torch.cat([work(*part) for part in parts])

    def _grow(self) -> None:
        """Try larger passes again after some that went well: what filled the memory may be gone."""
        if self.limit is None:
            return
        self._went_well += 1
        if self._went_well >= _PATIENCE:
            self._went_well, self.limit = 0, 2 * self.limit
            if self._first is not None and self.limit >= self._first:
                self.limit = self._first = None


_active: ContextVar[Passes | None] = ContextVar("_active", default=None)


def out_of_memory(error: BaseException) -> bool:
    """Tell a lack of memory, on any device, from other errors."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


# --------------------------------------------------------------------------------------------------
# counting


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
    """Count the images that pass through `model` inside the block, whatever it gives for them."""
    count = Evaluations()

    def forward(module: nn.Module, args: object, output: object) -> None:
        images, tensors = images_of(output)
        count.forward += images
        counted: list[int] = []  # the output whose gradients are counted, of several

        def backward(index: int, gradient: Tensor) -> None:
            counted[:] = counted or [index]
            count.backward += images * (index == counted[0])

        for index, tensor in enumerate(tensors):
            if tensor.requires_grad:
                tensor.register_hook(partial(backward, index))
        if images and on_change is not None:
            on_change(count)

    handle = hooked(unwrap(model), forward)
    try:
        yield count
    finally:
        handle.remove()


def images_of(output: object) -> tuple[int, list[Tensor]]:
    """Return for how many images an output is, and its tensors."""
    tensors = list(_tensors(output))
    if isinstance(output, (list, tuple)) and output and isinstance(output[0], Mapping):
        return len(output), tensors  # detections, one dictionary for each image
    first = next((tensor for tensor in tensors if tensor.ndim), None)
    return (0 if first is None else len(first)), tensors


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    else:
        for _, part in members(output):
            yield from _tensors(part)
