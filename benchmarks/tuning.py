"""What settings of the caller's do to the time of sigcam(), fast_sigcam() and the curves.

Explaining runs a compiled network eagerly, since its hooks would not be heard otherwise; the row
`torch.compile` therefore shows what it costs to hand one over, and `bare forward` what the same
compilation does to a plain forward.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from measuring import finish, quietly, seconds
from peer_tools import Batch, both_curves
from torch import Tensor

from lightning_aop import fast_sigcam, sigcam

SIZES = (4, 8, 16, 32, 64)
HEAD = (
    "| work | setting | seconds | times plain | largest difference | compilation, s |",
    "|---|---|---|---|---|---|",
)


@dataclass
class Tuned:
    """One work's times with one setting; `plain` are those without it, taken in turns."""

    work: str
    setting: str
    difference: float | None = None
    compilation: float | None = None
    seconds: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    trouble: str | None = None

    def row(self) -> str:
        """Return the line of the table."""
        if self.trouble is not None:
            return f"| {self.work} | {self.setting} | {self.trouble} | | | |"
        low, middle, high = statistics.quantiles(self.seconds, n=4)
        difference = "" if self.difference is None else f"{self.difference:.1g}"
        compilation = "" if self.compilation is None else f"{self.compilation:.1f}"
        return (
            f"| {self.work} | {self.setting} | {middle:.3f} [{low:.3f}, {high:.3f}] | "
            f"{middle / statistics.median(self.plain):.2f} | {difference} | {compilation} |"
        )


Work = Callable[[Batch, int], Tensor]
"""Explains a batch, or plays its curves, with so many images in a pass."""


def works(few: int) -> dict[str, Work]:
    """Return what is timed."""

    def forward(batch: Batch, size: int) -> Tensor:
        with torch.no_grad():
            return torch.cat(
                [batch.model(part).softmax(dim=1) for part in batch.images.split(size)]
            )

    def slow(batch: Batch, size: int) -> Tensor:
        part = batch.first(few)
        method = sigcam(part.layer, eval_batch_size=size)
        return method.explain(part.model, part.images, part.targets)

    def fast(batch: Batch, size: int) -> Tensor:
        method = fast_sigcam(batch.layer, eval_batch_size=size)
        return method.explain(batch.model, batch.images, batch.targets)

    return {
        "sigcam()": slow,
        "fast_sigcam()": fast,
        "both curves": lambda batch, size: both_curves(batch, batch.ramp(), size),
        "bare forward": forward,
    }


def measured(
    batch: Batch, few: int, repeats: int, only: Sequence[str] | None = None
) -> Iterator[Tuned]:
    """Time each work with each setting; torch.compile comes last, as it leaves dynamo loaded."""
    device = batch.images.device
    chosen = {name: work for name, work in works(few).items() if not only or name in only}
    bfloat16 = partial(torch.autocast, device.type, torch.bfloat16)
    for name, work in chosen.items():
        for size in SIZES:
            tuned = Tuned(name, f"{size} in a pass" + " (plain)" * (size == 32))
            yield timed(tuned, work, batch, batch, repeats, size)
        last = _copied(batch, torch.channels_last)
        yield timed(Tuned(name, "channels last"), work, batch, last, repeats)
        yield timed(
            Tuned(name, "autocast to bfloat16"), work, batch, batch, repeats, within=bfloat16
        )
    compiled, took, trouble = _compiled(batch)
    for name, work in chosen.items():
        tuned = Tuned(name, "torch.compile", compilation=took, trouble=trouble)
        yield timed(tuned, work, batch, compiled, repeats)


def timed(
    tuned: Tuned,
    work: Work,
    batch: Batch,
    other: Batch,
    repeats: int,
    size: int = 32,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tuned:
    """Compare the setting's result with the plain one, and let the two take turns."""
    if tuned.trouble is not None:
        return tuned
    device = batch.images.device

    def plainly() -> Tensor:
        return work(batch, 32)

    def with_setting() -> Tensor:
        with within():
            return work(other, size)

    try:
        with quietly():
            started = time.perf_counter()
            found = with_setting()  # compiles here, for the shapes of this work
            finish(device)
            first = time.perf_counter() - started
            tuned.difference = float((found.float() - plainly().float()).abs().max())
            for number in range(repeats):
                pair = [(plainly, tuned.plain), (with_setting, tuned.seconds)]
                for call, times in pair[:: 1 if number % 2 else -1]:
                    times.append(seconds(call, device))
    except Exception as error:
        tuned.trouble = _said(error)
        return tuned
    if tuned.compilation is not None:
        tuned.compilation += max(0.0, first - statistics.median(tuned.seconds))
    return tuned


def _copied(batch: Batch, memory_format: torch.memory_format) -> Batch:
    model = copy.deepcopy(batch.model).to(memory_format=memory_format)
    images = batch.images.to(memory_format=memory_format)
    return Batch(model, batch.layer, images, batch.targets)


def _compiled(batch: Batch) -> tuple[Batch, float | None, str | None]:
    """Return the batch with a compiled network, the seconds that took, and what went wrong."""
    other = _copied(batch, torch.contiguous_format)
    try:
        with quietly(), torch.no_grad():
            other.model.compile()
            took = seconds(lambda: other.model(other.images), batch.images.device)
    except Exception as error:  # no compiler, or a network that it can't take
        return batch, None, _said(error)
    return other, took, None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].replace("|", "/")
