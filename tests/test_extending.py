"""The parts of one's own that the documentation shows: each is short, and does what it says."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from conftest import SmallNet
from PIL import Image
from test_monitor import Classifier, loaders
from torch import Tensor, nn

from lightning_aop import ExplanationMonitor, GradCAM
from lightning_aop.ops import GaussianBlur
from lightning_aop.types import ActivationMethod, Perturbation

FOLDER = Path(__file__).parents[1] / "examples" / "extending"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"extending_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_it_takes_less_than_thirty_lines(file: Path) -> None:
    assert len([line for line in file.read_text().splitlines() if line.strip()]) < 30


def stretched(image: Tensor) -> Tensor:
    return (image - image.min()) / (image.max() - image.min())


def test_activation(net: SmallNet, batch: tuple[Tensor, Tensor]) -> None:
    module = example("activation")
    method = module.PositiveGradCAM("features")
    assert isinstance(method, ActivationMethod)
    maps = method.activation_map(net, *batch)
    for found, image, target in zip(maps, *batch, strict=True):
        a = net.features(image[None]).detach().requires_grad_()
        net.head(a.mean(dim=(2, 3)))[0, target].backward()
        weighted = sum(max(float(a.grad[0, k].mean()), 0.0) * a[0, k] for k in range(a.shape[1]))
        torch.testing.assert_close(found, stretched(weighted.detach().relu()))
    assert module.method.explain(net, *batch).shape == batch[0][:, 0].shape


def test_perturbation(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    module = example("perturbation")
    stage = module.SignDescent(steps=3)
    assert isinstance(stage, Perturbation)
    start = torch.rand(len(batch[0]), 4, 4)
    kept = start.clone()
    found = stage.refine(net, *batch, start)
    assert torch.equal(start, kept)
    size = batch[0].shape[-2:]

    def enlarged(mask: Tensor) -> Tensor:
        return F.interpolate(mask[None, None], size, mode="bilinear")[0, 0]

    net.eval()
    for refined, image, target, mask in zip(found, *batch, start.double(), strict=True):
        x = image.double()
        blurred = GaussianBlur()(x[None])[0]
        for _ in range(3):
            moved = mask.clone()
            for cell in np.ndindex(4, 4):  # by central differences, cell by cell
                sides = []
                for change in (1e-6, -1e-6):
                    trial = mask.clone()
                    trial[cell] += change
                    blur = enlarged(trial)
                    seen = x * (1 - blur) + blurred * blur
                    sides.append(net.double()(seen[None]).softmax(1)[0, target].item())
                moved[cell] -= 0.1 * np.sign(sides[0] - sides[1])
            mask = moved.clamp(0, 1)
        torch.testing.assert_close(refined.double(), enlarged(mask), atol=1e-6, rtol=0)
    assert module.method.explain(net.float(), *batch).shape == batch[0][:, 0].shape


def test_metric(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    module = example("metric")
    # A drop is a small difference of scores, of which float32 keeps more or less, as the CPU adds up.
    net, images, targets = net.double(), batch[0].double(), batch[1]
    maps = torch.rand(images[:, 0].shape, dtype=torch.float64)
    metric = module.AverageDrop()
    for part in ([0, 1], list(range(2, len(images)))):
        metric.update(net, images[part], maps[part], targets[part])
    net.eval()
    drops = []
    for image, heat, target in zip(images, maps, targets, strict=True):
        seen = image * heat + GaussianBlur()(image[None])[0] * (1 - heat)
        before, after = (net(x[None]).softmax(1)[0, target].item() for x in (image, seen))
        drops.append(max(before - after, 0) / before)
    assert max(drops) > 0
    assert metric.compute().item() == pytest.approx(np.mean(drops), rel=1e-5)
    assert type(module.monitor.metrics) is module.AverageDrop


def test_metric_and_logger_in_a_fit(tmp_path: Path) -> None:
    logger = example("logger").FolderLogger(tmp_path / "log")
    metrics = example("metric").AverageDrop()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=logger,
        callbacks=[ExplanationMonitor(GradCAM(), probe=2, metrics=metrics, store=False)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
    )
    trainer.fit(Classifier(), *loaders())
    lines = map(json.loads, (tmp_path / "log" / "metrics.jsonl").read_text().splitlines())
    drops = {
        line["step"]: line["explain/average_drop"]
        for line in lines
        if "explain/average_drop" in line
    }
    assert list(drops) == [0, 2, 5]
    assert all(0 <= drop <= 1 for drop in drops.values())
    for step in drops:
        with Image.open(tmp_path / "log" / f"explain-heatmaps-{step}.png") as picture:
            assert np.asarray(picture).std() > 10
