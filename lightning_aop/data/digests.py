"""Names for settings and weights, so that results are taken up again only where nothing has changed."""

import dataclasses
import functools
import hashlib
import re
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


def described(value: object) -> str:
    """Return text that identifies settings, the same in every process: repr() may show addresses."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {described(v)}' for k, v in value.items())}}}"
    if isinstance(value, functools.partial):
        return f"partial({described([value.func, value.args, value.keywords])})"
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().cpu().numpy().tobytes()).hexdigest()
    name = getattr(value, "__qualname__", None)
    if name is not None:
        cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        bound = [*cells, *(getattr(value, "__defaults__", None) or ())]
        return f"{getattr(value, '__module__', '')}.{name}{described(bound) if bound else ''}"
    if dataclasses.is_dataclass(value) or type(value).__repr__ is object.__repr__:
        kind = type(value)
        # How many images go through the network at once changes no result.
        settings = {name: v for name, v in vars(value).items() if name != "eval_batch_size"}
        return f"{kind.__module__}.{kind.__qualname__}({described(settings)})"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def slug(name: str) -> str:
    """Return a name that a file can have."""
    return re.sub(r"[^\w+]+", "-", name).strip("-") or "method"


@runtime_checkable
class Digest(Protocol):
    """A hash that is being computed: `hashlib` names no type for it at run time."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take more data in."""


def update_with_weights(digest: Digest, model: nn.Module) -> None:
    """Take the names and values of a model's parameters and buffers into a hash."""
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
