"""The processes of a distributed run, working on one probe without waiting for each other in vain.

Every process has to take part in every exchange, or the others wait for ever. So work that may fail is
done inside `together`, which tells all of them of the failure of one.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_aop.errors import UserError

T = TypeVar("T")


class ProcessError(UserError, RuntimeError):
    """What went wrong on another process."""


class Processes:
    """All processes of the run, or this one alone."""

    def __init__(self, alike: bool = False) -> None:
        """`alike` is for a model whose forward exchanges something itself: all do the same work."""
        joined = dist.is_available() and dist.is_initialized()
        self.alike = alike
        self.size = dist.get_world_size() if joined else 1
        self.rank = dist.get_rank() if joined else 0

    @classmethod
    def alone(cls) -> "Processes":
        """Return this process alone."""
        team = cls()
        team.size, team.rank = 1, 0
        return team

    def from_first(self, work: Callable[[], T]) -> T:
        """Do the work on the first process, and return its result on all.

        Raises:
            Exception: on the first process, what the work raised.
            ProcessError: on the others, the same in words.
        """
        if self.size == 1:
            return work()
        result: Any = None
        failure: Exception | None = None
        if self.rank == 0:
            try:
                result = work()
            except Exception as error:
                failure = error
        content = [(result, None if failure is None else _words(failure))]
        with _answering():
            dist.broadcast_object_list(content, src=0)
        if failure is not None:
            raise failure
        (result, words) = content[0]
        if words is not None:
            raise ProcessError(f"on process 0: {words}")
        return result  # type: ignore[no-any-return]

    def together(self, work: Callable[[], T]) -> T:
        """Do work that exchanges nothing, on all processes; raise on all if it fails on any.

        Raises:
            Exception: what the work raised here.
            ProcessError: what it raised on another process.
        """
        if self.size == 1:
            return work()
        result: Any = None
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        words: list[Any] = [None] * self.size
        with _answering():
            dist.all_gather_object(words, None if failure is None else _words(failure))
        if failure is not None:
            raise failure
        for rank, theirs in enumerate(words):
            if theirs is not None:
                raise ProcessError(f"on process {rank}: {theirs}")
        return result  # type: ignore[no-any-return]

    def same(self, work: Callable[[], T]) -> T:
        """Return the first process's result of work that evaluates the model.

        Raises:
            Exception: what the work raised here, if it was done here.
            ProcessError: what it raised on another process.
        """
        if not self.alike:
            return self.from_first(work)
        result = self.together(work)
        return self.from_first(lambda: result)

    def any(self, fact: bool) -> bool:
        """Tell whether something is so on any of the processes."""
        facts = [fact] * self.size
        if self.size > 1:
            dist.all_gather_object(facts, fact)
        return any(facts)

    def all(self, mine: T) -> list[T]:
        """Return what each process has, in their order."""
        found = [mine] * self.size
        if self.size > 1:
            with _answering():
                dist.all_gather_object(found, mine)
        return found

    def share(self, count: int) -> Int[Tensor, " mine"]:
        """Return which of `count` pieces of work are this process's: every size-th."""
        return torch.arange(self.rank, count, self.size)

    def gather(self, mine: Float[Tensor, "mine h w"], count: int) -> Float[Tensor, "all h w"]:
        """Return the maps of all shares in the order of the pieces of work."""
        if self.size == 1:
            return mine
        most = -(-count // self.size)
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        shares = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(shares, padded)
        return torch.stack(shares, dim=1).flatten(0, 1)[:count]

    @contextmanager
    def buffers_of_first(self, model: nn.Module) -> Iterator[None]:
        """Let every process hold the first one's buffers inside the block.

        After a training step each has BatchNorm statistics of its own batches, and would explain a
        network of its own.
        """
        if self.size == 1:
            yield
            return
        buffers = [buffer for buffer in model.buffers() if buffer is not None]
        theirs = self.from_first(lambda: [buffer.detach().cpu() for buffer in buffers])
        own = [buffer.detach().clone() for buffer in buffers]
        try:
            _copy(theirs, buffers)
            yield
        finally:
            _copy(own, buffers)


@contextmanager
def _answering() -> Iterator[None]:
    """Say of a wait that was in vain what it means."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("time ?out|timed out|closed by peer", str(error), re.IGNORECASE):
            raise
        raise ProcessError(
            "another process did not answer in time: it has ended, or hangs in the model's forward, the "
            "method, a metric or a sink, and training will wait for it in vain, too. The time is the "
            "timeout of the strategy's process group"
        ) from error


def _copy(values: list[Tensor], buffers: list[Tensor]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for value, buffer in zip(values, buffers, strict=True):
            with torch.inference_mode(buffer.is_inference()):
                buffer.copy_(value)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
