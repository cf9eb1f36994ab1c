"""Training with and without the monitor, compared bit for bit: the matrix of docs/reliability.md."""

import mmap
import multiprocessing
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import SmallNet, assert_same, finish, snapshot
from pytorch_lightning.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from test_harmless_kinds import ROWS as KINDS
from test_monitor_distributed import ALIKE
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_aop import ExplanationMonitor, GradCAM
from lightning_aop.monitor.explanation import Explanation, Moment

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*has `shuffle=True`|.*sampler has shuffling enabled"),
    pytest.mark.filterwarnings("ignore:.*you requested to overfit|.*Trainer is fitting"),
    pytest.mark.filterwarnings("ignore:.*Attempted to log"),
    pytest.mark.filterwarnings("ignore:.*barebones"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*use_fork|.*multi-threaded"),
    pytest.mark.filterwarnings("ignore:.*The verbose parameter"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:.*precision"),
    pytest.mark.filterwarnings("ignore:.*not been set for this class"),
    pytest.mark.filterwarnings("ignore:.*Your `IterableDataset` has `__len__`"),
]


# --------------------------------------------------------------------------------------------------
# data and models that draw random numbers wherever they can


class Pictures(Dataset[Any]):
    """Augmented from the three random streams, in the process of the loader or of a worker."""

    def __init__(self, count: int = 16) -> None:
        generator = torch.Generator().manual_seed(9)
        self.images = torch.rand(count, 3, 24, 24, generator=generator)
        self.labels = torch.randint(0, 5, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        shift = 0.1 * random.random() + 0.1 * np.random.rand()
        return self.images[index] + (0.1 * torch.rand(3, 24, 24) + shift).float(), self.labels[
            index
        ]


class Shared(Pictures):
    """Counts in memory that a forked process shares; a picture depends on the count."""

    def __init__(self) -> None:
        super().__init__()
        with tempfile.TemporaryFile() as file:
            unlinked = np.memmap(file, np.int64, "w+", shape=16)
        self.counts: list[Any] = [
            unlinked,
            torch.zeros(16, dtype=torch.long).share_memory_(),
            multiprocessing.Array("q", 16),
            np.frombuffer(mmap.mmap(-1, 16 * 8), np.int64),
        ]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        for count in self.counts:
            count[index] += 1
        return image * (1 + 0.1 * sum(int(count[index]) for count in self.counts)), label


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        pictures = Pictures()
        return (pictures[index] for index in range(len(pictures)))


def loader(train: bool, **settings: Any) -> DataLoader[Any]:
    data: Any = settings.pop("data", None) or Pictures()
    settings = {"batch_size": 4} | settings
    if not isinstance(data, IterableDataset):
        settings.setdefault("shuffle", train)
    return DataLoader(data, **settings)


def plain() -> tuple[Any, Any]:
    return loader(True), loader(False)


class Module(pl.LightningModule):
    """Dropout and BatchNorm, and whatever else a cell asks for."""

    def __init__(
        self,
        *,
        frozen_norm: bool = False,
        frozen_backbone: bool = False,
        optimizers: int = 0,
        scheduler: str = "",
        change: Callable[[Any], None] | None = None,
        compiled: str = "",
    ) -> None:
        super().__init__()
        self.net: Any = SmallNet()
        self.frozen_norm, self.scheduler = frozen_norm, scheduler
        self.manual = optimizers
        self.automatic_optimization = not optimizers
        self.losses: list[float] = []
        if frozen_backbone:
            self.net.features.requires_grad_(False)
        if change is not None:
            change(self.net)
        if compiled == "wrapped":
            self.net = torch.compile(self.net, backend="eager")
        elif compiled == "in place":
            self.net.compile(backend="eager")

    def train(self, mode: bool = True) -> "Module":
        super().train(mode)
        if self.frozen_norm:
            self.net.features[1].eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int, *_: Any) -> Tensor:
        if isinstance(batch, dict):
            batch = next(iter(batch.values()))
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        self.losses.append(float(loss.detach()))
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=4)
        if self.manual:
            chosen: Any = self.optimizers()
            chosen = chosen if isinstance(chosen, list) else [chosen]
            for optimizer in chosen:
                optimizer.zero_grad()
            self.manual_backward(loss)
            chosen[index % len(chosen)].step()
        return loss

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx > 0:
            return
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        self.log("val_loss", loss, batch_size=4, add_dataloader_idx=False)

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.parameters() if p.requires_grad]
        if self.manual == 2:
            half = len(weights) // 2
            return [
                torch.optim.Adam(weights[:half], lr=1e-2),
                torch.optim.SGD(weights[half:], lr=1e-2, momentum=0.9),
            ]
        optimizer = torch.optim.Adam(weights, lr=1e-2)
        if self.scheduler == "step":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        if self.scheduler == "plateau":
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"},
            }
        return optimizer


def normed(net: Any) -> None:
    net.features[0] = weight_norm(net.features[0])
    net.features[3] = spectral_norm(net.features[3])


class WithLSTM(nn.Module):
    """Convolutions below, a recurrent layer with dropout above."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.lstm = nn.LSTM(12, 6, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        rows = self.features(images).mean(dim=3).transpose(1, 2)
        return self.head(self.lstm(rows)[0].mean(dim=1))  # type: ignore[no-any-return]


class Recurrent(Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = WithLSTM(self.net.features)


class Recorder(DummyLogger):
    """Keeps what a run logs, but for what the monitor does."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[Any, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:  # type: ignore[override]
        row = {k: float(v) for k, v in metrics.items() if not k.startswith("explain")}
        if row:
            self.rows.append((step, row))


class Watch(ExplanationMonitor):
    """A cheap monitor that counts its explanations."""

    def __init__(self, **settings: Any) -> None:
        method = settings.pop("method", GradCAM())
        super().__init__(method, **({"probe": 2, "metrics": False, "sinks": [self]} | settings))
        self.fired = 0

    def write(self, explanation: Explanation, moment: Moment) -> None:
        self.fired += 1


# --------------------------------------------------------------------------------------------------
# the matrix


@dataclass(frozen=True)
class Cell:
    """One way to train."""

    name: str
    module: Callable[[], pl.LightningModule] = Module
    trainer: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], tuple[Any, Any]] = plain
    callbacks: Callable[[], list[pl.Callback]] = list
    monitor: Callable[[], Watch] = Watch
    fires: int | None = 3  # before training and after two epochs


def several() -> tuple[Any, Any]:
    return loader(True), [loader(False), loader(False, batch_size=8)]


def shared() -> tuple[Any, Any]:
    data = Shared()
    return loader(True, data=data), loader(False, data=data)


class Scaled(DataLoader[Any]):
    """Counts its batches, which depend on the count."""

    given = 0

    def __iter__(self) -> Any:
        for images, labels in super().__iter__():
            self.given += 1
            yield images * (1 + 0.1 * self.given), labels


class Keyed(Pictures):
    """Has text for indices."""

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return super().__getitem__(int(index.removeprefix("picture ")))


class Keys:
    """Draws the keys of a dataset, by a generator of its own."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Any:
        return (f"picture {index}" for index in self.random.sample(range(16), 16))


def keyed() -> tuple[Any, Any]:
    return loader(True, data=Keyed(), sampler=Keys(), shuffle=False), loader(
        False, data=Keyed(), sampler=Keys()
    )


def ema() -> list[pl.Callback]:
    if not hasattr(pl.callbacks, "WeightAveraging"):
        pytest.skip("Lightning has WeightAveraging since 2.6")
    return [pl.callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.9))]


CELLS = [
    Cell("dropout, BatchNorm trained, float32"),
    Cell("the default method and metrics", monitor=lambda: Watch(method=None, metrics=True)),
    Cell("bf16-mixed", trainer={"precision": "bf16-mixed"}),
    Cell("bf16-true", trainer={"precision": "bf16-true"}),
    Cell(
        "bf16-mixed, maps in full precision",
        trainer={"precision": "bf16-mixed"},
        monitor=lambda: Watch(full_precision=True),
    ),
    Cell(
        "bf16-true, maps in full precision",
        trainer={"precision": "bf16-true"},
        monitor=lambda: Watch(full_precision=True),
    ),
    Cell("64-true", trainer={"precision": "64-true"}),
    Cell("BatchNorm frozen", lambda: Module(frozen_norm=True)),
    Cell("backbone frozen", lambda: Module(frozen_backbone=True)),
    Cell("backbone and BatchNorm frozen", lambda: Module(frozen_backbone=True, frozen_norm=True)),
    Cell("gradient accumulation", trainer={"accumulate_grad_batches": 3}),
    Cell(
        "gradient accumulation, explained after steps",
        trainer={"accumulate_grad_batches": 2},
        monitor=lambda: Watch(every_n_train_steps=1),
        fires=1 + 4,
    ),
    Cell("gradient clipping", trainer={"gradient_clip_val": 0.1}),
    Cell("manual optimization", lambda: Module(optimizers=1)),
    Cell("two optimizers", lambda: Module(optimizers=2)),
    Cell("StepLR", lambda: Module(scheduler="step")),
    Cell("ReduceLROnPlateau", lambda: Module(scheduler="plateau")),
    Cell("torch.compile, wrapped", lambda: Module(compiled="wrapped")),
    Cell("torch.compile, in place", lambda: Module(compiled="in place")),
    Cell(
        "torch.compile, bf16-mixed, explained after steps",
        lambda: Module(compiled="in place"),
        {"precision": "bf16-mixed"},
        monitor=lambda: Watch(every_n_train_steps=3),
        fires=1 + 2,
    ),
    Cell("weight_norm and spectral_norm", lambda: Module(change=normed)),
    Cell("LSTM above the convolutions", Recurrent),
    Cell("exponential moving average (WeightAveraging)", callbacks=ema),
    Cell(
        "exponential moving average, explained after steps",
        callbacks=ema,
        monitor=lambda: Watch(every_n_train_steps=2),
        fires=1 + 4,
    ),
    Cell(
        "stochastic weight averaging",
        trainer={"max_epochs": 3},
        callbacks=lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
        fires=None,
    ),
    Cell("ModelCheckpoint and EarlyStopping", callbacks=lambda: [EarlyStopping("val_loss")]),
    Cell("val_check_interval=0.5", trainer={"val_check_interval": 0.5}, fires=1 + 4),
    Cell("val_check_interval=3", trainer={"val_check_interval": 3}, fires=1 + 2),
    Cell("check_val_every_n_epoch=2", trainer={"check_val_every_n_epoch": 2}, fires=1 + 1),
    Cell("several validation loaders", data=several),
    Cell(
        "several training loaders (CombinedLoader)",
        data=lambda: (
            CombinedLoader({"a": loader(True), "b": loader(True)}, "min_size"),
            loader(False),
        ),
    ),
    Cell(
        "iterable datasets",
        data=lambda: (loader(True, data=Stream()), loader(False, data=Stream())),
    ),
    Cell("no validation loader", data=lambda: (loader(True), None)),
    Cell("overfit_batches=2", trainer={"overfit_batches": 2}),
    Cell("fast_dev_run", trainer={"fast_dev_run": True}, fires=None),
    Cell("limit_val_batches=0", trainer={"limit_val_batches": 0}),
    Cell("limit_train_batches=0.5", trainer={"limit_train_batches": 0.5}),
    Cell("barebones", trainer={"barebones": True}, fires=None),
    Cell("no logger", trainer={"logger": False}),
    Cell("no sanity check", trainer={"num_sanity_val_steps": 0}),
    Cell(
        "loader workers that draw random numbers",
        data=lambda: (loader(True, num_workers=2), loader(False, num_workers=1)),
    ),
    Cell(
        "persistent loader workers",
        data=lambda: (
            loader(True, num_workers=2, persistent_workers=True),
            loader(False, num_workers=1, persistent_workers=True),
        ),
    ),
    Cell("data sets in shared memory", data=shared),
    Cell(
        "loaders that change their batches",
        data=lambda: (Scaled(Pictures(), 4, shuffle=True), Scaled(Pictures(), 4)),
    ),
    Cell("samplers of keys", data=keyed),
    Cell("explained after every step", monitor=lambda: Watch(every_n_train_steps=1), fires=1 + 8),
    Cell(
        "explanations left out for max_overhead",
        monitor=lambda: Watch(every_n_train_steps=1, max_overhead=0.01),
        fires=None,
    ),
    Cell("explained never", monitor=lambda: Watch(every_n_epochs=0), fires=0),
]


def everything(trainer: pl.Trainer, module: Any) -> dict[str, Any]:
    """Return all that a monitor could have changed."""
    state = snapshot(module)
    del state["buffers"]  # the identity of this run's own objects
    return {
        **state,
        "losses": module.losses,
        "logged": [logger.rows for logger in trainer.loggers if isinstance(logger, Recorder)],
        "metrics": [
            {k: v for k, v in metrics.items() if not k.startswith("explain")}
            for metrics in (trainer.callback_metrics, trainer.logged_metrics)
        ],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [
            {k: v for k, v in c.scheduler.state_dict().items() if not callable(v)}
            for c in trainer.lr_scheduler_configs
        ],
        "progress": (trainer.global_step, trainer.current_epoch, trainer.fit_loop.state_dict()),
    }


def train(cell: Cell, folder: Path, monitor: Watch | None) -> dict[str, Any]:
    torch.compiler.reset()
    pl.seed_everything(3, verbose=False)
    module, settings = cell.module(), dict(cell.trainer)
    bare = settings.get("barebones", False)
    defaults: dict[str, Any] = {"max_epochs": 2, "accelerator": "cpu", "default_root_dir": folder}
    if not bare:
        defaults |= {
            "logger": Recorder(),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        }
    callbacks = cell.callbacks()
    if "EarlyStopping" in cell.name:
        callbacks.append(ModelCheckpoint(folder, save_last=True, monitor="val_loss"))
    elif not bare:
        defaults["enable_checkpointing"] = False
    if monitor is not None:
        callbacks.append(monitor)
    trainer = pl.Trainer(callbacks=callbacks, **(defaults | settings))
    trainer.fit(module, *cell.data())
    return everything(trainer, module)


@pytest.mark.sample(10)
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_training_is_what_it_was(cell: Cell, tmp_path: Path, record_property: Any) -> None:
    record_property("cell", cell.name)
    monitor = cell.monitor()
    without = train(cell, tmp_path / "without", None)
    with_monitor = train(cell, tmp_path / "with", monitor)
    assert_same(without, with_monitor)
    assert monitor.fired == cell.fires if cell.fires is not None else monitor.fired >= 1


def test_the_comparison_sees_a_difference(tmp_path: Path) -> None:
    class Meddling(Watch):
        def on_train_batch_end(self, *arguments: Any) -> None:
            torch.rand(1)

    cell = CELLS[0]
    without = train(cell, tmp_path, None)
    with pytest.raises(AssertionError):
        assert_same(without, train(cell, tmp_path, Meddling()))


RESUMED = "resumed from a checkpoint"


def test_a_resumed_training_is_what_it_was(tmp_path: Path, record_property: Any) -> None:
    record_property("cell", RESUMED)

    def run(folder: Path, *monitors: Watch) -> dict[str, Any]:
        module: Any = None
        for epochs, monitor in zip((1, 3), monitors or (None, None), strict=True):
            pl.seed_everything(epochs, verbose=False)
            module = Module(scheduler="step")
            callbacks: list[pl.Callback] = [ModelCheckpoint(folder, save_last=True)]
            trainer = pl.Trainer(
                max_epochs=epochs,
                accelerator="cpu",
                logger=Recorder(),
                callbacks=callbacks + ([] if monitor is None else [monitor]),
                enable_progress_bar=False,
                enable_model_summary=False,
                log_every_n_steps=1,
                default_root_dir=folder,
            )
            trainer.fit(module, *plain(), ckpt_path=folder / "last.ckpt" if epochs > 1 else None)
        return everything(trainer, module)

    first, second = Watch(), Watch()
    assert_same(run(tmp_path / "without"), run(tmp_path / "with", first, second))
    assert (first.fired, second.fired) == (2, 2)


STANDING_ALONE = "trainer.validate and trainer.test"


def test_validating_changes_nothing(tmp_path: Path, record_property: Any) -> None:
    record_property("cell", STANDING_ALONE)
    results = []
    for monitor in (None, Watch(method=None, metrics=True)):
        pl.seed_everything(3, verbose=False)
        module = Module()
        module.test_step = module.validation_step  # type: ignore[method-assign]
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=Recorder(),
            callbacks=[] if monitor is None else [monitor],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        first = trainer.validate(module, loader(False), verbose=False)
        second = trainer.test(module, loader(False), verbose=False)
        values = [
            {k: v for k, v in row.items() if not k.startswith("explain")} for row in first + second
        ]
        state = snapshot(module)
        del state["buffers"]
        results.append([values, state])
    assert_same(*results)


DISTRIBUTED = "DDP, two processes (gloo)"
SHARDED = "FSDP1, DeepSpeed"


@pytest.mark.wide
def test_two_processes_train_as_they_did(tmp_path: Path, record_property: Any) -> None:
    record_property("cell", DISTRIBUTED)
    states = {}
    for how in ("without", "with"):
        out = tmp_path / how
        out.mkdir()
        finish(
            [sys.executable, Path(__file__).parents[1] / "scripts" / "harmless.py", out, how],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            timeout=150,
            cwd=out,
        )
        states[how] = [torch.load(out / f"{r}.pt", weights_only=False) for r in range(2)]
    fired = [state.pop("fired") for state in states["with"]]
    assert [state.pop("fired") for state in states["without"]] == [0, 0]
    assert fired == [1 + 4, 1 + 4]
    assert_same(states["without"], states["with"])


# --------------------------------------------------------------------------------------------------
# the page


def test_the_page_lists_these_cells() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    table = page.split("<!-- matrix -->")[1].split("<!-- end of matrix -->")[0]
    listed = set(re.findall(r"^\| (.+?) \| (?:equal|refused)", table, flags=re.MULTILINE))
    own = (
        {cell.name for cell in CELLS}
        | {RESUMED, STANDING_ALONE, DISTRIBUTED, SHARDED, *KINDS}
        | {*ALIKE.values()}
    )
    assert listed == own, "write the page anew: make reliability"
