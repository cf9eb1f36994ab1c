"""Kill a run with the monitor at one moment after another, resume it, and write down what is seen.

    python killed.py OUT MOMENTS

OUT/seen.json has, for the run that was let be ("whole") and for each that was killed and resumed, the
figures after each epoch, the fingerprint of the probe, and a digest of each picture; and what the
monitor keeps in a checkpoint. Each run is a process of its own, forked before torch has worked.
"""

import hashlib
import json
import os
import signal
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "monitor"))

import pytorch_lightning as pl
import torch
from conftest import SmallNet
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_aop import ExplanationMonitor, fast_sigcam
from lightning_aop.history.store import History

EPOCHS = 3


class Moments:
    """Counts what happens, and ends the process at the chosen moment."""

    def __init__(self, fatal: int) -> None:
        self.fatal = fatal
        self.count = 0

    def another(self) -> None:
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


class Module(pl.LightningModule):
    def __init__(self, moments: Moments) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet()
        self.moments = moments

    def forward(self, images: Tensor) -> Tensor:
        self.moments.another()  # in training, in validation, and anywhere in an explanation
        return self.net(images)  # type: ignore[no-any-return]

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        torch.manual_seed(self.global_step)  # a checkpoint of Lightning has no random state

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Record(pl.Callback):
    """Writes down the figures of each epoch."""

    def __init__(self, out: Path, monitor: ExplanationMonitor) -> None:
        self.out, self.monitor = out, monitor

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("explain/") and name not in ("explain/seconds", "explain/overhead")
        }
        found["probe"] = self.monitor.state_dict()["fingerprint"]
        (self.out / f"epoch{trainer.current_epoch}.json").write_text(json.dumps(found))


def run(out: Path, fatal: int) -> None:
    """Train, from the last checkpoint if there is one; write how many moments there were."""
    out.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(6, 3, 24, 24, generator=generator), torch.arange(6) % 5)
    moments = Moments(fatal)
    # Stretched, for the maps of a network that knows next to nothing would be too faint to have a drift.
    method = replace(fast_sigcam(iterations=2), stretch=True)
    monitor = ExplanationMonitor(method, probe=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=[monitor, Record(out, monitor), ModelCheckpoint(out, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    last = out / "last.ckpt"
    loaders = [DataLoader(data, batch_size=3) for _ in range(2)]
    trainer.fit(Module(moments), *loaders, ckpt_path=str(last) if last.exists() else None)
    (out / "moments.json").write_text(json.dumps(moments.count))


def forked(out: Path, fatal: int = -1) -> int:
    """Run in a process of its own; return the signal that ended it, 0 if none."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(out, fatal)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, out
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def seen(out: Path) -> dict[str, Any]:
    found = {path.name: json.loads(path.read_text()) for path in sorted(out.glob("epoch*.json"))}
    for path in sorted(out.rglob("*.png")):
        found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    (state,) = (
        state
        for name, state in torch.load(out / "last.ckpt", weights_only=True)["callbacks"].items()
        if "ExplanationMonitor" in name
    )
    history = History.load(state["folder"])
    for record in history.records:
        for name in ("seconds", "overhead"):  # of the clock; before training there is no overhead
            record.values.pop(name, None)
    found["records"] = [asdict(record) | {"time": None} for record in history.records]
    found["maps"] = hashlib.sha256(history.maps.tobytes()).hexdigest()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    root, wanted = Path(sys.argv[1]), int(sys.argv[2])
    forked(root / "whole")
    moments = json.loads((root / "whole" / "moments.json").read_text())
    result: dict[str, Any] = {"moments": moments, "whole": seen(root / "whole"), "killed": {}}
    # Every one of the first epoch and the explanation before it would say the same many times.
    for fatal in sorted({*range(0, moments, max(moments // wanted, 1)), moments - 1}):
        folder = root / f"killed{fatal}"
        signals = [forked(folder, fatal), forked(folder)]
        assert signals == [signal.SIGKILL, 0], (fatal, signals)
        result["killed"][fatal] = seen(folder)
    (root / "seen.json").write_text(json.dumps(result, indent=1))
