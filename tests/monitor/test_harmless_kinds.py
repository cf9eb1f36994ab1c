"""Training with and without the monitor, bit for bit: data and models that a look at them changes.

Each kind runs with `pytorch_lightning` and with `lightning.pytorch`, and is a row of the matrix of
docs/reliability.md. That it is a kind which can be disturbed is tested, too.
"""

import functools
import importlib
import io
import os
import random
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import SmallNet, assert_same, snapshot
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, Metric

from lightning_aop import ExplanationMonitor, GradCAM
from lightning_aop.metrics import OverallAUC
from lightning_aop.monitor.explanation import Explanation, Moment

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*use_fork|.*multi-threaded"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated"),
    pytest.mark.filterwarnings("ignore:.*lazy modules are a new feature|.*Lazy modules are"),
    pytest.mark.filterwarnings("ignore:.*nn.utils.spectral_norm.*deprecated"),
    pytest.mark.filterwarnings("ignore:.*UninitializedParameter"),
    pytest.mark.filterwarnings("ignore:.*Attempted to log"),
]
LIGHTNINGS = ["pytorch_lightning", "lightning.pytorch"]
COUNT, SIDE = 12, 24


def pixels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    images = torch.randint(0, 256, (COUNT, 3, SIDE, SIDE), generator=generator).byte()
    return images, torch.arange(COUNT) % 5


# --------------------------------------------------------------------------------------------------
# data


class Data(Dataset[Any]):
    """Reads an image from somewhere, and adds noise from the global stream."""

    def __init__(self, folder: Path) -> None:
        images, self.labels = pixels()
        self.write(folder, images)

    def write(self, folder: Path, images: Tensor) -> None:
        self.images = images

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.read(index).float() / 255
        return image + 0.1 * torch.rand(1), self.labels[index]

    def state(self) -> Any:
        """What a look at the data could change, beside the training."""
        return None

    def close(self) -> None:
        for name in ("file", "env", "archive"):
            if (opened := getattr(self, name, None)) is not None:
                opened.close()


class HDF5(Data):
    """Opened when it is read for the first time."""

    def write(self, folder: Path, images: Tensor) -> None:
        self.path, self.file = folder / "images.h5", None
        with pytest.importorskip("h5py").File(self.path, "w") as file:
            file["images"] = images.numpy()

    def read(self, index: int) -> Tensor:
        if self.file is None:
            self.file = importlib.import_module("h5py").File(self.path, "r")
        return torch.from_numpy(self.file["images"][index])

    def state(self) -> Any:
        return self.file is None


class LMDB(Data):
    """Opened when it is read for the first time; no process may open it twice."""

    def write(self, folder: Path, images: Tensor) -> None:
        self.path, self.env = str(folder / "images.lmdb"), None
        lmdb = pytest.importorskip("lmdb")
        with lmdb.open(self.path, map_size=2**24) as env, env.begin(write=True) as transaction:
            for index, image in enumerate(images):
                transaction.put(str(index).encode(), image.numpy().tobytes())

    def read(self, index: int) -> Tensor:
        if self.env is None:
            self.env = importlib.import_module("lmdb").open(self.path, readonly=True, lock=False)
        with self.env.begin() as transaction:
            found = np.frombuffer(transaction.get(str(index).encode()), np.uint8)
        return torch.from_numpy(found.copy()).view(3, SIDE, SIDE)

    def state(self) -> Any:
        return self.env is None


class Albumentations(Data):
    """Transforms with a seed have a generator of their own, which each use moves on."""

    def write(self, folder: Path, images: Tensor) -> None:
        self.images = images
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask a server for its last version
        A: Any = pytest.importorskip("albumentations")  # noqa: N806
        transforms = [A.HorizontalFlip(p=0.5), A.RandomBrightnessContrast(p=1.0)]
        self.transform = A.Compose(transforms, seed=7)

    def read(self, index: int) -> Tensor:
        array = self.images[index].permute(1, 2, 0).numpy()
        return torch.from_numpy(self.transform(image=array)["image"]).permute(2, 0, 1)

    def state(self) -> Any:
        return str(self.transform.random_generator.bit_generator.state)


class OpenFile(Data):
    """Goes on from where it is in an open file, whatever the index."""

    def write(self, folder: Path, images: Tensor) -> None:
        (folder / "images.bin").write_bytes(images.numpy().tobytes())
        self.file = (folder / "images.bin").open("rb")

    def read(self, index: int) -> Tensor:
        size = 3 * SIDE * SIDE
        part = self.file.read(size)
        if len(part) < size:
            self.file.seek(0)
            part = self.file.read(size)
        return torch.from_numpy(np.frombuffer(part, np.uint8).copy()).view(3, SIDE, SIDE)

    def state(self) -> Any:
        return self.file.tell()


class Zip(Data):
    """All images in an archive that stays open."""

    def write(self, folder: Path, images: Tensor) -> None:
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for index, image in enumerate(images):
                content = io.BytesIO()
                np.save(content, image.numpy())
                archive.writestr(f"{index}.npy", content.getvalue())
        self.archive = zipfile.ZipFile(folder / "images.zip")

    def read(self, index: int) -> Tensor:
        return torch.from_numpy(np.load(io.BytesIO(self.archive.read(f"{index}.npy"))))


class OwnGenerator(Data):
    def write(self, folder: Path, images: Tensor) -> None:
        self.images = images
        self.generators = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.random = random.Random(1)

    def read(self, index: int) -> Tensor:
        shift = 20 * torch.rand(1, generator=self.generators[0]) + 20 * self.random.random()
        return self.images[index] * 0.5 + shift + 20 * float(self.generators[1].random())

    def state(self) -> Any:
        torch_one, numpy_one = self.generators
        return torch_one.get_state(), str(numpy_one.bit_generator.state), self.random.getstate()


class Counter(Data):
    """Gets noisier with each image that was read."""

    def write(self, folder: Path, images: Tensor) -> None:
        self.images, self.seen = images, 0

    def read(self, index: int) -> Tensor:
        self.seen += 1
        return self.images[index] * (1 - 0.01 * self.seen)

    def state(self) -> Any:
        return self.seen


# --------------------------------------------------------------------------------------------------
# models


class Centred(nn.Module):
    """A net whose forward subtracts a centre, which depends on what was seen before."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SmallNet()
        self.make()

    def make(self) -> None: ...

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits - self.centre(logits.detach().mean(0))

    def centre(self, mean: Tensor) -> Tensor:
        return torch.zeros(5)


class ThroughData(Centred):
    def make(self) -> None:
        self.register_buffer("c", torch.zeros(5))
        self.register_buffer("d", torch.zeros(5))

    def centre(self, mean: Tensor) -> Tensor:
        self.c.data.mul_(0.9).add_(0.1 * mean)
        self.d.numpy()[:] = 0.5 * self.d.numpy() + self.c.numpy()
        return self.c + self.d


class Collecting(Centred):
    """A list, a deque and a metric."""

    def make(self) -> None:
        self.all: list[float] = []
        self.last: deque[Tensor] = deque(maxlen=4)
        self.mean = MeanMetric()

    def centre(self, mean: Tensor) -> Tensor:
        self.all.append(float(mean.mean()))
        self.last.append(mean)
        self.mean.update(mean)
        return 0.01 * len(self.all) + torch.stack(list(self.last)).mean(0) + self.mean.compute()


class MomentumEncoder(nn.Module):
    """A slow copy of the network, whose parameters follow at each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.slow = SmallNet(), SmallNet().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
            slow.data = 0.9 * slow.data + 0.1 * fast.data
        logits: Tensor = self.net(images) + 0.5 * self.slow(images)
        return logits


def spectral() -> nn.Module:
    """The older spectral norm, which replaces its vectors in each forward in training."""
    net = SmallNet()
    net.features[0] = nn.utils.spectral_norm(net.features[0])
    net.features[3] = nn.utils.parametrizations.spectral_norm(net.features[3])
    return net


def quantised() -> nn.Module:
    """Fake quantisation, whose observers watch each forward."""
    from torch.ao import quantization

    net: nn.Module = SmallNet().train()
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    prepared: nn.Module = quantization.prepare_qat(net)
    return prepared


def hooked() -> nn.Module:
    """Hooks that count, draw and change what goes forward and backward."""
    net, seen = SmallNet(), [0]

    def forward(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen[0] += 1
        return output + 0.01 * seen[0] * torch.rand(1)

    def backward(layer: nn.Module, inputs: Any, outputs: Any) -> Any:
        seen[0] += 1
        return tuple(None if g is None else 0.9 * g for g in inputs)

    net.features[3].register_forward_hook(forward)
    net.head.register_full_backward_hook(backward)
    next(net.parameters()).register_hook(lambda grad: grad * (1 + 0.001 * seen[0]))
    return net


def lazy() -> nn.Module:
    net = SmallNet()
    net.head = nn.LazyLinear(5)
    return net


# --------------------------------------------------------------------------------------------------
# LightningModules and monitors


class Steps:
    """What a LightningModule of either Lightning does."""

    def __init__(self, net: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        self.net, self.settings = net, settings
        self.losses: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        if self.settings.get("logs in forward"):
            self.log("mean_logit", logits.mean(), on_step=False, on_epoch=True, batch_size=1)
        return logits

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=4)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss, batch_size=4)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        if not (key := self.settings.get("plateau")):
            return optimizer
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=99, mode="max")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": key}}


class Careless:
    """A method that leaves behind whatever it can."""

    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        model.eval()
        x = images.clone().requires_grad_()
        model.requires_grad_(True)
        model(x).gather(1, targets[:, None]).sum().backward()
        torch.manual_seed(0)
        np.random.seed(0)
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        model.register_forward_hook(lambda *_: None)
        assert x.grad is not None
        maps = x.grad.abs().sum(1)
        return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-9)


class CarelessMetric(Metric):
    """A metric likewise."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, model: nn.Module, images: Tensor, maps: Tensor, targets: Tensor) -> None:
        model.train()
        with torch.enable_grad():
            model.requires_grad_(True)
            model(images).sum().backward()
        model.zero_grad()
        random.seed(0)
        self.total += maps.sum()

    def compute(self) -> Tensor:
        return self.total


class Failing:
    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("no map today")


class Watch(ExplanationMonitor):
    """A cheap monitor that counts its explanations."""

    def __init__(self, method: Any = None, **settings: Any) -> None:
        settings = {"probe": 2, "metrics": False, "sinks": [self]} | settings
        super().__init__(method or GradCAM(), **settings)
        self.fired = 0

    def write(self, explanation: Explanation, moment: Moment) -> None:
        self.fired += 1


@dataclass(frozen=True)
class Kind:
    """Something that a look at it changes."""

    name: str
    data: Callable[[Path], Data] = Data
    net: Callable[[], nn.Module] = SmallNet
    settings: dict[str, Any] = field(default_factory=dict)
    monitor: Callable[[], Watch] = Watch
    trainer: dict[str, Any] = field(default_factory=dict)
    fires: int = 3  # before training and after two epochs
    remembers: bool = True  # what was seen, so that one look too many changes the training


KINDS = [
    Kind("HDF5 that is opened when it is read (h5py)", HDF5, remembers=False),
    Kind("LMDB that is opened when it is read", LMDB, remembers=False),
    Kind("albumentations with a seed", Albumentations),
    Kind("an open file that is read on", OpenFile),
    Kind("an open ZipFile", Zip, remembers=False),
    Kind("data with generators of its own", OwnGenerator),
    Kind("data that counts what was read", Counter),
    Kind("quantization-aware training (torch.ao observers)", net=quantised),
    Kind("buffers written through .data and NumPy", net=ThroughData),
    Kind("lists, deques and metrics on modules", net=Collecting),
    Kind(
        "a momentum encoder",
        net=MomentumEncoder,
        monitor=lambda: Watch(GradCAM("net.net.features")),
    ),
    Kind("spectral norms, old and new", net=spectral),
    Kind("hooks of the user's own", net=hooked),
    Kind(
        "a lazy layer, no sanity check",
        net=lazy,
        trainer={"num_sanity_val_steps": 0},
        fires=2,
        remembers=False,
    ),
    Kind("self.log in forward", settings={"logs in forward": True}),
    Kind(
        "a method that calls eval() and backward(), and writes weights",
        monitor=lambda: Watch(Careless()),
        remembers=False,
    ),
    Kind(
        "a metric that calls train(), backward() and zero_grad()",
        monitor=lambda: Watch(metrics=CarelessMetric()),
        remembers=False,
    ),
]


def module_of(lightning: Any, net: nn.Module, settings: dict[str, Any]) -> Any:
    return type("Module", (Steps, lightning.LightningModule), {})(net, settings)


def train(
    used: str, kind: Kind, folder: Path, callbacks: list[Any], **options: Any
) -> SimpleNamespace:
    """Train, and return all that could have been changed."""
    lightning = importlib.import_module(used)
    folder.mkdir(parents=True, exist_ok=True)
    lightning.seed_everything(3, verbose=False)
    data, module = kind.data(folder), module_of(lightning, kind.net(), kind.settings)
    fitted = options.pop("fitted", {})
    trainer = lightning.Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "callbacks": callbacks,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": folder,
            **kind.trainer,
            **options,
        }
    )
    loaders = [DataLoader(data, 4, shuffle=shuffle) for shuffle in (True, False)]
    trainer.fit(module, *loaders, **fitted)
    state = snapshot(module)
    del state["buffers"]  # the identity of this run's own objects
    values = {
        name: value
        for name, value in trainer.callback_metrics.items()
        if not name.startswith("explain")
    }
    found = {
        **state,
        "losses": module.losses,
        "logged": values,
        "data": data.state(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "hooks of tensors": [
            len(p._backward_hooks or ()) for p in module.parameters() if p.is_leaf
        ],
    }
    data.close()
    return SimpleNamespace(found=found, trainer=trainer)


@pytest.mark.sample(8)
@pytest.mark.parametrize("used", LIGHTNINGS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_training_is_what_it_was(
    kind: Kind, used: str, tmp_path: Path, record_property: Any
) -> None:
    record_property("cell", kind.name)
    monitor = kind.monitor()
    without = train(used, kind, tmp_path / "without", [])
    with_it = train(used, kind, tmp_path / "with", [monitor])
    assert_same(without.found, with_it.found)
    assert monitor.fired == kind.fires


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.remembers], ids=lambda kind: kind.name
)
def test_a_careless_look_would_disturb_it(kind: Kind, tmp_path: Path) -> None:
    """Which the comparison sees, also where the global random streams are left alone."""

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            data = trainer.train_dataloader.dataset
            with torch.random.fork_rng(), torch.no_grad():
                module(torch.stack([data[index][0] for index in range(2)]))

    without = train("pytorch_lightning", kind, tmp_path / "without", [])
    looked = train("pytorch_lightning", kind, tmp_path / "with", [Look()])
    with pytest.raises(AssertionError):
        assert_same(without.found, looked.found)


# --------------------------------------------------------------------------------------------------
# what stands beside the monitor


WATCHED = "ModelCheckpoint, EarlyStopping and ReduceLROnPlateau on explain/overall_auc"


@pytest.mark.parametrize("used", LIGHTNINGS)
@pytest.mark.parametrize("method", [GradCAM(), Failing()], ids=["explained", "failing"])
@pytest.mark.filterwarnings("ignore:ExplanationMonitor. no explanation")
def test_others_may_watch_the_monitor(
    method: Any, used: str, tmp_path: Path, record_property: Any
) -> None:
    """Also from before the first value, and where there is none at all."""
    record_property("cell", WATCHED)
    key = "explain/overall_auc"
    callbacks: Any = importlib.import_module(f"{used}.callbacks")
    monitor = Watch(method, metrics=OverallAUC(steps=4), controls=False, every_n_epochs=2)
    watching = [
        callbacks.EarlyStopping(key, mode="max", patience=99, check_finite=True),
        callbacks.ModelCheckpoint(tmp_path / "best", monitor=key, mode="max"),
    ]
    plain = Kind("", settings={"plateau": "val_loss"})
    watched = Kind("", settings={"plateau": key})
    options: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True}
    last = callbacks.ModelCheckpoint(tmp_path / "last")
    without = train(used, plain, tmp_path / "without", [last], **options)
    with_it = train(used, watched, tmp_path / "with", [*watching, monitor], **options)
    assert with_it.trainer.current_epoch == 3
    assert_same(without.found, with_it.found)
    assert list((tmp_path / "best").glob("*.ckpt"))
    assert monitor.fired == (0 if isinstance(method, Failing) else 2)


@pytest.mark.parametrize("used", LIGHTNINGS)
@pytest.mark.parametrize(
    "options",
    [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}],
    ids=["no validation", "every second epoch"],
)
def test_others_may_watch_the_monitor_at_the_end_of_an_epoch(
    options: dict[str, Any], used: str, tmp_path: Path
) -> None:
    """Where nothing was explained in the first epoch; the stop comes before the monitor in the list."""
    key = "explain/overall_auc"
    callbacks: Any = importlib.import_module(f"{used}.callbacks")
    stop = callbacks.EarlyStopping(key, mode="max", patience=99, check_on_train_epoch_end=True)
    monitor = Watch(metrics=OverallAUC(steps=4), controls=False, every_n_epochs=2)
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, **options}
    plateau = {"plateau": key} if options.get("limit_val_batches") == 0 else {}
    ran = train(used, Kind("", settings=plateau), tmp_path, [stop, monitor], **options)
    assert ran.trainer.current_epoch == 3
    assert stop.best_score > -1.0


HOOKED = "a callback whose method is a forward hook"


@pytest.mark.parametrize("used", LIGHTNINGS)
def test_what_a_callback_collects_is_its_own(
    used: str, tmp_path: Path, record_property: Any
) -> None:
    record_property("cell", HOOKED)
    callbacks: Any = importlib.import_module(f"{used}.callbacks")

    class Collect(callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.means: list[float] = []

        def collect(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.means.append(float(output.detach().mean()))

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net.features.register_forward_hook(self.collect)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log("mean activation", sum(self.means) / len(self.means))
            pl_module.log("activations", float(len(self.means)))
            self.means.clear()

    monitor = Watch()
    without = train(used, Kind(""), tmp_path / "without", [Collect()])
    with_it = train(used, Kind(""), tmp_path / "with", [Collect(), monitor])
    assert without.found["logged"]["activations"] > 0
    assert_same(without.found, with_it.found)
    assert monitor.fired == 3


TRANSFERS = "a DataModule whose batch hooks draw and count"


@pytest.mark.parametrize("used", LIGHTNINGS)
def test_the_batch_hooks_of_a_data_module_go_on_as_they_were(
    used: str, tmp_path: Path, record_property: Any
) -> None:
    record_property("cell", TRANSFERS)
    lightning: Any = importlib.import_module(used)

    class Module(lightning.LightningDataModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(1)
            self.moved = 0
            self.data = Data(tmp_path)

        def train_dataloader(self) -> Any:
            return DataLoader(self.data, 4, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(self.data, 4)

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            self.moved += 1
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            images, *rest = batch
            return [images + torch.randn(images.shape, generator=self.generator), *rest]

    found = []
    for callbacks in ([], [monitor := Watch()]):
        lightning.seed_everything(3, verbose=False)
        module = module_of(lightning, SmallNet(), {})
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, datamodule=(data := Module()))
        found.append([module.state_dict(), data.moved, data.generator.get_state()])
    assert_same(*found)
    assert monitor.fired == 3


AVERAGED = "exponential moving average, before or after the monitor"


def lightnings_average(callbacks: Any) -> Any:
    if not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("Lightning has WeightAveraging since 2.6")
    return callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.9))


def own_average(callbacks: Any) -> Any:
    """As many projects have written it."""

    class Average(callbacks.Callback):  # type: ignore[misc]
        def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
            self.other = [p.detach().clone() for p in pl_module.parameters()]

        def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *rest: Any) -> None:
            for mean, p in zip(self.other, pl_module.parameters(), strict=True):
                mean.lerp_(p.detach(), 0.1)

        def swap(self, trainer: Any, pl_module: nn.Module) -> None:
            for place, p in enumerate(pl_module.parameters()):
                now = p.detach().clone()
                p.data.copy_(self.other[place])
                self.other[place] = now

        on_validation_epoch_start = on_validation_epoch_end = swap

    return Average()


@pytest.mark.sample(1)
@pytest.mark.parametrize("used", LIGHTNINGS)
@pytest.mark.parametrize("average_of", [lightnings_average, own_average])
def test_an_average_may_stand_on_either_side(
    average_of: Callable[[Any], Any], used: str, tmp_path: Path, record_property: Any
) -> None:
    record_property("cell", AVERAGED)
    average = functools.partial(average_of, importlib.import_module(f"{used}.callbacks"))
    kind = Kind("")
    without = train(used, kind, tmp_path / "without", [average()])
    found = []
    for place in (0, 1):
        monitor = Watch(metrics=OverallAUC(steps=4), controls=False)
        beside = [average()]
        beside.insert(place, monitor)
        with_it = train(used, kind, tmp_path / f"with {place}", beside)
        assert_same(without.found, with_it.found)
        assert monitor.fired == 3
        found.append(float(with_it.trainer.callback_metrics["explain/overall_auc"]))
    assert found[0] == found[1]  # of the weights that validation saw


DAMAGED = "resumed with a damaged history"


@pytest.mark.parametrize("used", LIGHTNINGS)
@pytest.mark.filterwarnings("ignore:ExplanationMonitor. the history in")
def test_a_damaged_history_changes_nothing(used: str, tmp_path: Path, record_property: Any) -> None:
    record_property("cell", DAMAGED)
    callbacks: Any = importlib.import_module(f"{used}.callbacks")
    kind, results = Kind(""), []
    for how in ("without", "with"):
        folder = tmp_path / how
        monitors: list[Watch] = []
        for epochs in (1, 3):
            monitors.append(Watch())
            own = [callbacks.ModelCheckpoint(folder, save_last=True)]
            own += [] if how == "without" else monitors[-1:]
            fitted = {"ckpt_path": folder / "last.ckpt"} if epochs > 1 else {}
            result = train(
                used,
                kind,
                folder,
                own,
                max_epochs=epochs,
                enable_checkpointing=True,
                fitted=fitted,
            )
            for path in folder.glob("explanations/history.jsonl"):
                path.write_bytes(path.read_bytes()[:-50])
        results.append(result.found)
    assert_same(*results)
    assert [monitor.fired for monitor in monitors] == [2, 2]
    assert len(list(tmp_path.glob("with/explanations*/history.jsonl"))) == 2


ROWS = [*(kind.name for kind in KINDS), WATCHED, HOOKED, TRANSFERS, AVERAGED, DAMAGED]
