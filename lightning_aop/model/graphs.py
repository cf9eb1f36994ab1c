"""Passes of one shape as a CUDA graph: what eager is launched operation by operation, at once.

A network of a hundred layers is some hundred launches for a pass, which take a GPU longer than its
arithmetic where images are few. A graph launches them all together. It is captured once for an
explanation, in a pool of memory that is given back with it, and only if what it gives is what the
eager pass has given. Whatever can't be captured stays eager.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_aop.model.collectives import EXCHANGES
from lightning_aop.model.isolation import isolated_rng
from lightning_aop.model.passes import graphs_wanted, recorded, uncounted

__all__ = ["CAPTURES", "Graphs", "Work"]

Work: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""What is done in a pass: a function of tensors alone, whose results are new tensors."""


@runtime_checkable
class Capture(Protocol):
    """What makes graphs."""

    def beside(self) -> AbstractContextManager[object]:
        """Do what is done in the block where it will be captured, so that all is ready there."""

    def close(self) -> None:
        """Give back what the graphs took."""

    def __call__(self, work: Work, tensors: Sequence[Tensor]) -> Work:
        """Capture work on tensors of these shapes; return what replays it with others."""


_WORTH = 6
"""Passes from which on a graph pays: two run eagerly, and to capture one takes as long as a third."""

_ALIKE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""By which share of the largest value a graph's result may differ; in half precision 1e-2."""


class Graphs:
    """The graphs of one explanation.

    Attributes:
        capture: makes a graph; None where all passes stay eager.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self.capture = capture

    @classmethod
    def on(cls, device: torch.device) -> "Graphs":
        """Return those of a device, as far as they are wanted."""
        make = CAPTURES.get(device.type) if graphs_wanted() else None
        return cls(make and make(device))

    def close(self) -> None:
        """Give the graphs and their memory back."""
        if self.capture is not None:
            self.capture.close()

    def repeated(self, work: Work, times: int) -> Work:
        """Return the work as it is best done so many times with tensors of one shape."""
        if self.capture is None or times < _WORTH:
            return work
        return _Repeated(work, self.capture)


class _Repeated:
    """Work that is done eagerly the first two times for each shape, and replayed from then on."""

    def __init__(self, work: Work, capture: Capture) -> None:
        self._work, self._capture = work, capture
        self._replays: dict[object, Work | None] = {}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        shapes = *((t.shape, t.dtype, t.device) for t in tensors), torch.is_grad_enabled()
        if shapes not in self._replays:
            # Whatever a model only does in its first pass it has done then.
            self._replays[shapes] = None
            return self._work(*tensors)
        if replay := self._replays[shapes]:
            return replay(*tensors)
        watch = _Watch()
        with self._capture.beside(), watch:
            expected, again = recorded(lambda: self._work(*tensors))
        replay = None if watch.refused else self._tried(tensors, expected)
        self._replays[shapes] = _Counted(replay, again) if replay else self._work
        return expected

    def _tried(self, tensors: Sequence[Tensor], expected: tuple[Tensor, ...]) -> Work | None:
        """Return a replay if there can be one, and if it gives what is expected."""
        try:
            # Where it fails, random numbers go on as if it had not been tried.
            with uncounted(), isolated_rng(tensors[0].device):
                replay = self._capture(self._work, tensors)
                return replay if all(map(_alike, replay(*tensors), expected)) else None
        except Exception:  # whatever a model does that no graph can hold
            return None


class _Counted:
    """A replay that counts as the evaluations that were counted when it was eager."""

    def __init__(self, replay: Work, again: Callable[[], None]) -> None:
        self._replay, self._again = replay, again

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self._again()
        return self._replay(*tensors)


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Tell whether a result is the expected one; NaN is like nothing."""
    allowed = _ALIKE.get(expected.dtype, 1e-2) * expected.abs().amax()
    return found.shape == expected.shape and bool(((found - expected).abs() <= allowed).all())


class _Watch(TorchDispatchMode):
    """Sees what no graph can hold.

    That is a value that the host asks for, a shape that hangs on values, a copy from one device to
    another, an exchange between processes. A capture that fails over it would leave its marks on the
    device, so such work is not captured in the first place.

    Attributes:
        refused: the name of the first such operation.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refused: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.refused is None and _refused(func, args, result):
            self.refused = str(func)
        return result


def _refused(func: Any, args: tuple[Any, ...], result: object) -> bool:
    if torch.Tag.data_dependent_output in func.tags or func.namespace in EXCHANGES:
        return True
    if "index" in func.__name__ and len(args) > 1 and isinstance(args[1], (list, tuple)):
        # By numbers the shape is known; by masks it hangs on their values.
        return any(
            isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
    if torch.Tag.dynamic_output_shape in func.tags:
        return True
    devices = {each.device for each in (*args, result) if isinstance(each, Tensor)}
    return len(devices) > 1 and func.__name__.startswith(("_to_copy", "copy_"))


class CudaGraphs:
    """Captures as PyTorch's documentation says: on a stream of its own, in a pool of its own.

    The graphs of one explanation share the pool. What a replay gives is copied out of it at once, so no
    other replay can overwrite it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._graphs: list[torch.cuda.CUDAGraph] = []

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work on the side stream: its libraries get their memory there before the capture."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def __call__(self, work: Work, tensors: Sequence[Tensor]) -> Work:
        """Capture on the side stream."""
        given = [tensor.detach().clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those of a loader that pins memory, may go on.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            results = work(*given)
        self._graphs.append(graph)

        def replay(*others: Tensor) -> tuple[Tensor, ...]:
            for own, other in zip(given, others, strict=True):
                own.copy_(other)
            graph.replay()
            return tuple(result.clone() for result in results)

        return replay

    def close(self) -> None:
        """Give the graphs and their memory back."""
        if self._graphs:  # they may be at work still
            torch.cuda.current_stream(self._device).synchronize()
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()


CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaGraphs}
"""What makes graphs, by the type of the device; passes on others stay eager."""
