"""Use the monitor with the Lightning that is named, and tell what came of it.

    python lightnings.py OUT USED ORDER [CHECKPOINT]

USED is pytorch_lightning or lightning.pytorch. ORDER says what is imported first: "package", "used" or
"other"; or "alone", where the other Lightning can't be imported at all. Weights go to OUT/weights.pt,
the rest to OUT/found.json. CHECKPOINT is resumed; by default the run's own.
"""

import importlib
import json
import math
import sys
import warnings
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "monitor"))

import torch
from conftest import SmallNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

out, used, order, *checkpoint = Path(sys.argv[1]), *sys.argv[2:]
# What is installed with each.
installed = {
    "pytorch_lightning": ("pytorch_lightning", "lightning_fabric"),
    "lightning.pytorch": ("lightning",),
}
(other,) = installed.keys() - {used}


class Missing(MetaPathFinder):
    """Let the other Lightning be as if it were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in installed[other]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if order == "alone":
    sys.meta_path.insert(0, Missing())
elif order != "package":
    importlib.import_module({"used": used, "other": other}[order])

from lightning_utilities.core import rank_zero  # noqa: E402

from lightning_aop import ExplanationMonitor, WGradCAM  # noqa: E402
from lightning_aop.monitor.explanation import Explanation, Moment  # noqa: E402

L: Any = importlib.import_module(used)
callbacks: Any = importlib.import_module(f"{used}.callbacks")
loggers: Any = importlib.import_module(f"{used}.loggers")
exceptions: Any = importlib.import_module(f"{used}.utilities.exceptions")


class Module(L.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet()
        with torch.no_grad():
            self.net.head.weight.mul_(30)  # so that it is sure of something

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Watch(ExplanationMonitor):
    """The monitor, remembering when it explained and what."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings, sinks=[self])
        self.steps: list[int] = []
        self.probes: list[str] = []

    def write(self, explanation: Explanation, moment: Moment) -> None:
        self.steps.append(moment.step)
        self.probes.append(explanation.probe.fingerprint)


class Failing:
    def explain(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("not today")


class Configured(Module):
    def configure_callbacks(self) -> Any:
        return quick()


def quick(**settings: Any) -> Watch:
    """Return a monitor that takes little time."""
    return Watch(WGradCAM(), probe=2, metrics=False, **settings)


def trainer(given: Any, **settings: Any) -> Any:
    plain = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "default_root_dir": out,
    }
    return L.Trainer(callbacks=given, **(plain | settings))


def loaders() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(9)
    images = 0.1 * torch.rand(24, 3, 24, 24, generator=generator)
    labels = torch.arange(24) % 3
    images[torch.arange(24), labels, 4:14, 4:14] += 0.9  # a square in the colour of the class
    data = TensorDataset(images, labels)
    torch.manual_seed(1)
    return DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=8)


def fit(given: Any, module: Any = None, ckpt_path: Any = None, **settings: Any) -> Any:
    run = trainer(given, **settings)
    run.fit(module or Module(), *loaders(), ckpt_path=ckpt_path)
    return run


def figures(metrics: Any) -> dict[str, float]:
    # Drift is none of validate()'s, and the controls of a fit are older.
    own = ("explain/seconds", "explain/overhead", "explain/drift", "explain/overall_auc_")
    return {k: float(v) for k, v in metrics.items() if not k.startswith(own)}


def said() -> list[str]:
    """Return what the monitor warned of since the last time."""
    texts = [str(w.message) for w in caught if str(w.message).startswith("ExplanationMonitor")]
    caught.clear()
    return texts


def main_behaviours() -> None:
    """Fit with a logger and a checkpoint, resume, validate."""
    monitor, logger = Watch(probe=3), loggers.TensorBoardLogger(out, name="tb", version=0)
    best = callbacks.ModelCheckpoint(
        out / "checkpoints", monitor="explain/overall_auc", mode="max", save_top_k=-1
    )
    module = Module()
    given = [monitor, best]
    run = fit(given, module, max_epochs=2, logger=logger, enable_checkpointing=True)
    found["fit"] = {
        "steps": monitor.steps,
        "probes": monitor.probes,
        "figures": figures(run.callback_metrics),
        "best": [best.best_model_path, float(best.best_model_score), len(best.best_k_models)],
        "logs": logger.log_dir,
        "said": said(),
    }
    plain = Module()
    fit([], plain, max_epochs=2)
    torch.save({"with": module.state_dict(), "without": plain.state_dict()}, out / "weights.pt")

    (reported,) = trainer([Watch(probe=3)]).validate(module, loaders()[1], verbose=False)
    found["validate"] = figures(reported)

    monitor = quick(every_n_train_steps=2)
    best = callbacks.ModelCheckpoint(
        out / "steps", monitor="explain/blank_maps", every_n_train_steps=2, save_top_k=-1
    )
    fit([monitor, best], enable_checkpointing=True)
    found["by step"] = {"steps": monitor.steps, "saved": len(best.best_k_models), "said": said()}

    fit([Watch(Failing(), probe=2)], max_epochs=2)
    kinds = [w.category.__name__ for w in caught if "not today" in str(w.message)]
    found["failing"] = {"said": said(), "kinds": kinds}


def belonging() -> None:
    """Give the monitor to the trainer in all ways that there are."""
    monitor = quick()
    found["is a callback"] = isinstance(monitor, L.Callback)
    found["given alone"] = fit(monitor) and monitor.steps
    run = fit([], Configured())
    found["given by the module"] = [c.steps for c in run.callbacks if isinstance(c, Watch)]
    try:
        fit([ExplanationMonitor(probe=0)])
    except exceptions.MisconfigurationException as error:
        found["misconfiguration"] = str(error)

    cli = importlib.import_module(f"{used}.cli").LightningCLI
    how = {"run": False, "save_config_callback": None, "trainer_defaults": {"accelerator": "cpu"}}
    path = {"class_path": "lightning_aop.ExplanationMonitor", "init_args": {"probe": 7}}

    class WithMonitor(cli):  # type: ignore[misc, valid-type]
        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_lightning_class_args(ExplanationMonitor, "monitor")

    sys.argv = ["program"]
    made = [
        cli(Module, args=[f"--trainer.callbacks={json.dumps([path])}"], **how),
        WithMonitor(Module, args=["--monitor.probe=7"], **how),
    ]
    found["by the command line"] = [
        [c.probe for c in each.trainer.callbacks if isinstance(c, ExplanationMonitor)]
        for each in made
    ]
    said()


def resume(path: str) -> None:
    monitor = Watch(probe=3)
    run = fit([monitor], ckpt_path=path, max_epochs=3)
    found["resumed"] = {
        "steps": monitor.steps,
        "probes": monitor.probes,
        "figures": figures(run.callback_metrics),
        "said": said(),
    }


found: dict[str, Any] = {"other imported": other in sys.modules, "said by": rank_zero.log.name}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    if order == "alone":
        main_behaviours()
    belonging()
    resume(*checkpoint or [found["fit"]["best"][0]])
assert all(math.isfinite(x) for x in found["resumed"]["figures"].values())
(out / "found.json").write_text(json.dumps(found))
