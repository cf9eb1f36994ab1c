"""Read the first samples of a dataset without leaving a mark on it, or on the process.

Reading a sample opens files, moves generators and counters, and fills caches, and training goes on with
the same dataset: a file that is opened before the loader's workers start is one file to all of them.
So samples are read in a worker process of their own, as the loader would, which ends with all that it
opened; or from a copy of the dataset, where there can be no such process.
"""

import copy
import ctypes
import gc
import io
import mmap
import multiprocessing
import os
import pickle
import socket
import stat
import sys
import threading
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, queues
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from lightning_aop.errors import InvalidValueError
from lightning_aop.model.isolation import isolated_rng

__all__ = ["Collate", "Stream", "loaders_in", "read_samples"]

Collate: TypeAlias = Callable[[Any], Any]

_SECONDS = 60.0  # that a worker has for the first batch
_INSTEAD = "pass the probe itself, probe=(images, labels)"


class Stream(IterableDataset[Any]):
    """Whatever can be iterated, as a dataset; to be iterated in a process of its own, or as a copy.

    Attributes:
        items: such as a loader.
        indices: the samples of which the loaders in it make their first batch, None for those that
            their samplers give.
    """

    def __init__(self, items: Iterable[Any], indices: Sequence[int] | None = None) -> None:
        self.items, self.indices = items, indices

    def __iter__(self) -> Iterator[Any]:
        for loader in loaders_in(self.items):
            # This process may have neither workers nor an accelerator, nor use those of its parent.
            settings: dict[str, Any] = {"num_workers": 0, "timeout": 0, "pin_memory": False}
            settings["_iterator"] = None
            if self.indices is not None and loader.batch_sampler is not None:
                settings |= {"batch_sampler": [self.indices] if self.indices else []}
                settings |= {
                    "drop_last": False,
                    "batch_size": loader.batch_size and len(self.indices),
                }
            vars(loader).update(settings)
        return iter(self.items)


def loaders_in(items: Any, depth: int = 3) -> list[DataLoader[Any]]:
    """Return the DataLoader that something is, or those that it is a wrapper of."""
    if isinstance(items, DataLoader):
        return [items]
    if not depth or isinstance(items, (Dataset, nn.Module, type, types.ModuleType)):
        return []
    inner = [*getattr(items, "__dict__", {}).values()]
    return [loader for each in inner for loader in loaders_in(each, depth - 1)]


def read_samples(
    dataset: Any,
    count: int | Sequence[int],
    *,
    collate: Collate,
    loader: Any = None,
    ready: bool = False,
    note: Callable[[Any], Any],
) -> tuple[Any, Any]:
    """Return the first samples of a dataset as a batch, and what `note` says of the batch.

    Args:
        dataset: with a length and indices, or one to iterate.
        count: how many samples; all, if there are fewer. Or which, by their indices.
        collate: makes a batch of samples.
        loader: whose way of starting workers is used.
        ready: a sample of the dataset is a batch already, and the first one is taken.
        note: called where the samples are read, since it may read the dataset, too.

    Raises:
        ValueError: there are no samples, or they can't be read without using up the dataset's.
        RuntimeError: reading failed in the worker.
    """
    if shared := _held(dataset, _is_shared):
        raise InvalidValueError(
            f"{_name(dataset)} reads from a {type(shared).__name__}, and what the probe took from it "
            f"would be missing in training: {_INSTEAD}"
        )
    indices: Sequence[int] | None = None
    if not isinstance(count, int):
        indices, count = count, len(count)
    workers = int(getattr(loader, "num_workers", 0))
    settings: dict[str, Any] = {"collate_fn": _Packed(collate, note)}
    settings["batch_size"] = None if ready else count
    if not hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
        dataset = Stream(dataset)
    if not isinstance(dataset, IterableDataset):
        settings["sampler"] = indices or range(min(1 if ready else count, len(dataset)))
    with isolated_rng(seed=0):
        # A fork has none of the threads that a dataset may wait for.
        context = None if not workers and _held(dataset, _is_running) else _context(loader)
        if context:
            start = _Started(getattr(loader, "worker_init_fn", None) if workers else None)
            seconds = max(_SECONDS, float(getattr(loader, "timeout", 0)))
            process: dict[str, Any] = {"num_workers": 1, "prefetch_factor": 1, "timeout": seconds}
            process |= {"multiprocessing_context": context, "worker_init_fn": start}
            try:
                return _first(DataLoader(dataset, **settings, **process), dataset)
            except _EmptyError:
                raise
            except Exception as error:
                # A dataset that no loader reads in workers, may not work in one.
                if workers:
                    raise _unread(dataset, count, " in a worker process", error) from error
        try:
            # Together, for both may be methods of the dataset.
            copied, settings["collate_fn"] = copy.deepcopy((dataset, settings["collate_fn"]))
        except Exception as error:
            raise InvalidValueError(
                f"{_name(dataset)} can't be copied ({_last_line(error)}), and reading it for the "
                f"probe would change what training reads: {_INSTEAD}"
            ) from error
        try:
            return _first(DataLoader(copied, **settings), dataset)
        except _EmptyError:
            raise
        except Exception as error:
            raise _unread(dataset, count, "", error) from error


def _unread(dataset: Any, count: int, where: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"the first {count} samples of {_name(dataset)} could not be read{where}. "
        f"{_last_line(error)}. If training reads them, {_INSTEAD}"
    )


class _EmptyError(InvalidValueError):
    """There are no samples."""


def _first(loader: DataLoader[Any], dataset: Any) -> tuple[Any, Any]:
    """Return the first batch of a loader, whose worker ends then."""
    loader.generator = torch.Generator().manual_seed(0)  # the worker's seed is drawn from it
    with warnings.catch_warnings():
        # That a fork is unsafe beside threads: a worker that hangs for it is given up in time.
        warnings.simplefilter("ignore")
        batches = iter(loader)
    try:
        packed = next(batches, None)
    finally:
        getattr(batches, "_shutdown_workers", lambda: None)()
        for worker in getattr(batches, "_workers", ()):
            if worker.is_alive():
                worker.kill()  # it hears no signal, and the process would wait for it at its end
                worker.join()
    if packed is None:
        raise _EmptyError(f"the dataset is empty: {_INSTEAD}")
    batch, note = pickle.loads(packed)
    return batch, note


def _context(loader: Any) -> Any:
    """Return how to start a worker: as the loader does, or by a fork; None for not at all."""
    if multiprocessing.current_process().daemon:
        return None  # may not have children
    if getattr(loader, "num_workers", 0):
        return loader.multiprocessing_context or multiprocessing.get_context()
    # Elsewhere a new process imports the user's script, which may not be written for that.
    return multiprocessing.get_context("fork") if sys.platform == "linux" else None


@dataclass(frozen=True)
class _Packed:
    """Makes a batch, and bytes of it: what can't be sent fails here, with a message."""

    collate: Collate
    note: Callable[[Any], Any]

    def __call__(self, samples: Any) -> bytes:
        batch = self.collate(samples)
        return pickle.dumps((batch, self.note(batch)))


@dataclass(frozen=True)
class _Started:
    """What a worker does first."""

    user: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        _open_files_anew()
        _unshare_memory()
        if self.user is not None:
            info: Any = get_worker_info()
            if isinstance(info.dataset, Stream):  # the user's function expects the user's dataset
                own = getattr(info.dataset.items, "dataset", info.dataset)
                object.__setattr__(info, "dataset", own)
            self.user(worker)


def _open_files_anew() -> None:
    """Give the process places of its own in the files that it was forked with.

    To read from an inherited file moves the place of the parent, too.
    """
    if sys.platform != "linux":
        return
    import fcntl

    for number in os.listdir("/proc/self/fd"):
        descriptor = int(number)
        with suppress(OSError):
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            if descriptor > 2 and regular and flags & os.O_ACCMODE != os.O_WRONLY:
                own = os.open(f"/proc/self/fd/{descriptor}", flags)
                os.lseek(own, os.lseek(descriptor, 0, os.SEEK_CUR), os.SEEK_SET)
                os.dup2(own, descriptor, inheritable=False)
                os.close(own)


_COPIED = 2**28  # bytes at most of memory that no file is behind


def _unshare_memory() -> None:
    """Give the process a view of its own of all memory that it shares, by which its writes stay its own.

    Such are tensors after `share_memory_`, the values and arrays of `multiprocessing`, and memory maps
    of files. Pages are copied where they are written to, so that large ones cost nothing.
    """
    if sys.platform != "linux":
        return
    opened = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            path = f"/proc/self/fd/{number}"
            opened[os.readlink(path), str(os.stat(path).st_ino)] = path
    with open("/proc/self/maps") as file:
        maps = file.read().splitlines()
    for line in maps:
        span, rights, offset, _, inode, *names = line.split(maxsplit=5)
        name = names[0] if names else ""
        # Those of CUDA are devices; of semaphores the worker needs some to talk to its parent.
        if not rights.endswith("s") or "w" not in rights or "/sem." in name:
            continue
        start, end = (int(each, base=16) for each in span.split("-"))
        if name == "/dev/zero (deleted)":  # anonymous
            if end - start <= _COPIED:
                values = ctypes.string_at(start, end - start)
                _map_privately(start, end - start)
                ctypes.memmove(start, values, len(values))
            continue
        with suppress(OSError):  # without its file there is no other view of it
            path = opened.get((name, inode), name)
            if stat.S_ISREG(os.stat(path).st_mode):
                descriptor = os.open(path, os.O_RDONLY)
                _map_privately(start, end - start, descriptor, int(offset, base=16))
                os.close(descriptor)


def _map_privately(start: int, size: int, descriptor: int = -1, offset: int = 0) -> None:
    """Put a private map of a file, or of zeros, into the place of another map."""
    call = ctypes.CDLL(None).mmap
    call.restype = ctypes.c_void_p
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | 0x10  # MAP_FIXED
    flags |= mmap.MAP_ANONYMOUS if descriptor < 0 else 0
    call(start, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, offset)


_SHARED = (
    *(socket.socket, queues.Queue, queues.SimpleQueue, _MultiProcessingDataLoaderIter),
    *((connection._ConnectionBase,) if hasattr(connection, "_ConnectionBase") else ()),
)
"""What a dataset reads from that other processes use up, too."""
_LEAVES = (type, types.ModuleType, types.FunctionType, Tensor, np.ndarray, str, bytes, int, float)
_MOST = 10_000  # objects that are looked at


def _is_shared(thing: Any) -> bool:
    """Tell whether what is read from a thing is gone for others, as from queues, sockets and pipes."""
    if issubclass(type(thing), _SHARED):
        return True
    if not issubclass(type(thing), io.IOBase):
        return False
    try:
        mode = os.fstat(thing.fileno()).st_mode
        return not stat.S_ISREG(mode) and bool(thing.readable())
    except (OSError, ValueError):  # it is closed, or in memory
        return False


def _is_running(thing: Any) -> bool:
    """Tell whether something is a thread that runs, other than that of the program."""
    if not issubclass(type(thing), threading.Thread) or thing is threading.main_thread():
        return False
    return bool(thing.is_alive())


def _held(dataset: Any, is_wanted: Callable[[Any], bool]) -> Any:
    """Return what a dataset has of some kind of objects; None without any."""
    ahead, seen = deque([dataset]), {id(dataset)}
    if isinstance(dataset, Stream):  # which doesn't use the workers that a loader keeps
        seen |= {id(loader._iterator) for loader in loaders_in(dataset.items)}
    while ahead and len(seen) < _MOST:
        thing = ahead.popleft()
        if is_wanted(thing):
            return thing
        for inner in gc.get_referents(thing):
            if not issubclass(type(inner), _LEAVES) and id(inner) not in seen:
                seen.add(id(inner))
                ahead.append(inner)
    return None


def _name(dataset: Any) -> str:
    return type(dataset.items if isinstance(dataset, Stream) else dataset).__name__


def _last_line(error: Exception) -> str:
    """Return what went wrong, without the traceback that a worker puts into its message."""
    lines = str(error).strip().splitlines()
    if "Original Traceback" in str(error):
        return lines[-1]
    return f"{type(error).__name__}: {' '.join(lines)}"
