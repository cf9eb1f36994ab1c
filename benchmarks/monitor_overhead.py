"""What an ExplanationMonitor costs: epochs without one, with one that waits, with one that explains.

    OMP_NUM_THREADS=1 python benchmarks/monitor_overhead.py --json monitor_overhead.json

Trains a network of torchvision on generated pictures, on the CPU. The kinds of epoch take turns, in
another order each round, so that a change in the machine's load meets all of them; the first round is
left out. An epoch is its training and its validation, without the explanation before training. Prints
a Markdown table of medians and quartiles, and writes every value to the JSON file.

Seconds are given by the clock and of the processor: where the machine has other work, only the second
can be compared. An explanation costs the same whatever the epoch's length, so that its share of a short
epoch says little; the last lines set it beside the training of pictures.
"""

import argparse
import datetime
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.trainer.states import RunningStage
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_aop import ExplanationMonitor, __version__

KINDS = {
    "none": "no monitor",
    "waiting": "a monitor that does not explain",
    "failures": "one that follows failures and does not explain",
    "default": "the default monitor, every epoch",
    "budget": "the default monitor, max_overhead=0.05",
}
CLASSES = 10


class Module(pl.LightningModule):
    """A classifier with nothing of its own."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net: nn.Module = torchvision.models.get_model(name, num_classes=CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        """Log the loss."""
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters())


class Clock(pl.Callback):
    """Takes the time of an epoch; comes last, so that the monitor's work is in it."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start."""
        self.started = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        self.wall = time.perf_counter() - self.started[0]
        self.cpu = time.process_time() - self.started[1]


def pictures(count: int, size: int, seed: int) -> TensorDataset:
    """Return noise with a square in the place of the class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    side = size // 5
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 5)
        top, left = size // 4 + row * size // 2 - side // 2, column * side
        image[:, top : top + side, left : left + side] += 2
    return TensorDataset(images, labels)


def epoch(
    kind: str, options: argparse.Namespace, data: Sequence[Any], folder: str
) -> dict[str, Any]:
    """Train for one epoch and return what it took."""
    torch.manual_seed(0)
    monitors = {
        "none": [],
        "waiting": [ExplanationMonitor(every_n_epochs=10**9)],
        "failures": [ExplanationMonitor(every_n_epochs=10**9, failures=8)],
        "default": [ExplanationMonitor()],
        "budget": [ExplanationMonitor(max_overhead=0.05)],
    }[kind]
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[*monitors, clock],
        logger=TensorBoardLogger(folder),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
    )
    training, validation = (DataLoader(each, batch_size=options.batch) for each in data)
    trainer.fit(Module(options.model), training, validation)
    found = {"wall": clock.wall, "cpu": clock.cpu}
    if kind == "default":
        found["explanation"] = float(trainer.callback_metrics["explain/seconds"])
    if kind == "failures":
        found["listening"] = listening(monitors[0], trainer, validation)
    if kind == "waiting":
        found["step"] = waiting_at_a_step(monitors[0], trainer)
    return found


def waiting_at_a_step(monitor: ExplanationMonitor, trainer: pl.Trainer) -> float:
    """Return the seconds that the monitor's one call at a training step takes, if it only waits."""
    calls = 20_000
    module = trainer.lightning_module
    started = time.process_time()
    for index in range(calls):
        monitor.on_train_batch_end(trainer, module, None, None, index)
    return (time.process_time() - started) / calls


def listening(monitor: ExplanationMonitor, trainer: pl.Trainer, loader: DataLoader[Any]) -> float:
    """Return the seconds that the monitor takes of a validation batch, but for its hook."""
    module, calls, taken = trainer.lightning_module, 100, 0.0
    batch = next(iter(loader))
    trainer.state.stage = RunningStage.VALIDATING
    monitor.on_validation_epoch_start(trainer, module)
    with torch.no_grad():
        for number in range(calls):
            started = time.process_time()
            monitor.on_validation_batch_start(trainer, module, batch, number)
            begun = time.process_time()
            module(batch[0])
            stepped = time.process_time()
            monitor.on_validation_batch_end(trainer, module, None, batch, number)
            ended = time.process_time()
            taken += (begun - started) + (ended - stepped)
    monitor.on_exception(trainer, module, RuntimeError())
    return taken / calls


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the median with the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_lightning": version("pytorch_lightning"),
        "lightning_aop": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def table(rounds: Sequence[dict[str, dict[str, Any]]]) -> str:
    """Return the table in Markdown."""
    rows = [
        "| epoch with | seconds by the clock | of the processor | processor time against none |",
        "|---|---|---|---|",
    ]
    for kind, title in KINDS.items():
        # Within a round, so that what slows a whole round down is no difference.
        more = [100 * (each[kind]["cpu"] / each["none"]["cpu"] - 1) for each in rounds]
        against = "" if kind == "none" else f"{spread(more, 1)} %"
        wall, cpu = (spread([each[kind][how] for each in rounds]) for how in ("wall", "cpu"))
        rows.append(f"| {title} | {wall} | {cpu} | {against} |")
    return "\n".join(rows)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="resnet18", help="a network of torchvision")
    parser.add_argument("--size", type=int, default=64, help="of a picture, in pixels")
    parser.add_argument("--images", type=int, default=256, help="training pictures in an epoch")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7, help="rounds, one more is left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path("monitor_overhead.json"))
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error("--repeats must be at least 2")
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*LeafSpec", ".*smaller than the logging"):
        warnings.filterwarnings("ignore", message)
    validation = max(options.images // 8, 8)
    data = [pictures(options.images, options.size, 0), pictures(validation, options.size, 1)]
    rounds: list[dict[str, Any]] = []
    kinds = list(KINDS)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.repeats + 1):
            turn = number % len(kinds)
            order = kinds[turn:] + kinds[:turn]
            rounds.append({kind: epoch(kind, options, data, folder) for kind in order})
            rounds[-1]["load"] = os.getloadavg()[0]
            took = ", ".join(f"{kind} {rounds[-1][kind]['wall']:.1f} s" for kind in kinds)
            print(f"round {number} of {options.repeats}: {took}", flush=True)
    kept = rounds[1:]
    settings = {name: str(value) for name, value in vars(options).items()}
    settings["validation"] = str(validation)
    about = machine()
    options.json.write_text(
        json.dumps({"machine": about, "settings": settings, "rounds": kept}, indent=1) + "\n"
    )
    loads = [each["load"] for each in kept]
    one = statistics.median(each["default"]["cpu"] - each["none"]["cpu"] for each in kept)
    picture = statistics.median(each["none"]["cpu"] for each in kept) / options.images
    print(
        f"\n{options.model}, {options.images} training and {validation} validation pictures of "
        f"{options.size} x {options.size}, batches of {options.batch}, {options.repeats} rounds.\n"
        f"{about['processor']}, {about['cores']} cores, {about['threads']} thread(s), load "
        f"{min(loads):.1f} to {max(loads):.1f}, {about['system']}, Python {about['python']}, torch "
        f"{about['torch']}, Lightning {about['pytorch_lightning']}, {about['date']}.\n"
    )
    print(table(kept))
    steps = spread([1e6 * each["waiting"]["step"] for each in kept])
    heard = spread([1e3 * each["failures"]["listening"] for each in kept])
    seconds = spread([each["default"]["explanation"] for each in kept])
    print(f"\n`explain/seconds`, by the clock: {seconds}.")
    print(f"A monitor that waits takes {steps} µs at a training step.")
    print(f"Following failures takes {heard} ms of a validation batch, beside the hook.")
    print(
        f"An explanation of 8 pictures takes {one:.1f} s of processor time, as much as training "
        f"with {one / picture:.0f} pictures; in an epoch of 50,000 that is "
        f"{100 * one / picture / 50_000:.2f} %."
    )


if __name__ == "__main__":
    main()
