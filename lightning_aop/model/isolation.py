"""Leave no trace on a user's model: its state by value, modes, hooks, logs and random state."""

import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle

from lightning_aop.errors import InvalidTypeError
from lightning_aop.model.collectives import reshard
from lightning_aop.model.state import Saved

__all__ = ["foreign_state", "is_explaining", "isolated", "kept", "undisturbed"]


@contextmanager
def isolated_rng(device: torch.device | None = None, seed: int | None = None) -> Iterator[None]:
    """Restore the random state of Python, NumPy, torch and `device` on exit; seed them if asked."""
    accelerator = None if device is None or device.type == "cpu" else getattr(torch, device.type)
    where = () if device is None or device.type == "mps" else (device,)  # MPS has one device only
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    state = None if accelerator is None else accelerator.get_rng_state(*where)
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            # torch.manual_seed would reseed every device, also those that are not restored here.
            torch.default_generator.manual_seed(seed)
            if device is not None and device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            elif accelerator is not None:
                accelerator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if accelerator is not None:
            accelerator.set_rng_state(state, *where)


_open: list[Saved] = []
"""The models that are isolated now. Not a ContextVar: backward hooks run on threads of their own."""


def is_explaining() -> bool:
    """Tell whether a model is being explained right now.

    For a forward or a hook of your own that writes to a logger or a file, which can't be undone:

        if not lightning_aop.is_explaining():
            self.logger.experiment.add_histogram(...)
    """
    return bool(_open)


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Leave `model`, and all that hangs on it, bit for bit as it was, whatever is done inside.

    Afterwards, also after an error, these are what they were: parameters, buffers, tensors, arrays,
    containers, generators and plain objects that hang on any of its modules; its modules, their
    modes, hooks and other attributes; gradients and `requires_grad`; all random state. Inside,
    gradients are set aside, what a LightningModule logs is dropped, compiled models run eagerly
    and inference mode is left.

    Open it once around all that is done to a model: it walks through all that hangs on it, and is free
    inside another for the same model. Large weights are copied only where something writes to them.
    """
    if not callable(getattr(model, "forward", None)) or not isinstance(model, nn.Module):
        raise InvalidTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    # Of an adapted model the first module is the user's.
    if any(next(iter(model.modules()), model) in saved for saved in _open):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if "torch._dynamo" in sys.modules:
            # Importing dynamo costs seconds; whoever compiled a model has already paid for it.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Reentrant checkpoints refuse gradients of the input alone.
        stack.enter_context(_replaced(checkpoint, "CheckpointFunction", _Uncheckpointed))
        stack.enter_context(isolated_rng())
        stack.enter_context(_settings_kept())
        reshard(model)
        saved = Saved(model)
        for device in saved.devices():
            stack.enter_context(isolated_rng(device))
        stack.callback(saved.restore)
        stack.callback(reshard, model)
        saved.hold()
        saved.set_gradients_aside()
        saved.leave_inference_mode()
        for module in model.modules():
            if hasattr(
                type(module), "_log_dict_through_fabric"
            ):  # a LightningModule of any Lightning
                vars(module)["log"] = vars(module)["log_dict"] = _drop
        _open.append(saved)
        stack.callback(_open.remove, saved)
        yield


_SETTINGS: dict[Callable[[Any], object], Callable[[], object]] = {
    torch.set_default_dtype: torch.get_default_dtype,
    torch.set_num_threads: torch.get_num_threads,
    torch.set_deterministic_debug_mode: torch.get_deterministic_debug_mode,
}


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Put back settings of torch's that a method of the user's may have changed for good."""
    before = {put: ask() for put, ask in _SETTINGS.items()}
    try:
        yield
    finally:
        for put, setting in before.items():
            if _SETTINGS[put]() != setting:
                put(setting)


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Let something of torch's be another inside the block."""
    own = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


class _Uncheckpointed:
    """Calls the function of a checkpoint as if there were none."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def kept(thing: object) -> Iterator[None]:
    """Leave the attributes of an object that is no model as they were, and what hangs on them."""
    saved = Saved(vars(thing))
    saved.hold()
    try:
        yield
    finally:
        saved.restore()


def _drop(*args: object, **kwargs: object) -> None:
    """Log nothing."""


def foreign_state(model: nn.Module) -> dict[str, str]:
    """Return by its place what hangs on a model, could change in a forward, and can't be put back.

    Such are iterators, queues, open files, what holds threads or locks, and objects of C++.
    """
    with isolated_rng():
        found = Saved(model).foreign
    return {_TABLES.sub("", place): kind for place, kind in sorted(found.items())}


# Where a module has its modules, which are spoken of without it.
_TABLES = re.compile(r"(?<![^.])_modules\.")


@contextmanager
def undisturbed(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Make `model` ready to be explained, and leave it bit for bit as it was.

    Inside: what `isolated` does, and eval mode, gradients enabled, no parameter requires a gradient,
    and torch is seeded. Inside an `isolated` block for the same model nothing is copied: modes,
    `requires_grad` and random state are put back here, the rest at the end of that block.
    """
    with ExitStack() as stack:
        stack.enter_context(isolated(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(isolated_rng(device_of(model), seed))
        modes = [(module, module.training) for module in model.modules()]
        parameters = [
            (parameter, parameter.requires_grad)
            for module, _ in modes
            for parameter in module._parameters.values()
            if parameter is not None
        ]
        try:
            for module, training in modes:
                if training:
                    # The attribute, not `.eval()`: an overridden `train` may do more than switch.
                    module.training = False
            for parameter, requires_grad in parameters:
                if requires_grad:
                    parameter.requires_grad = False  # what a lazy layer's takes, too
            yield
        finally:
            for module, training in modes:
                if module.training is not training:
                    module.training = training
            for parameter, requires_grad in parameters:
                if parameter.requires_grad is not requires_grad:
                    parameter.requires_grad = requires_grad


class _Gradients(TorchFunctionMode):
    """Lets nothing switch gradients off, or cut them off."""

    _CUTS = (
        *(torch.Tensor.detach, torch.detach),
        torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the function, unless it is one of those."""
        if func in self._CUTS:
            return args[0].view_as(args[0])
        if func is torch._C._set_grad_enabled and args == (False,):
            return None
        return func(*args, **(kwargs or {}))


@contextmanager
def gradients_kept() -> Iterator[None]:
    """Let a forward compute gradients, where they are enabled, under its own `no_grad` and `detach`.

    As for frozen layers, which a training step needs none of, while an explanation does.
    """
    if not torch.is_grad_enabled():
        yield
        return
    with _replaced(torch._C, "_InferenceMode", nullcontext), _Gradients():
        yield


@contextmanager
def holding(model: nn.Module, other: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Let the modules hold other parameters in place of their own inside the block."""
    own = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in other
    ]
    try:
        for module, name, parameter in own:
            # Set as an attribute, by which recurrent layers hear of it.
            setattr(module, name, other[parameter])
        yield
    finally:
        for module, name, parameter in own:
            setattr(module, name, parameter)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model of half precision hold float32 copies of its weights and buffers inside the block.

    The copies are lost at its end; the parameters and buffers themselves are never written.
    """
    half = (torch.float16, torch.bfloat16)
    wide = {
        p: nn.Parameter(p.detach().float(), p.requires_grad)
        for p in model.parameters()
        if p.dtype in half
    }
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    try:
        for table, own in buffers:
            table.update(
                {n: b.float() for n, b in own.items() if b is not None and b.dtype in half}
            )
        with holding(model, wide):
            yield
    finally:
        for table, own in buffers:
            table.update(own)


def hooked(module: nn.Module, hook: Callable[[Any, Any, Any], Any]) -> RemovableHandle:
    """Register a forward hook, also on a scripted module, which takes none of its own.

    Modules inside of a scripted one call no hooks.
    """
    if not isinstance(module, torch.jit.ScriptModule):
        return module.register_forward_hook(hook)
    return register_module_forward_hook(
        lambda each, args, output: hook(each, args, output) if each is module else None
    )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, the CPU if it has none."""
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module from under torch.compile, Fabric, DataParallel or DDP."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif _is_fabric(model):
            model = vars(model)["_modules"]["_original_module"]
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def precision_of(model: nn.Module) -> AbstractContextManager[Any]:
    """Return the precision that Fabric's wrapper puts around a forward, for what `unwrap` takes out."""
    if not _is_fabric(model):
        return nullcontext()
    context: AbstractContextManager[Any] = vars(model)["_strategy"].precision.forward_context()
    return context


def _is_fabric(model: nn.Module) -> bool:
    return any(cls.__name__ == "_FabricModule" for cls in type(model).__mro__)
