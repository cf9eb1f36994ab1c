"""Models whose forward exchanges something between processes: all of them have to run it alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["EXCHANGES", "collectives_noticed", "is_sharded", "reshard"]

EXCHANGES = ("c10d", "c10d_functional", "_c10d_functional")
"""The namespaces of the operations that exchange something."""


class _Noticing(TorchDispatchMode):
    def __init__(self, names: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in EXCHANGES:
            self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def collectives_noticed(names: set[str]) -> Iterator[None]:
    """Add the names of the exchanges between processes that are called in the block."""
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    with _Noticing(names):
        yield


def is_sharded(model: nn.Module) -> bool:
    """Tell whether each process holds a part of the weights only (FSDP2)."""
    return any(True for _ in _shards(model))


def reshard(model: nn.Module) -> None:
    """Let each process hold its own part of the weights only, as between two batches.

    After a forward without a backward the outermost weights are still together.
    """
    for module in _shards(model):
        module.reshard()


def _shards(model: nn.Module) -> Iterator[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return
    for module in model.modules():
        # By name: to import the class takes long, and who uses it has done so.
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            yield module
