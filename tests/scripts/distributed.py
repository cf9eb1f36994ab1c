"""Fit or validate with the monitor on several processes, and save what each of them found.

    python distributed.py OUT PROCESSES PROBE FAILING [TARGETS]

FAILING is the process whose explanations fail, or -1. With TARGETS "confused" all labels are wrong.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "monitor"))

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from conftest import SmallNet
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_aop import ExplanationMonitor, fast_sigcam
from lightning_aop.monitor import callback
from lightning_aop.monitor.explanation import Explanation, Moment

out, processes, probe, failing = Path(sys.argv[1]), *map(int, sys.argv[2:5])
targets: Any = sys.argv[5] if len(sys.argv) > 5 else "label"
torch.set_num_threads(1)
TIMES = ("seconds", "overhead")
said: list[str] = []
# On every process, where Lightning's own is heard on the first only.
callback.warn = said.append
warnings.showwarning = lambda message, *_: said.append(str(message))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Failing:
    """The default method, on all processes but one."""

    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        if rank() == failing:
            raise RuntimeError("this process has had enough")
        return fast_sigcam(iterations=2).explain(model, images, targets)


class Watch(ExplanationMonitor):
    def __init__(self, **settings: Any) -> None:
        super().__init__(Failing(), probe=probe, targets=targets, sinks=[self], **settings)
        self.found: list[Any] = []
        self.shares: list[int] = []

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with self.unchanged(pl_module):
            super().on_validation_epoch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        with self.unchanged(pl_module):
            super().on_train_batch_end(trainer, pl_module, *rest)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with self.unchanged(pl_module):
            super().on_train_start(trainer, pl_module)

    @contextmanager
    def unchanged(self, module: Any) -> Iterator[None]:
        self.state = {k: v.clone() for k, v in module.state_dict().items()}
        yield
        after = module.state_dict()
        assert all(torch.equal(self.state[k], after[k]) for k in self.state)

    def write(self, explanation: Explanation, moment: Moment) -> None:
        self.found.append(
            {
                "maps": explanation.maps,
                "values": {k: v for k, v in explanation.values.items() if k not in TIMES},
                "curves": explanation.curves,
                "controls": explanation.control_aucs,
                "state": self.state,
            }
        )


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(9)
    images = torch.rand(24, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 5, (24,), generator=generator)
    if targets == "confused":
        labels = (Module().eval()(images).argmax(dim=1) + 1) % 5
    data = TensorDataset(images, labels)
    for what in ("validate", "fit"):
        said.clear()
        # After a training step each process has BatchNorm statistics of its own; a validation
        # would have levelled them.
        monitor = Watch(every_n_train_steps=2)
        model = Module()
        logger = CSVLogger(out, name=what, version=0)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=processes,
            strategy="ddp" if processes > 1 else "auto",
            callbacks=[monitor],
            logger=logger,
            max_epochs=2,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            log_every_n_steps=1,
        )
        loaders = DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=4)
        if what == "fit":
            trainer.fit(model, *loaders)
        else:
            trainer.validate(model, loaders[1], verbose=False)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        content = {
            "found": monitor.found,
            "warnings": [text for text in said if "ExplanationMonitor" in text],
            "metrics": metrics,
        }
        content["state"] = model.state_dict()
        torch.save(content, out / f"{what}-{rank()}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()  # or the interpreter may abort at its end
