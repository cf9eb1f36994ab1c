"""Hear the logits that a module computes in its own steps: hooks on its outputs, and no evaluation."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_aop.model.isolation import hooked, isolated_rng
from lightning_aop.model.outputs import sums_to_one
from lightning_aop.model.passes import images_of
from lightning_aop.scores import full_precision
from lightning_aop.types import Images

__all__ = ["Compared", "Listener", "Read", "calls_in", "same_images"]

Read = Callable[[Any, int], Tensor]
"""From an output and the number of images to logits [B, K]; raises where there are none."""


class Listener:
    """Hears one batch after the other, with hooks that are there only while a batch goes through.

    The first batch tells whose output the step goes by: the outermost of the sources that it calls. From
    then on only that one is listened to.

    What is compiled stays alone, since a hook there would be traced: the logits are then those that the
    step returns, if it does.

    Args:
        sources: the modules whose outputs are the logits, the outermost first, and how they are read.
        classes: K.
    """

    def __init__(self, sources: Mapping[str, Read], classes: int) -> None:
        self._sources, self._classes = sources, classes
        self._source: str | None = None
        self._modules: list[tuple[str, nn.Module]] = []
        self._handles: list[RemovableHandle] = []
        self._heard: list[tuple[str, Tensor]] = []

    def begin(self, module: nn.Module) -> None:
        """Find the sources in the module, until `end`."""
        self.end()
        wanted = self._sources if self._source is None else (self._source,)
        self._modules = [(name, each) for name, each in _audible(module) if name in wanted]

    def end(self) -> None:
        """Let go of the module."""
        self.stop()
        self._modules = []

    def start(self) -> None:
        """Put the hooks; `stop` takes them away."""
        self.stop()
        self._handles = [hooked(m, _Ear(partial(self._hear, name))) for name, m in self._modules]

    def stop(self) -> None:
        """Take the hooks away, and forget what was heard."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._heard = [], []

    def take(self, count: int, outputs: Any = None) -> Float[Tensor, "b k"] | None:
        """Return the logits of the batch that has just gone through, None where none were heard.

        Args:
            count: how many images it had.
            outputs: what the step has returned.
        """
        heard = [each for each in self._heard if len(each[1]) == count]
        self.stop()
        if not heard:
            return self._returned(outputs, count)
        if self._source is None:
            names = {name for name, _ in heard}
            self._source = next(name for name in self._sources if name in names)
            self._modules = [pair for pair in self._modules if pair[0] == self._source]
        # Of a layer that is called several times the last counts, of a network the first.
        found = [logits for name, logits in heard if name == self._source]
        return found[-1] if "." in self._source else found[0] if found else None

    def _hear(self, name: str, given: Any, output: Any) -> None:
        # In the midst of the user's step, and it may be another output than that which was tried.
        with isolated_rng(), suppress(Exception), torch.no_grad():
            count, _ = images_of(output)
            logits = self._sources[name](output, count)
            if tuple(logits.shape) == (count, self._classes):
                # The step may go on to write into its own.
                self._heard.append((name, logits.detach().clone()))

    def _returned(self, outputs: Any, count: int) -> Float[Tensor, "b k"] | None:
        parts = outputs.values() if isinstance(outputs, Mapping) else [outputs]
        for part in parts:
            fits = isinstance(part, Tensor) and part.is_floating_point()
            if fits and tuple(part.shape) == (count, self._classes):
                found: Tensor = part.detach()
                probable = bool((found >= 0).all()) and sums_to_one(found)
                return full_precision(found).clamp_min(1e-12).log() if probable else found
        return None


class _Ear:
    """A forward hook that hands on what was given and the output.

    A copy of the module, or a file with it, gets one of the standard library that does nothing: whoever
    copies or saves the module in the middle of a batch needs nothing of this package, and is not heard.
    """

    def __init__(self, hear: Callable[[Any, Any], None]) -> None:
        self._hear = hear

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hear(args, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class Compared:
    """Tells whether one of some modules is called with a batch's images, and none with others.

    Args:
        names: of the modules, within another.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._heard: dict[str, bool] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def open(self) -> bool:
        """Whether a batch is going through."""
        return bool(self._handles)

    def start(self, module: nn.Module, images: Images) -> None:
        """Compare the calls from here on, until `stop`."""
        kept = images.detach().clone()  # a step may write into its own

        def hear(name: str, given: Any, output: Any) -> None:
            if not given or not isinstance(given[0], Tensor):
                return  # by keyword, or the batch
            with isolated_rng(), suppress(Exception), torch.no_grad():
                self._heard[name] = self._heard.get(name, False) or same_images(given, kept)

        modules = [(name, each) for name, each in _audible(module) if name in self._names]
        self._handles = [hooked(each, _Ear(partial(hear, name))) for name, each in modules]

    def stop(self) -> str | None:
        """Take the hooks away; return the outermost module that was given other images alone."""
        for handle in self._handles:
            handle.remove()
        heard, self._heard, self._handles = self._heard, {}, []
        first = min(heard, key=len, default=None)
        return None if first is None or heard[first] else first


def same_images(given: Any, images: Images) -> bool:
    """Tell whether the first argument of a call is a batch of images, down to half precision."""
    first = given[0] if given else None
    if not isinstance(first, Tensor) or first.shape != images.shape:
        return False
    apart = (first.detach().float() - images.float()).abs().mean()
    return bool(apart <= 0.01 * images.float().std())


@contextmanager
def calls_in(module: nn.Module) -> Iterator[list[tuple[str, Any, Any]]]:
    """Yield a list to which each module that runs in the block adds its name, arguments and output."""
    found: list[tuple[str, Any, Any]] = []

    def note(name: str, given: Any, output: Any) -> None:
        found.append((name, given, output))

    handles = [hooked(each, _Ear(partial(note, name))) for name, each in _audible(module)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


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
