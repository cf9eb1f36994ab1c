"""All that hangs on a module, saved by value and put back bit for bit.

A forward pass may change far more than its buffers: memory banks and codebooks are written through
`.data`, observers by fused kernels, arrays by NumPy; lists, deques and metrics collect; generators
move on; momentum encoders and spectral norms write parameters. None of it can be told from a version
counter. So `Saved` walks from a module through attributes, containers, closures and plain objects,
keeps a copy of each value, and compares bits afterwards. Only what differs is written.

Large tensors are not copied. Inside they stand on a copy of their bits that PyTorch makes at the first
write, whoever writes and whenever that is (`_Lent`), and afterwards on their own memory again, which
nothing has written to. Where others could write to that memory by another way, it is copied.

The walk stops at what is no part of the model: trainers, loggers, datasets, optimizers, the packages'
own callbacks, and objects with open files, threads or locks. `foreign` names those that a forward
could change all the same.
"""

import collections
import ctypes
import functools
import io
import operator
import queue
import random
import socket
import sys
import threading
import types
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from copyreg import _slotnames  # type: ignore[attr-defined]
from multiprocessing.sharedctypes import SynchronizedBase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["Saved"]

# Plain objects of these packages are not the model's own: trainers, loggers, optimizers, datasets.
_OTHERS = {
    *("torch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"),
    *("logging", "threading", "multiprocessing", "concurrent", "asyncio", "subprocess"),
    "lightning_aop",  # counts evaluations, and keeps what it computed
    *("wandb", "mlflow", "tensorboard", "tensorboardX", "comet_ml", "litlogger", "clearml", "aim"),
    *("dvclive", "swanlab", "trackio"),
}
_ATOMS = {
    *(type(None), bool, int, float, complex, str, bytes, type, range, slice),
    *(torch.dtype, torch.device, torch.Size, types.ModuleType),
    *(weakref.ref, weakref.ProxyType, weakref.CallableProxyType),
}
# Of a class: what finds its slots; what only gives other values; locks, which it leaves as they were.
_OF_CLASSES = {
    *(types.MemberDescriptorType, types.GetSetDescriptorType, property, functools.cached_property),
    *(type(threading.Lock()), type(threading.RLock())),
}
_LIVE = (
    *(io.IOBase, socket.socket, threading.Thread),
    *(type(threading.Lock()), type(threading.RLock())),
)
_C_DATA = (ctypes.Array, ctypes.Structure, ctypes.Union, ctypes._SimpleCData)
_METHOD = "method "
_PIECE = 2**26  # bytes that are copied, and compared, at once
_MAPPED = 2**28  # bytes of an array on a file up to which it is copied
_LARGE = 2**16  # bytes of a tensor from which on to lend is cheaper than to copy


class Saved:
    """The values of all that is reachable from a module, as of when this was made.

    Those of tensors and arrays are as of `hold`. Instead of a module it may be the attributes of
    another object.
    """

    def __init__(self, model: nn.Module | dict[str, Any]) -> None:
        self.foreign: dict[str, str] = {}
        """By its place, the type of each object that could change and cannot be put back."""
        self._classes: list[tuple[Any, type]] = []
        self._containers: list[tuple[Any, list[Any]]] = []
        self._empty: list[Any] = []
        self._slots: list[tuple[Any, str, Any]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._shared: dict[type, dict[str, Any]] = {}  # what classes of the user's have
        self._scripted: list[tuple[Any, str, Any]] = []
        self._c_data: list[tuple[Any, bytes]] = []
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._copies: list[np.ndarray[Any, Any]] = []
        self._generators: list[Callable[[], Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, bool, Tensor | None]] = []
        self._storages: dict[int, tuple[torch.UntypedStorage, Tensor | None, list[Any]]] = {}
        self._lent: dict[int, _Lent] = {}  # by the tensor's identity
        self._pieces: list[_Piece] = []
        self._seen: dict[int, Any] = {}  # holds each object, so that its identity stays its own
        # Uninitialised parameters of lazy layers refuse most functions otherwise.
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            self._walk(model)
            counted = [t for t, *_ in self._tensors if not t.is_inference()]
            self._versions = _unsafe_preserve_version_counter(tuple(counted))

    def hold(self) -> None:
        """Make sure that the bits of tensors and arrays are not lost."""
        self._copies = [values.copy() for values in self._arrays]
        copied = []
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            for storage, alias, tensors in self._storages.values():
                if lent := _lend(storage, tensors):
                    self._lent[id(tensors[0])] = lent
                else:
                    copied.append((storage, _all_of(storage, alias)))
            self._pieces += _pieces(copied)

    def restore(self) -> None:
        """Put back whatever is different now."""
        try:
            self._restore_objects()
        finally:  # an object that refuses must not cost the weights
            self._restore_tensors()

    def _restore_objects(self) -> None:
        for thing, kind in self._classes:
            if type(thing) is not kind:
                thing.__class__ = kind
        for container, items in self._containers:
            now = _items(container)
            if len(now) != len(items) or not all(map(operator.is_, now, items)):
                _refill(container, items)
        for container in self._empty:
            if container:
                _refill(container, [])
        for thing, name, value in self._slots:
            if getattr(thing, name, _MISSING) is value:
                continue
            if value is _MISSING:
                object.__delattr__(thing, name)
            else:
                object.__setattr__(thing, name, value)  # a frozen dataclass refuses its own
        for cell, value in self._cells:
            if value is _MISSING:
                del cell.cell_contents
            else:
                cell.cell_contents = value
        for kind, shared in self._shared.items():
            there = _of_class(kind)
            for name in there.keys() - shared.keys():
                type.__delattr__(kind, name)  # an enumeration refuses its own
            for name, value in shared.items():
                if there.get(name, _MISSING) is not value:
                    type.__setattr__(kind, name, value)
        for held, name, value in self._scripted:
            if held.getattr(name) is not value:
                held.setattr(name, value)
        for thing, memory in self._c_data:
            ctypes.memmove(ctypes.addressof(thing), memory, len(memory))
        for values, copy in zip(self._arrays, self._copies, strict=False):
            if values.tobytes() != copy.tobytes():
                values[...] = copy
        for give_back in self._generators:
            give_back()

    def _restore_tensors(self) -> None:
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False), torch.no_grad():
            for lent in self._lent.values():
                lent.take_back()
            for tensor, alias, requires_grad, grad in self._tensors:
                # To ask where a tensor is would copy it, if somebody has kept what it was lent.
                if id(tensor) not in self._lent and _layout(tensor) != _layout(alias):
                    with torch.inference_mode(tensor.is_inference()):
                        tensor.data = alias
                if tensor.is_leaf:
                    if tensor.requires_grad is not requires_grad:
                        tensor.requires_grad_(requires_grad)
                    if tensor.grad is not grad:
                        tensor.grad = grad
            for piece in self._pieces:
                piece.restore()
            # A pending backward looks at the counters. The values are those that it knows.
            self._versions.__exit__()

    def set_gradients_aside(self) -> None:
        """Let no tensor have a gradient until `restore`, so that none is added to."""
        for tensor, _, _, grad in self._tensors:
            if grad is not None:
                tensor.grad = None

    def leave_inference_mode(self) -> None:
        """Let copies stand in for tensors that were made in inference mode, which have no gradients."""
        # Of those kinds alone: a lazy layer's parameters would refuse to be asked.
        copies = {
            id(tensor): (
                tensor.clone()
                if type(tensor) is Tensor
                else nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
            )
            for tensor, *_ in self._tensors
            if type(tensor) in (Tensor, nn.Parameter) and tensor.is_inference()
        }
        if not copies:
            return
        for container, items in self._containers:
            if any(id(item) in copies for item in items):
                _refill(container, [copies.get(id(item), item) for item in items])

    def devices(self) -> set[torch.device]:
        """Return the devices that the values are on."""
        return {storage.device for storage, *_ in self._storages.values()}

    def __contains__(self, thing: object) -> bool:
        return self._seen.get(id(thing)) is thing

    # ---------------------------------------------------------------------------------------------
    # the walk

    def _walk(self, model: nn.Module | dict[str, Any]) -> None:
        ahead: list[tuple[str, Any]] = [("", model)]
        kinds: set[type] = set()
        while ahead:
            place, thing = ahead.pop()
            if id(thing) in self._seen:
                continue
            self._seen[id(thing)] = thing
            for name, value in self._save(place, thing):
                kind = type(value)
                if kind in _CONTAINERS and not value:
                    self._empty.append(value)  # as most of a module's are
                elif kind not in _ATOMS:
                    ahead.append((f"{place}.{name}" if place else name, value))
            if type(thing) not in kinds:
                kinds.add(type(thing))
                for kind in filter(_is_users, type(thing).__mro__):
                    own = self._shared.setdefault(kind, _of_class(kind))
                    ahead += [
                        (
                            f"{_METHOD * (type(each) is types.FunctionType)}{kind.__name__}.{name}",
                            each,
                        )
                        for name, each in own.items()
                    ]

    def _save(self, place: str, thing: Any) -> Iterable[tuple[str, Any]]:
        """Save one object; return what it leads to."""
        # By type: a weak proxy would pass for what it stands for.
        kind = type(thing)
        if issubclass(kind, Tensor):
            return self._save_tensor(thing)
        if issubclass(kind, nn.Module):
            self._classes.append((thing, kind))  # a lazy layer becomes another
            self._containers.append((vars(thing), _items(vars(thing))))
            leads = list(vars(thing).items())
            if isinstance(thing, torch.jit.ScriptModule):
                leads += self._save_script(thing)
            return leads
        if issubclass(kind, _CONTAINERS):
            items = _items(thing)
            self._containers.append((thing, items))
            if issubclass(kind, collections.defaultdict):
                self._slots.append((thing, "default_factory", thing.default_factory))
                return [("default_factory", thing.default_factory), *_members(thing, items)]
            return [*self._save_attributes(thing), *_members(thing, items)]
        if issubclass(kind, (tuple, frozenset)):
            return [*self._save_attributes(thing), *_members(thing, list(thing))]
        if issubclass(kind, torch.UntypedStorage) and thing.device.type != "meta":
            self._save_storage(thing, thing)
            return ()
        if issubclass(kind, torch.TypedStorage):
            return (("untyped", thing.untyped()),)
        if issubclass(kind, np.ndarray):
            if issubclass(kind, np.memmap) and thing.nbytes > _MAPPED and thing.flags.writeable:
                self._name_foreign(place, kind)
                return ()
            if thing.flags.writeable:
                self._arrays.append(thing.view(np.ndarray))  # a masked one without its mask
            leads = self._save_attributes(thing)
            return (
                [*leads, *_members(thing, thing.ravel().tolist())]
                if thing.dtype.hasobject
                else leads
            )
        if issubclass(kind, _C_DATA):
            self._c_data.append(
                (thing, ctypes.string_at(ctypes.addressof(thing), ctypes.sizeof(thing)))
            )
            return ()
        if issubclass(kind, SynchronizedBase):  # a number that processes share
            return (("obj", thing.get_obj()),)
        if kind is memoryview:
            return (("obj", thing.obj),)
        if give_back := _random_state(thing):
            self._generators.append(give_back)
            seeds = getattr(getattr(thing, "bit_generator", thing), "seed_seq", None)
            return (("seed_seq", seeds),)
        if kind is types.MethodType:
            return (("__self__", thing.__self__), ("__func__", thing.__func__))
        if kind in (types.BuiltinMethodType, types.MethodWrapperType):
            return (("__self__", thing.__self__),)
        if kind in (staticmethod, classmethod):
            return (("__func__", thing.__func__),)
        if kind is functools.partial:
            return (("func", thing.func), ("args", thing.args), ("keywords", thing.keywords))
        if kind is types.FunctionType:
            return self._save_function(thing)
        if _is_foreign(thing) or (kind is torch.ScriptObject and "quantized" not in str(thing)):
            self._name_foreign(place, kind)
            return ()
        return self._save_object(place, thing)

    def _name_foreign(self, place: str, kind: type) -> None:
        # What a decorator has of its own is nobody's state.
        if not place.startswith(_METHOD):
            self.foreign[place] = kind.__name__

    def _save_tensor(self, tensor: Tensor) -> Iterable[tuple[str, Any]]:
        leads = self._save_attributes(tensor)
        if is_traceable_wrapper_subclass(tensor):
            return [*leads, *((n, getattr(tensor, n)) for n in tensor.__tensor_flatten__()[0])]
        if tensor.is_nested:
            return [*leads, ("values", tensor.values())]
        if tensor.device.type == "meta" or tensor.layout not in (torch.strided, *_SPARSE):
            return leads
        self._classes.append((tensor, type(tensor)))
        grad = tensor.grad if tensor.is_leaf else None
        alias = tensor.detach()
        self._tensors.append((tensor, alias, tensor.requires_grad, grad))
        if parts := _SPARSE.get(tensor.layout):
            return [*leads, *((part.__name__, part(tensor)) for part in parts)]
        self._save_storage(tensor.untyped_storage(), tensor, alias)
        return leads

    def _save_storage(
        self, storage: torch.UntypedStorage, holder: Any, alias: Tensor | None = None
    ) -> None:
        if storage.nbytes():
            self._storages.setdefault(storage.data_ptr(), (storage, alias, []))[2].append(holder)

    def _save_script(self, module: torch.jit.ScriptModule) -> Iterable[tuple[str, Any]]:
        """Save what a scripted module has in C++; lists and the like come as copies."""
        held = module._c
        names = module._concrete_type.get_attributes()
        attributes = [(name, held.getattr(name)) for name in names if held.hasattr(name)]
        self._scripted += [(held, name, value) for name, value in attributes]
        own = *module.named_parameters(recurse=False), *module.named_buffers(recurse=False)
        return [*attributes, *own]

    def _save_function(self, function: types.FunctionType) -> Iterable[tuple[str, Any]]:
        if function.__module__ is None or _root(function.__module__) in _OTHERS:
            return []
        leads: list[tuple[str, Any]] = [
            ("__defaults__", function.__defaults__),
            ("__kwdefaults__", function.__kwdefaults__),
        ]
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                value = _MISSING
            self._cells.append((cell, value))
            leads.append((name, value))
        return [*leads, *self._save_attributes(function)]

    def _save_object(self, place: str, thing: Any) -> Iterable[tuple[str, Any]]:
        kind = type(thing)
        others = list(filter(_is_others, kind.__mro__))
        if issubclass(kind, type) or kind in others or not all(map(_is_to_build_on, others)):
            return ()
        attributes = getattr(thing, "__dict__", {})
        slots = (getattr(thing, name, None) for name in _slotnames(kind))
        if any(issubclass(type(value), _LIVE) for value in (*attributes.values(), *slots)):
            self._name_foreign(place, kind)
            return ()
        if _is_opaque(thing):
            self._name_foreign(place, kind)
        return self._save_attributes(thing)

    def _save_attributes(self, thing: Any) -> list[tuple[str, Any]]:
        """Save what an object of any type has in a dictionary and in slots."""
        attributes = getattr(thing, "__dict__", None)
        names = _slotnames(type(thing))
        slots = [(name, getattr(thing, name, _MISSING)) for name in names]
        self._slots += [(thing, name, value) for name, value in slots]
        if not attributes:
            self._empty += [] if attributes is None else [attributes]
            return slots
        self._containers.append((attributes, _items(attributes)))
        return [*attributes.items(), *slots]


_MISSING = object()


def _is_users(kind: type) -> bool:
    root = _root(kind.__module__)
    return root not in _OTHERS and root not in sys.stdlib_module_names and root != "numpy"


def _of_class(kind: type) -> dict[str, Any]:
    """Return what a class has for all its objects, but for what Python and locks need."""
    return {
        name: value
        for name, value in vars(kind).items()
        if not (name.startswith("__") and name.endswith("__")) and type(value) not in _OF_CLASSES
    }


def _is_others(kind: type) -> bool:
    module = kind.__module__
    return _root(module) in _OTHERS and not module.startswith("torch.distributions")


def _is_to_build_on(kind: type) -> bool:
    """Tell whether a class of Lightning's lends itself to objects with a state of their own.

    A user's callback whose method is a hook is one, a user's Trainer isn't.
    """
    return kind.__module__.endswith(("callbacks.callback", "core.hooks", ".hparams_mixin"))


def _is_foreign(thing: object) -> bool:
    """Tell whether something moves on when it is used, and can't be moved back."""
    if isinstance(thing, (*_LIVE, queue.SimpleQueue)):
        return True
    # An iterator that is written in Python is saved as any object.
    return isinstance(thing, Iterator) and not hasattr(thing, "__dict__")


def _is_opaque(thing: object) -> bool:
    """Tell whether a thing is what C++ or Rust has made, of which Python knows nothing but its methods.

    What is equal by value, as its hash says, is taken for a value.
    """
    kind = type(thing)
    return (
        _is_users(kind)
        and kind.__hash__ is object.__hash__
        and not hasattr(thing, "__dict__")
        and not any("__slots__" in vars(base) for base in kind.__mro__)
    )


def _root(module: str) -> str:
    return module.partition(".")[0]


# --------------------------------------------------------------------------------------------------
# containers

_CONTAINERS = (collections.OrderedDict, dict, list, collections.deque, set, bytearray, array)


def _items(container: Any) -> list[Any]:
    """Return what a container holds, of a dictionary its keys and then its values."""
    if type(container) is dict:
        return [*container, *container.values()]
    if isinstance(container, collections.OrderedDict):
        return [
            *collections.OrderedDict.keys(container),
            *collections.OrderedDict.values(container),
        ]
    if isinstance(container, dict):
        return [*dict.keys(container), *dict.values(container)]
    return list(container)


def _members(container: Any, items: list[Any]) -> Iterable[tuple[str, Any]]:
    if isinstance(container, dict):
        half = len(items) // 2
        return zip(map(str, items[:half]), items[half:], strict=True)
    return ((str(i), item) for i, item in enumerate(items) if type(item) not in _ATOMS)


def _refill(container: Any, items: list[Any]) -> None:
    """Let a container hold what it held, by the methods of its own base."""
    base: Any = next(b for b in type(container).__mro__ if b in _CONTAINERS)
    if issubclass(base, dict):
        half = len(items) // 2
        base.clear(container)
        for key, value in zip(items[:half], items[half:], strict=True):
            base.__setitem__(container, key, value)
    elif base is set:
        base.clear(container)
        base.update(container, items)
    elif base is collections.deque:
        base.clear(container)
        base.extend(container, items)
    else:
        same = array(container.typecode, items) if base is array else base(items)
        base.__setitem__(container, slice(None), same)


# --------------------------------------------------------------------------------------------------
# generators


def _random_state(thing: Any) -> Callable[[], Any] | None:
    """Return what gives a random generator its present state back, None for other things."""
    if isinstance(thing, torch.Generator):
        set_state: Callable[[Tensor], Any] = thing.set_state
        return functools.partial(set_state, thing.get_state())
    if isinstance(thing, random.Random) and not isinstance(thing, random.SystemRandom):
        return functools.partial(thing.setstate, thing.getstate())
    if isinstance(thing, np.random.SeedSequence):
        put_back: Callable[[Any], Any] = getattr(thing, "__setstate__")  # noqa: B009  # undeclared
        return functools.partial(put_back, thing.__reduce__()[2])
    if isinstance(thing, np.random.RandomState):
        return functools.partial(thing.set_state, thing.get_state())
    bits = (
        getattr(thing, "bit_generator", thing) if isinstance(thing, np.random.Generator) else thing
    )
    if isinstance(bits, np.random.BitGenerator):
        return functools.partial(setattr, bits, "state", bits.state)
    return None


# --------------------------------------------------------------------------------------------------
# tensors


_SPARSE: dict[torch.layout, tuple[Callable[[Tensor], Tensor], ...]] = {
    torch.sparse_coo: (Tensor._indices, Tensor._values),
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices, Tensor.values),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices, Tensor.values),
    torch.sparse_bsr: (Tensor.crow_indices, Tensor.col_indices, Tensor.values),
    torch.sparse_bsc: (Tensor.ccol_indices, Tensor.row_indices, Tensor.values),
}


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    if parts := _SPARSE.get(tensor.layout):
        coalesced = tensor.layout is torch.sparse_coo and tensor.is_coalesced()
        return tensor.size(), coalesced, *(_layout(part(tensor)) for part in parts)
    return tensor.data_ptr(), tensor.size(), tensor.stride(), tensor.dtype, tensor.device


class _Lent:
    """A tensor that stands on a copy of its bits, which is made when somebody writes to it.

    That is `torch._lazy_clone`: whatever may write to a tensor, in Python or in C++, asks its storage
    for memory that may be written to, and this is when the storage gets some of its own. What only
    reads goes on reading the tensor's own memory, so there is nothing to compare.
    """

    def __init__(self, storage: torch.UntypedStorage, tensor: Tensor) -> None:
        self._storage, self._tensor, self._own = storage, tensor, tensor.detach()
        lent = torch._lazy_clone(self._own)
        self._copy = lent.untyped_storage()
        tensor.data = lent

    def take_back(self) -> None:
        """Let the tensor stand on its own memory again."""
        self._tensor.data = self._own
        if _uses(self._copy) == 1:  # nobody has kept some of the copy, such as an error a graph
            del self._copy
            self._storage.data_ptr()  # on its own, it is an ordinary storage again


_LENDS = hasattr(torch, "_lazy_clone") and hasattr(torch._C, "_storage_Use_Count")


def _lend(storage: torch.UntypedStorage, holders: list[Any]) -> _Lent | None:
    """Let a tensor stand on a copy yet to be made, if nobody else can write to its memory."""
    first = holders[0]
    if (
        not _LENDS
        or storage.nbytes() < _LARGE
        or len(holders) > 1
        or type(first) not in (Tensor, nn.Parameter)
        or not first.is_leaf
        or first._is_view()
        or first.is_inference()
        or first.is_quantized
        # A view, a NumPy array of it, a graph: more than the tensor, what `_tensors` has of it, and
        # the storage that is asked.
        or _uses(storage) > 3
    ):
        return None
    if storage.device.type == "cuda":
        # PyTorch makes the copy on the default stream, which others don't wait for.
        if torch.cuda.current_stream(storage.device) != torch.cuda.default_stream(storage.device):
            return None
    elif storage.device.type != "cpu":
        return None
    try:
        return _Lent(storage, first)
    except RuntimeError:  # memory from elsewhere: shared, mapped from a file, NumPy's
        return None


def _uses(storage: torch.UntypedStorage) -> int:
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a value
_PLAIN = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}


def _all_of(storage: torch.UntypedStorage, alias: Tensor | None) -> Tensor:
    """Return a flat tensor on all that a storage holds: a tensor on it, if that is all of it."""
    if (
        type(alias) is Tensor
        and alias.dtype in _PLAIN
        and alias.nbytes == storage.nbytes()
        and alias.is_contiguous()
        and not (alias.is_inference() or alias.is_neg())
    ):
        return alias if alias.ndim == 1 else alias.view(-1)
    return _raw(storage, storage.nbytes())


def _raw(storage: torch.UntypedStorage, size: int) -> Tensor:
    dtype = torch.uint8 if size % 4 else torch.int32
    bits: Tensor = torch.empty(0, dtype=dtype, device=storage.device)
    bits.set_(storage)
    return bits[: size // dtype.itemsize]


class _Piece:
    """Some storages of one device and dtype, and a copy of their bits."""

    def __init__(self, parts: list[tuple[torch.UntypedStorage, Tensor]]) -> None:
        self._parts = [(storage, storage.nbytes(), values) for storage, values in parts]
        values = [values for _, values in parts]
        try:
            self._copy = _joined(values)
        except torch.OutOfMemoryError:
            self._copy = _joined([each.cpu() for each in values])

    def restore(self) -> None:
        """Write back the storages whose bits are others now."""
        for storage, size, _ in self._parts:
            if storage.nbytes() < size:
                storage.resize_(size)
        now = [values for *_, values in self._parts]
        # One comparison for all of them first: elsewhere than on the CPU each waits for the device.
        cheap = len(now) > 1 and (len(self._copy) < 2**20 or not self._copy.is_cpu)
        if cheap and torch.equal(_joined(now), self._copy):
            return
        before = self._copy.split([len(values) for values in now])
        for (storage, size, values), saved in zip(self._parts, before, strict=True):
            if not torch.equal(_joined([values]).to(saved.device), saved):
                raw = _raw(storage, size)
                raw.copy_(saved.view(raw.dtype))


def _joined(values: list[Tensor]) -> Tensor:
    """Return the bits of tensors of one dtype, one after the other, as integers."""
    joined = torch.cat(values)
    return joined.view(_WHOLE[joined.itemsize])


def _pieces(parts: Iterable[tuple[torch.UntypedStorage, Tensor]]) -> list[_Piece]:
    """Put storages of one device and dtype together, as many as make a piece."""
    found: dict[tuple[torch.device, torch.dtype], list[list[Any]]] = {}
    filled: dict[tuple[torch.device, torch.dtype], int] = {}
    for storage, values in parts:
        size, kind = storage.nbytes(), (values.device, values.dtype)
        if filled.get(kind, _PIECE) + size > _PIECE:
            found.setdefault(kind, []).append([])
            filled[kind] = 0
        found[kind][-1].append((storage, values))
        filled[kind] += size
    return [_Piece(part) for several in found.values() for part in several]
