"""What explanations take on a GPU: against the bare network, against other tools, and in a training.

    pip install captum
    python benchmarks/gpu.py --markdown benchmarks/gpu.md --json gpu.json

One command, under eight minutes on an H100. ResNet50 with random weights, which take as long as others,
at 224 x 224. For float32 and bfloat16 (autocast), and for 8, 16 and 64 images, each piece of work takes
turns with the bare network, and the table has medians. The floor is the time that as many forwards and
backwards of the bare network take at the batch size at which it is fastest: launched operation by
operation (eager), and replayed as a CUDA graph. Methods of hundreds of evaluations get 4 images.

The last table is the monitor's share of an epoch: ResNet50 is trained on noise with the default monitor,
and the time of an explanation is set beside that of ImageNet's 1,281,167 images at this throughput.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import published_loops
import pytorch_lightning as pl
import torch
import torchvision
from measuring import finish, in_words, machine, peak_mib, quietly, seconds
from monitor_overhead import Module, pictures
from peer_tools import OURS, Batch, _captum, both_curves
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_aop import (
    AOP,
    IGOS,
    RISE,
    Blank,
    ExplanationMonitor,
    GradCAM,
    __version__,
    fast_sigcam,
    sigcam,
)
from lightning_aop.model.passes import Passes, count_evaluations

IMAGENET = 1_281_167
FEW = 4  # images of methods that need hundreds of evaluations
LIMITS = {  # times the floor, or times the other tool's time
    "GradCAM": 1.05,
    "fast_sigcam()": 1.15,
    "both curves": 1.1,
    "I-GOS": 1.3,
    "sigcam()": 1.3,
    "RISE, 256 masks": 1.0,
}


@dataclass
class Floor:
    """Seconds an image of the bare network, without and with a backward, by batch size."""

    eager: dict[int, tuple[float, float]] = field(default_factory=dict)
    graphed: dict[int, tuple[float, float]] = field(default_factory=dict)

    def of(self, kind: str, forwards: int, backwards: int) -> float | None:
        """Return the seconds that so many evaluations take; a backward needs a forward's record."""
        times: dict[int, tuple[float, float]] = getattr(self, kind)
        if not times:
            return None
        forward, both = (min(each[i] for each in times.values()) for i in (0, 1))
        return (forwards - backwards) * forward + backwards * both


def passes(model: torch.nn.Module, images: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return a forward, and a forward with its backward."""
    leaf = images.detach().requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return model(images)  # type: ignore[no-any-return]

    return forward, lambda: torch.autograd.grad(model(leaf).sum(), leaf)


def replayed(work: Callable[[], Any]) -> Callable[[], Any]:
    """Return what replays some work as a CUDA graph, as PyTorch's documentation has it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = work()

    def replay(held: Any = held) -> None:
        graph.replay()

    return replay


def measure_floor(model: torch.nn.Module, images: Tensor, sizes: list[int], repeats: int) -> Floor:
    """Time the bare network at each batch size."""
    floor, device = Floor(), images.device
    for size in sizes:
        batch = images.repeat(-(-size // len(images)), 1, 1, 1)[:size]
        kinds = {"eager": passes(model, batch)}
        if device.type == "cuda":
            kinds["graphed"] = tuple(map(replayed, kinds["eager"]))  # type: ignore[assignment]
        for kind, both in kinds.items():
            for work in both:
                work()
            getattr(floor, kind)[size] = tuple(
                statistics.median(seconds(work, device) for _ in range(repeats)) / size
                for work in both
            )
    return floor


def works(batch: Batch) -> dict[str, tuple[int, Callable[[], Tensor], Callable[[], Tensor] | None]]:
    """Return by name: how many images, our work, and the other tool's."""
    count, few, ramp = len(batch.images), batch.first(FEW), batch.ramp()
    here, least = (batch.images, batch.targets), (few.images, few.targets)
    model, layer = batch.model, batch.layer
    with contextlib.suppress(ImportError):
        import captum  # noqa: F401

        captums: Callable[[], Tensor] | None = lambda: _captum(batch)  # noqa: E731
    found: dict[str, Any] = {
        "GradCAM": (count, lambda: GradCAM(layer).explain(model, *here), locals().get("captums")),
        "fast_sigcam()": (count, lambda: fast_sigcam(layer).explain(model, *here), None),
        "both curves": (count, lambda: both_curves(batch, ramp), None),
    }
    if count == 16:
        found |= {
            "I-GOS": (FEW, lambda: AOP(Blank(), IGOS()).explain(model, *least), None),
            "sigcam()": (FEW, lambda: sigcam(layer).explain(model, *least), None),
            "RISE, 256 masks": (
                FEW,
                lambda: RISE(masks=256).explain(model, *least),
                lambda: published_loops.rise(model, *least, masks=256),
            ),
        }
    return found


HEAD = (
    *("dtype", "images", "work", "seconds", "images a second", "evaluations"),
    *("times the eager floor", "times the graphed floor", "times the other tool", "limit"),
    "peak memory, MiB",
)


def graphed(work: Callable[[], Tensor], images: int) -> Callable[[], Tensor]:
    """Let passes be replayed as graphs where that can be."""
    return lambda: Passes(graphs="auto").within_memory(work, images)[0]


def measured(batch: Batch, floor: Floor, options: argparse.Namespace, dtype: str) -> Iterator[Any]:
    """Yield a row of the table for each piece of work."""
    device = batch.images.device
    for name, (count, work, other) in works(batch).items():
        ours = graphed(work, count)
        with quietly(), count_evaluations(batch.model) as cost:
            ours()
        peak = peak_mib(ours, device)
        times: tuple[list[float], list[float]] = ([], [])
        until = time.perf_counter() + options.seconds
        if other is not None:
            other()
        for _ in range(options.repeats):
            times[0].append(seconds(ours, device))
            if other is not None:
                times[1].append(seconds(other, device))
            if time.perf_counter() > until:
                break
        middle = statistics.median(times[0])
        against = [floor.of(kind, cost.forward, cost.backward) for kind in ("eager", "graphed")]
        against.append(statistics.median(times[1]) if times[1] else None)
        yield {
            "dtype": dtype,
            "images": count,
            "work": name,
            "seconds": middle,
            "images a second": count / middle,
            "evaluations": f"{cost.forward} + {cost.backward}",
            **{
                head: None if least is None else middle / least
                for head, least in zip(HEAD[6:9], against, strict=True)
            },
            "limit": LIMITS[name],
            "peak memory, MiB": peak,
        }


def monitor_share(options: argparse.Namespace) -> dict[str, float]:
    """Train with the default monitor; return the seconds of an explanation and of an epoch."""
    size = options.batch
    data = pictures(4 * size, options.side, 0)
    stamps: list[float] = []

    class Steps(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            finish(trainer.strategy.root_device)
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, quietly():
        trainer = pl.Trainer(
            accelerator="gpu" if options.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if options.device == "cuda" else "32-true",
            max_epochs=3,
            callbacks=[ExplanationMonitor(graphs="auto"), Steps()],
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        train, val = (
            DataLoader(each, batch_size=size) for each in (data, pictures(64, options.side, 1))
        )
        trainer.fit(Module(options.network), train, val)
    each = float(trainer.callback_metrics["explain/seconds"])
    # Of the steps of an epoch, the first waits for the validation before it.
    steps = [b - a for n, (a, b) in enumerate(pairwise(stamps)) if n % 4 != 3]
    step = statistics.median(steps)
    return {
        "an explanation, s": each,
        "training images a second": size / step,
        "an epoch of ImageNet, s": IMAGENET * step / size,
        "the monitor's share, %": 100 * each / (IMAGENET * step / size + each),
    }


def told(value: Any) -> str:
    """Return a cell of a table."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table."""
    if not rows:
        return []
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(told(row[name]) for name in head) + " |" for row in rows]


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--network", default="resnet50")
    add("--layer", default="layer4")
    add("--images", type=int, nargs="*", default=[8, 16, 64])
    add("--side", type=int, default=224)
    add("--sizes", type=int, nargs="*", default=[8, 16, 32, 64, 128, 256], help="of the floor")
    add("--repeats", type=int, default=7)
    add("--seconds", type=float, default=8, help="after which no other round begins")
    add("--batch", type=int, default=128, help="of the training")
    add("--device", default="cuda", help="cpu only to try this script")
    add("--dtypes", nargs="*", default=["float32", "bfloat16"])
    add("--json", type=Path)
    add("--markdown", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print the tables, and write the files as it goes."""
    options = parsed()
    started = time.perf_counter()
    device = torch.device(options.device)
    torch.manual_seed(0)
    # Weights that need no gradient are cast anew in every pass; so are those that are explained.
    model = torchvision.models.get_model(options.network).to(device).eval().requires_grad_(False)
    images = torch.randn(max(options.images), 3, options.side, options.side, device=device)
    targets = torch.arange(len(images), device=device)
    found = machine(device)
    found["versions"][OURS] = __version__
    rows: list[dict[str, Any]] = []
    share: list[dict[str, Any]] = []
    floors: dict[str, Any] = {}

    def write() -> None:
        lines = [
            f"# On a GPU\n\n{options.network}, {options.side} x {options.side}, medians. "
            f"{found['date']}, {in_words(found)}. `python benchmarks/gpu.py` took "
            f"{time.perf_counter() - started:.0f} s.",
            *("", *table(rows), "", "The monitor's share of an epoch:", "", *table(share)),
        ]
        if options.markdown is not None:
            options.markdown.write_text("\n".join(lines) + "\n")
        if options.json is not None:
            whole = {"machine": found, "floors": floors, "rows": rows, "share": share}
            options.json.write_text(json.dumps(whole, indent=1))

    for dtype in options.dtypes:
        kind = getattr(torch, dtype)
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            floor = measure_floor(model, images, options.sizes, 5)
            floors[dtype] = vars(floor)
            for count in options.images:
                batch = Batch(model, options.layer, images, targets).first(count)
                for row in measured(batch, floor, options, dtype):
                    rows.append(row)
                    print(table([row])[-1], flush=True)
                    write()
    share.append(monitor_share(options))
    print("\n".join(table(share)))
    write()


if __name__ == "__main__":
    main()
