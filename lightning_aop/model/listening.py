"""Hear the logits that a module computes in its own steps: hooks on its outputs, and no evaluation."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_aop.model.isolation import hooked, isolated_rng
from lightning_aop.model.passes import images_of

__all__ = ["Listener"]

Read = Callable[[Any, int], Tensor]
"""From an output and the number of images to logits [B, K]; raises where there are none."""


class Listener:
    """Hears one batch after the other.

    In the first batch all modules with parameters are listened to, which tells whose output the step
    goes by: the module itself, else the first of its networks that gives logits, else the last layer
    that does. From then on only that one is.

    What is compiled stays alone, since a hook there would be traced: the logits are then those that the
    step returns, if it does.

    Args:
        read: gets logits out of an output.
        classes: K.
    """

    def __init__(self, read: Read, classes: int) -> None:
        self._read, self._classes = read, classes
        self._source: str | None = None
        self._handles: dict[str, RemovableHandle] = {}
        self._heard: list[tuple[str, Tensor]] = []

    def start(self, module: nn.Module) -> None:
        """Put the hooks; `stop` takes them away."""
        self.stop()
        for name, each in _audible(module):
            if self._source in (None, name):
                self._handles[name] = hooked(each, partial(self._hear, name))

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._heard = {}, []

    def take(self, count: int, outputs: Any = None) -> Float[Tensor, "b k"] | None:
        """Return the logits of the batch that has just gone through, None where none were heard.

        Args:
            count: how many images it had.
            outputs: what the step has returned.
        """
        heard, self._heard = [each for each in self._heard if len(each[1]) == count], []
        if not heard:
            return self._returned(outputs, count)
        names = [name for name, _ in heard]
        networks = [name for name in names if "." not in name]
        chosen = "" if "" in names else (networks or names[-1:])[0]
        if self._source is None:
            self._source = chosen
            for name in [name for name in self._handles if name != chosen]:
                self._handles.pop(name).remove()
        # Of a layer that is called several times the last counts, of a network the first.
        found = [logits for name, logits in heard if name == chosen]
        return found[-1] if "." in chosen else found[0] if found else None

    def _hear(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        with isolated_rng():  # in the midst of the user's step
            logits = self._logits(output)
        if logits is not None:
            self._heard.append((name, logits))

    def _logits(self, output: Any) -> Float[Tensor, "b k"] | None:
        try:
            count, tensors = images_of(output)
            if not any(tensor.is_floating_point() for tensor in tensors):
                return None
            logits = self._read(output, count).detach()
        except Exception:  # most outputs are no logits
            return None
        return logits if tuple(logits.shape) == (count, self._classes) else None

    def _returned(self, outputs: Any, count: int) -> Float[Tensor, "b k"] | None:
        parts = outputs.values() if isinstance(outputs, Mapping) else [outputs]
        for part in parts:
            fits = isinstance(part, Tensor) and part.is_floating_point()
            if fits and tuple(part.shape) == (count, self._classes):
                found: Tensor = part.detach()
                return found
        return None


def _audible(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules with parameters that can be hooked without being compiled anew."""
    if getattr(module, "_compiler_ctx", None) is not None:
        return []  # Lightning compiles its steps
    silent: set[nn.Module] = set()
    for each in module.modules():
        if getattr(each, "_compiled_call_impl", None) is not None:
            silent |= {*each.modules()}
        elif hasattr(each, "_orig_mod") or isinstance(each, torch.jit.ScriptModule):
            silent |= {*each.modules()} - {each}
    return [
        (name, each)
        for name, each in module.named_modules()
        if each not in silent and next(each.parameters(), None) is not None
    ]
