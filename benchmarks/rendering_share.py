"""What drawing, logging and storing the explanations cost beside explaining.

    OMP_NUM_THREADS=1 python benchmarks/rendering_share.py

Fits a network of torchvision for a few short epochs, on the CPU, with the monitor's defaults and
TensorBoard. Explanations 0, 1, 3, 7 … measure the controls as well, which takes more than twice as long.
Prints the seconds of the processor for each explanation by part, and the share of what is
not explaining. Pictures of noise, the default, make the largest files.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from monitor_overhead import CLASSES, Module
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_aop import ExplanationMonitor
from lightning_aop.data.images import Preprocess, read_image
from lightning_aop.monitor.run_folder import RunFolder

PARTS = ("explain", "draw and log", "store")


class Timed(ExplanationMonitor):
    """The monitor, with a clock beside each part of its work."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seconds: list[dict[str, float]] = []

    def _time(self, part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        started = time.process_time()
        result = work(*arguments)
        if part == "explain":
            self.seconds.append(dict.fromkeys(PARTS, 0.0))
        self.seconds[-1][part] += time.process_time() - started
        return result

    def _explain(self, *arguments: Any) -> Any:
        return self._time("explain", super()._explain, *arguments)

    def _before(self, *arguments: Any) -> Any:
        return self._time("store", super()._before, *arguments)

    def _write(self, sink: Any, *arguments: Any) -> bool:
        part = "store" if isinstance(sink, RunFolder) else "draw and log"

        def write() -> bool:
            written = super(Timed, self)._write(sink, *arguments)
            for logger in getattr(sink, "loggers", ()):
                logger.experiment.flush()  # TensorBoard writes on a thread of its own
            return written

        return bool(self._time(part, write))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--images", type=int, default=16, help="in the probe")
    parser.add_argument("--side", type=int, default=224, help="of a picture, in pixels")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--photos", type=Path, help="a folder of JPEG files, instead of noise")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    images = torch.rand(options.images, 3, options.side, options.side)
    if options.photos is not None:
        paths = sorted(options.photos.glob("*.JPEG"))[: options.images]
        preprocess = Preprocess(options.side, mean=(0, 0, 0), std=(1, 1, 1))
        images = torch.stack([preprocess(read_image(path)) for path in paths])
    data = TensorDataset(images, torch.arange(options.images) % CLASSES)
    monitor = Timed(probe=options.images, max_overhead=None)  # or most epochs would be left out
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            accelerator="cpu",
            max_epochs=options.epochs,
            logger=TensorBoardLogger(folder),
            callbacks=[monitor],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Module(options.model), DataLoader(data, batch_size=8), DataLoader(data, batch_size=8))
    print(
        f"{options.model}, {options.images} pictures of {options.side} x {options.side}, 1 thread\n"
    )
    print(f"| explanation | {' | '.join(PARTS)} | all but explaining |")
    print("|---" * (len(PARTS) + 2) + "|")
    shares = []
    for number, spent in enumerate(monitor.seconds):
        row = list(spent.values())
        shares.append(sum(row[1:]) / row[0])
        seconds = " | ".join(f"{value:.2f} s" for value in row)
        print(f"| {number} | {seconds} | {shares[-1]:.1%} |")
    print(f"\nmedian share: {statistics.median(shares):.1%}")


if __name__ == "__main__":
    main()
