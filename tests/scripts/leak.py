"""Let the monitor explain again and again, and write down what the process holds on the way.

    python leak.py OUT FIRINGS

OUT/held.json has a list for each thing that is counted, a value for every tenth training step, after
each of which the monitor has explained; and the shapes of the tensors at the end, scalars left out, as
they are without the monitor and with it.
"""

import ctypes
import gc
import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "monitor"))

import pytorch_lightning as pl
import torch
from conftest import SmallNet
from matplotlib import pyplot
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_aop import ExplanationMonitor
from lightning_aop.model import layers

out, firings = Path(sys.argv[1]), int(sys.argv[2])


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def hooks(module: nn.Module) -> int:
    return sum(
        len(table)
        for each in module.modules()
        for name, table in vars(each).items()
        if "_hooks" in name and isinstance(table, dict)
    )


class Count(pl.Callback):
    """Looks around after the monitor."""

    def __init__(self) -> None:
        self.held: dict[str, list[float]] = {}
        self.shapes: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % 10:
            return
        gc.collect()
        objects = gc.get_objects()
        tensors = [each for each in objects if issubclass(type(each), Tensor)]
        self.shapes = sorted(list(each.shape) for each in tensors if each.numel() > 1)
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but not given back, comes and goes
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        now = {
            "step": trainer.global_step,
            "seconds": time.perf_counter(),
            "kB": resident * os.sysconf("SC_PAGE_SIZE") / 1024,
            "objects": len(objects),
            "tensors": len(tensors),
            "hooks": hooks(pl_module),
            "target layers": len(layers._found),
            "figures": len(pyplot.get_fignums()),
            "files": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
        }
        del objects, tensors
        for name, value in now.items():
            self.held.setdefault(name, []).append(value)


def fit(name: str, steps: int, *callbacks: pl.Callback) -> tuple[dict[str, list[float]], Any]:
    data = TensorDataset(torch.rand(8, 3, 24, 24), torch.arange(8) % 5)
    sampler = RandomSampler(data, replacement=True, num_samples=2 * steps)
    count = Count()
    pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[*callbacks, count],
        logger=TensorBoardLogger(out, name=name, version=0),
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=out,
    ).fit(Module(), DataLoader(data, batch_size=2, sampler=sampler))
    return count.held, count.shapes


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("error", UserWarning)  # an explanation that fails holds nothing
    for message in (".*does not have many workers", ".*LeafSpec", ".*available but not used"):
        warnings.filterwarnings("ignore", message)
    gc.collect()
    gc.freeze()  # what the imports made is not counted
    _, without = fit("without", 10)
    held, after = fit("with", firings, ExplanationMonitor(probe=2, every_n_train_steps=1))
    shapes = {"shapes without": without, "shapes with": after}
    (out / "held.json").write_text(json.dumps(held | shapes))
    gc.unfreeze()
