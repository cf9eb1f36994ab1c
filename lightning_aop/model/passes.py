"""How many images go through a model at once, and how many have gone through it."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_aop.checks import require_counts
from lightning_aop.model.batches import members
from lightning_aop.model.isolation import hooked, unwrap

__all__ = ["Evaluations", "Passes", "count_evaluations", "pass_size"]

T = TypeVar("T")

_USUAL = 32  # images in a pass, where nobody has said how many
# Pixels in a pass on a CPU, with a backward and without; measured on three networks, one thread.
_ON_CPU = {True: 8 * 224**2, False: 20 * 224**2}
# Pixels in a pass from which on an accelerator gets no faster; measured on an H100 with ResNet50.
_FLAT = 128 * 224**2
_MOST = 1024  # images in a pass, whatever their size
_SHARE = 0.5  # of the free memory that passes may take
_BESIDE = 1.5  # what a pass takes, by what its graph keeps: gradients and workspaces come on top
_PATIENCE = 8  # pieces of work that went well before a larger pass is tried again


# --------------------------------------------------------------------------------------------------
# how many at once


def pass_size(
    wanted: int | None,
    rows: int = 0,
    images: Tensor | None = None,
    cost: Callable[[], int | None] | None = None,
    rounds: int = 1,
) -> int:
    """Return how many images to take through the model in one pass.

    Args:
        wanted: the `eval_batch_size` of a method or a metric; None for what suits the device.
        rows: how many images there are; the usual number goes through without a look at the memory,
            unless there are several rounds of them.
        images: some of them, by which the device and their size are known.
        cost: returns how many bytes an image takes in a pass, None if the memory may not decide; is
            called only on an accelerator.
        rounds: how often so many images will go through.

    Returns:
        `wanted`, or fewer inside `Passes.within_memory` where there was too little memory for it.
    """
    active = _active.get()
    size = wanted or (None if active is None else active.usual)
    if size is None:
        size = _USUAL
        if images is not None and cost is not None:
            size = _suiting(rows, images, cost, rounds)
    if active is None:
        return size
    if active.limit is not None:
        size = min(size, active.limit)
    active.largest = max(active.largest, size)
    return size


def _suiting(rows: int, images: Tensor, cost: Callable[[], int | None], rounds: int) -> int:
    """Return as many images as make a pass faster, and on an accelerator as fit into its memory."""
    free = FREE_MEMORY.get(images.device.type)
    pixels = images[0, 0].numel()
    if free is None and images.device.type != "cpu":
        return _USUAL
    if free is None:
        # Larger ones take longer for an image, and up to twice as long with a backward.
        return min(_USUAL, max(4, _ON_CPU[torch.is_grad_enabled()] // pixels))
    if rows * rounds <= _USUAL:
        return _USUAL
    taken = cost()
    if taken is None:
        return _USUAL
    fastest = min(_MOST, max(_USUAL, _FLAT // pixels))
    fitting = int(_SHARE * free(images.device) / (_BESIDE * max(taken, 1)))
    # Powers of two, so that a little more or less memory gives the same passes, and the same maps.
    return 1 << (max(1, min(fastest, fitting)).bit_length() - 1)


def _free_on_cuda(device: torch.device) -> int:
    """Return the bytes that torch could still get, and those that it holds and doesn't use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


FREE_MEMORY: dict[str, Callable[[torch.device], int]] = {"cuda": _free_on_cuda}
"""The free bytes of a device, by its type; on others passes have the usual number of images."""


def kept_bytes(work: Callable[[], object], model: nn.Module) -> int:
    """Return the bytes that the graph of some work keeps for its backward, but for the weights."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = work()  # until the end, so that no address is another's meanwhile
    del held
    return sum(kept.values())


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long some work takes on a device when it is done the second time."""
    work()
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def slices(count: int, size: int) -> list[slice]:
    """Return the parts of so many rows, each of `size` at most."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class Passes:
    """The number of images in a pass, halved while there is too little memory.

    Attributes:
        usual: images in a pass where a method or metric doesn't ask for another number; None for what
            suits the device.
        graphs: "auto" to replay passes as CUDA graphs where that is possible and pays, or False.
        limit: the most images in a pass, and the most that a method or metric is given at once; None
            as long as memory has sufficed.
        largest: the largest pass of the work that is being done.
    """

    def __init__(self, usual: int | None = None, graphs: Literal["auto", False] = "auto") -> None:
        require_counts("Passes", eval_batch_size=usual)
        self.usual = usual
        self.graphs = graphs
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


def graphs_wanted() -> bool:
    """Tell whether passes may be replayed as CUDA graphs."""
    active = _active.get()
    return active is not None and active.graphs == "auto"


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


_counts: list[tuple[Evaluations, Callable[[Evaluations], None] | None]] = []
"""What counts now."""

_uncounted = [False]  # not a ContextVar: hooks of a backward run on threads of their own


@contextmanager
def uncounted() -> Iterator[None]:
    """Count nothing in the block."""
    before, _uncounted[0] = _uncounted[0], True
    try:
        yield
    finally:
        _uncounted[0] = before


def recorded(work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """Do some work; return its result, and what counts its evaluations once more."""
    before = [(count, on_change, count.forward, count.backward) for count, on_change in _counts]
    result = work()
    added = [(c, told, c.forward - f, c.backward - b) for c, told, f, b in before]

    def again() -> None:
        for count, on_change, forward, backward in added:
            count.forward += forward
            count.backward += backward
            if forward and on_change is not None:
                on_change(count)

    return result, again


@contextmanager
def count_evaluations(
    model: nn.Module, on_change: Callable[[Evaluations], None] | None = None
) -> Iterator[Evaluations]:
    """Count the images that pass through `model` inside the block, whatever it gives for them."""
    count = Evaluations()

    def forward(module: nn.Module, args: object, output: object) -> None:
        if _uncounted[0]:
            return
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
    counting = (count, on_change)
    _counts.append(counting)
    try:
        yield count
    finally:
        _counts[:] = [each for each in _counts if each is not counting]
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
