"""Count what torch is told to do beyond a model's own operations.

On a GPU the time is launches and waiting, not arithmetic: what is counted here, on a CPU, is what a GPU
would be told.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# After these the host knows a value: on an accelerator it waits until the device has got there.
_READ = {"tolist", "numpy", "cpu"}
_WAITS = {"nonzero", "masked_select", "_unique2", "equal", "_local_scalar_dense"}


@dataclass
class Counts:
    """Operations by name, those of the model left out, and the passes of the model.

    Attributes:
        operations: how often each was dispatched; views, which start nothing on a device, are left out.
        waits: how often the host asked for a value, by the name of what asked.
        passes: forwards of the model.
    """

    operations: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    passes: int = 0

    @property
    def total(self) -> int:
        return sum(self.operations.values())


@cache
def _is_view(func: Any) -> bool:
    aliases = [argument.alias_info for argument in func._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


class _Dispatched(TorchDispatchMode):
    def __init__(self, counts: Counts, own: list[bool]) -> None:
        super().__init__()
        self._counts, self._own = counts, own

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if not self._own[0]:
            name = func.overloadpacket.__name__
            self._counts.operations[name] += not _is_view(func)
            by_mask = name in ("index", "index_put", "index_put_") and any(
                isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)
                for each in args[1]
            )
            if name in _WAITS or by_mask:
                self._counts.waits[f"{name} by mask" if by_mask else name] += 1
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Sees what is read without an operation where the values are on the host already."""

    def __init__(self, counts: Counts, own: list[bool]) -> None:
        super().__init__()
        self._counts, self._own = counts, own

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = getattr(func, "__name__", "")
        # A tensor made of numbers is taken to its device, which is waited for, too.
        taken = name in ("tensor", "as_tensor") and (kwargs or {}).get("device") is not None
        if not self._own[0] and (name in _READ or taken):
            self._counts.waits[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(model: nn.Module) -> Iterator[Counts]:
    """Count what is dispatched in the block, forwards and backwards of the model left out.

    What runs in a backward is the model's if a node of the graph asked for it that its forward has made.
    """
    counts, own = Counts(), [False]
    nodes: set[Any] = set()

    def started(module: nn.Module, args: Any) -> None:
        if module is model:
            counts.passes += 1
            own[0] = True

    def ended(module: nn.Module, args: Any, output: Any) -> None:
        if module is not model:
            return
        own[0] = False
        given = {a.grad_fn for a in args if isinstance(a, Tensor)}
        ahead = [output.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is None or node in nodes or node in given:
                continue
            nodes.add(node)
            node.register_prehook(lambda *_: own.__setitem__(0, True))
            node.register_hook(lambda *_: own.__setitem__(0, False))
            ahead += [following for following, _ in node.next_functions]

    # Hooks on the model itself would be put back with it, and the counts that they hold.
    handles = [register_module_forward_pre_hook(started), register_module_forward_hook(ended)]
    try:
        with _Called(counts, own), _Dispatched(counts, own):
            yield counts
    finally:
        for handle in handles:
            handle.remove()


def operations(model: nn.Module, work: Callable[[], object]) -> Counts:
    """Return what some work dispatches beyond the model's own, once caches are filled."""
    work()
    with counted(model) as counts:
        work()
    return counts
