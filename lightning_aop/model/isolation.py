"""Leave no trace on a user's model: modes, buffers, attributes, hooks and random state."""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["undisturbed"]


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


@contextmanager
def undisturbed(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Make `model` ready to be explained, and leave it bit for bit as it was.

    Inside: eval mode, gradients enabled (inference mode is left first), no parameter requires a
    gradient, compiled models run eagerly so that hooks are heard, and torch is seeded.
    Afterwards, also after an error: the mode of every submodule, its hooks, its submodules and other
    attributes, `requires_grad`, every buffer and all random state are what they were. `.grad` is
    never written.
    """
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:
            # Importing dynamo costs seconds; whoever compiled a model has already paid for it.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(isolated_rng(device_of(model), seed))
        stack.enter_context(_restored_buffers(model))
        stack.enter_context(_restored_attributes(model))
        try:
            for module, _ in modes:
                # The attribute, not `.eval()`: an overridden `train` may do more than switch.
                module.training = False
            for parameter, _ in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad in parameters:
                parameter.requires_grad_(requires_grad)


@contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """Put back every buffer that a forward changed in place or replaced (counters, observers)."""
    saved = [
        (module, name, buffer, buffer.detach().clone(), _version(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for module, name, buffer, value, version in saved:
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
                # Unconditional copies would bump version counters that a pending backward checks.
                if version is None or buffer._version != version:
                    with torch.inference_mode(buffer.is_inference()):
                        buffer.copy_(value)


@contextmanager
def _restored_attributes(model: nn.Module) -> Iterator[None]:
    """Put back every module's attributes, and what its tables of hooks and submodules held.

    Other packages register hooks and leave notes on modules, and may not clean up after an error.
    """

    def tables(module: nn.Module) -> dict[str, Any]:
        return {
            name: value
            for name, value in vars(module).items()
            if (name == "_modules" or "_hooks" in name) and isinstance(value, dict)
        }

    saved = [
        (module, dict(vars(module)), {n: dict(t) for n, t in tables(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, contents in saved:
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update(attributes)
            for name, table in tables(module).items():
                if table != contents[name]:
                    table.clear()
                    table.update(contents[name])


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


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's module from under torch.compile, DataParallel or DistributedDataParallel."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
