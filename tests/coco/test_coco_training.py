"""The data module, the classifier and the feature cache, trained on a small generated set."""

import copy
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torchvision
from conftest import assert_same, finish
from sklearn import metrics as sk
from torch import Tensor, nn

from lightning_aop import ExplanationMonitor, GradCAM
from lightning_aop.coco import CocoClassification, MultilabelClassifier
from lightning_aop.coco.classifier import Report
from lightning_aop.coco.features import cached_features
from lightning_aop.data.networks import load_backbone
from lightning_aop.data.shapes import CLASSES, write_shapes
from lightning_aop.monitor.probe import Probe

pytest.importorskip("pycocotools")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=24, val=11, size=48)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return str(path)


def data(root: Path, folder: Path, **options: Any) -> CocoClassification:
    settings: dict[str, Any] = {
        "size": 48,
        "batch_size": 8,
        "num_workers": 0,
        "cache_dir": folder / "cache",
    }
    return CocoClassification(root, **(settings | options))


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **(settings | options))


def model(weights: str | None, **options: Any) -> MultilabelClassifier:
    torch.manual_seed(1)
    return MultilabelClassifier("resnet18", weights, **options)


# --------------------------------------------------------------------------------------------------
# the network


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 64),
        ("mobilenet_v2", 64),
        ("mobilenet_v3_small", 64),
        ("squeezenet1_1", 64),
        ("densenet121", 64),
        ("vgg11_bn", 64),
        ("convnext_tiny", 64),
        ("inception_v3", 80),
        ("googlenet", 64),
        ("vit_b_16", 224),
    ],
)
def test_the_features_are_what_the_published_head_is_given(
    name: str, size: int, tmp_path: Path
) -> None:
    extra = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    published = torchvision.models.get_model(name, weights=None, **extra).eval()
    torch.save(published.state_dict(), tmp_path / "published.pth")
    backbone, count = load_backbone(name, str(tmp_path / "published.pth"))
    backbone.eval()
    images = torch.randn(2, 3, size, size)
    old = [m for m in published.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    if name == "squeezenet1_1":
        # Without the ReLU that cuts its logits off.
        published.classifier[2] = nn.Identity()
    with torch.no_grad():
        found = backbone(images)
        assert found.shape == (2, count)
        weight, bias = old.weight.flatten(1), old.bias
        torch.testing.assert_close(
            nn.functional.linear(found, weight, bias), published(images), atol=1e-4, rtol=1e-4
        )


def test_timm_networks() -> None:
    pytest.importorskip("timm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone, count = load_backbone("timm/mobilenetv3_small_050", None)
    with torch.no_grad():
        assert backbone.eval()(torch.randn(2, 3, 64, 64)).shape == (2, count)
    with pytest.raises(ValueError, match=r"timm/nothing.*timm\.list_models"):
        load_backbone("timm/nothing", None)


@pytest.mark.sample(1)
def test_wrong_names_and_weights_are_told(resnet: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'resnet19' is no classifier of torchvision"):
        load_backbone("resnet19", None)
    with pytest.raises(ValueError, match=r"'V9' of resnet18 are not published.*IMAGENET1K_V1"):
        load_backbone("resnet18", "V9")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file"):
        load_backbone("resnet18", "nowhere.pth")
    with pytest.raises(
        ValueError,
        match=r"resnet18.pth are no weights of mobilenet_v2: .*; they fit resnet18: name",
    ):
        load_backbone("mobilenet_v2", resnet)
    text = tmp_path / "text.pth"
    text.write_text("no weights")
    with pytest.raises(ValueError, match=r"text.pth: it is not a file that PyTorch wrote"):
        load_backbone("resnet18", str(text))
    torch.save([1, 2], text)
    with pytest.raises(ValueError, match=r"text.pth: holds no state_dict of tensors"):
        load_backbone("resnet18", str(text))


def test_weights_with_a_head_of_another_size_fit(tmp_path: Path) -> None:
    other = torchvision.models.resnet18(weights=None, num_classes=7)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "other.pth")
    backbone, _ = load_backbone("resnet18", str(tmp_path / "other.pth"))
    assert torch.equal(backbone.get_parameter("conv1.weight"), other.conv1.weight)


# --------------------------------------------------------------------------------------------------
# training


@pytest.mark.sample(1)
def test_the_head_learns_and_the_backbone_does_not_stir(
    root: Path, resnet: str, tmp_path: Path
) -> None:
    network = model(resnet, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    before = copy.deepcopy(network.backbone.state_dict())
    module = data(root, tmp_path, val="train2017")
    (first,) = trainer(tmp_path).validate(network, datamodule=module, verbose=False)
    run = trainer(tmp_path, max_epochs=4)
    run.fit(network, datamodule=module)
    assert_same(before, network.backbone.state_dict())
    assert not any(module.training for module in network.backbone.modules())
    assert network.classes == list(CLASSES)
    assert float(run.callback_metrics["val/loss"]) < first["val/loss"]
    assert float(run.callback_metrics["val/mAP"]) > first["val/mAP"]
    assert {f"val/{n}" for n in ("loss", "mAP", "F1_micro", "recall_macro")} <= set(
        run.callback_metrics
    )


def test_a_backbone_that_is_trained_changes(root: Path, resnet: str, tmp_path: Path) -> None:
    network = model(resnet, train_backbone=True, per_class=True)
    before = network.backbone.get_parameter("conv1.weight").clone()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(network, datamodule=data(root, tmp_path, horizontal_flip=True))
    assert not torch.equal(before, network.backbone.get_parameter("conv1.weight"))
    assert network.backbone.training
    assert f"val/AP/{CLASSES[0]}" in run.callback_metrics


def test_the_report_of_a_single_class_agrees_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(3)
    truth = (torch.rand(40, 1, generator=generator) < 0.3).float()
    logits = torch.randn(40, 1, generator=generator) + truth
    report = Report(["ape"])
    loss = nn.functional.binary_cross_entropy_with_logits(logits, truth)
    report.update(loss, torch.tensor(40.0), logits, truth)
    values = report.compute(per_class=True)
    metrics = pytest.importorskip("sklearn.metrics")
    mean = metrics.average_precision_score(truth[:, 0], logits[:, 0])
    f1 = metrics.f1_score(truth[:, 0], logits[:, 0] > 0)
    for key in ("mAP", "AP/ape"):
        assert float(values[key]) == pytest.approx(mean, abs=1e-6)
    for key in ("F1_micro", "F1_macro", "F1/ape"):
        assert float(values[key]) == pytest.approx(f1, abs=1e-6)


def test_the_report_agrees_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(3)
    truth = (torch.rand(40, 6, generator=generator) < 0.3).float()
    truth[:, 4] = 0  # no image has this class
    logits = torch.randn(40, 6, generator=generator) + truth
    report = Report(list("abcdef"))
    for start in range(0, 40, 16):
        part = slice(start, start + 16)
        ignored = torch.full((3, 6), -1.0)
        report.update(
            nn.functional.binary_cross_entropy_with_logits(logits[part], truth[part]),
            torch.tensor(float(len(truth[part]))),
            torch.cat([logits[part], torch.randn(3, 6)]),
            torch.cat([truth[part], ignored]),
        )
    values = report.compute(per_class=True)
    y, p = truth.int().numpy(), logits.sigmoid().numpy()
    shown = [0, 1, 2, 3, 5]
    average = [sk.average_precision_score(y[:, k], p[:, k]) for k in shown]
    assert float(values["mAP"]) == pytest.approx(np.mean(average), abs=1e-6)
    assert float(values["AP/f"]) == pytest.approx(average[-1], abs=1e-6)
    assert "AP/e" not in values
    for kind in ("micro", "macro"):
        for name, function in (
            ("precision", sk.precision_score),
            ("recall", sk.recall_score),
            ("F1", sk.f1_score),
        ):
            expected = function(y, p > 0.5, average=kind, zero_division=0)
            assert float(values[f"{name}_{kind}"]) == pytest.approx(expected, abs=1e-6)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, truth)
    torch.testing.assert_close(values["loss"], loss)


def test_a_schedule_is_stepped_after_each_epoch(root: Path, resnet: str, tmp_path: Path) -> None:
    network = model(
        resnet,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5),
    )
    run = trainer(tmp_path, max_epochs=3)
    run.fit(network, datamodule=data(root, tmp_path))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def test_checkpoints_are_plain_and_come_back(root: Path, resnet: str, tmp_path: Path) -> None:
    network = model(resnet)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(network, datamodule=data(root, tmp_path))
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)
    # An argument of Lightning 2.6.
    plain: Any = {} if pl.__version__.startswith("2.5.") else {"weights_only": True}
    again = MultilabelClassifier.load_from_checkpoint(path, weights=None, **plain)
    assert again.classes == list(CLASSES)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), network.eval()(images))
    results = [
        trainer(tmp_path).validate(
            copy.deepcopy(m), datamodule=data(root, tmp_path), ckpt_path=p, verbose=False
        )[0]
        for m, p in ((network, None), (model(None), str(path)))
    ]
    assert results[0] == pytest.approx(results[1])


def test_a_head_of_other_classes_is_refused(root: Path, resnet: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"the head has 3 classes, the data has \d+: give the data"
    ):
        trainer(tmp_path).fit(model(resnet, num_classes=3), datamodule=data(root, tmp_path))
    network = model(resnet, num_classes=len(CLASSES))
    network.classes = ["other", *CLASSES[1:]]
    with pytest.raises(ValueError, match="class 0 of the head is 'other', of the data"):
        trainer(tmp_path).fit(network, datamodule=data(root, tmp_path))
    with pytest.raises(ValueError, match="names no classes"):
        network.on_load_checkpoint({})


# --------------------------------------------------------------------------------------------------
# the data module


def test_bad_settings_are_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root .*nowhere is no folder: give one in COCO's"):
        data(tmp_path / "nowhere", tmp_path).setup("fit")
    with pytest.raises(FileNotFoundError, match="train1999 is no folder"):
        data(root, tmp_path, train="train1999").setup("fit")
    with pytest.raises(ValueError, match=r"split '\.\./x'"):
        data(root, tmp_path, train="../x").setup("fit")
    with pytest.raises(ValueError, match="horizontal_flip=True wants another"):
        data(root, tmp_path, features="cached", horizontal_flip=True)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        data(root, tmp_path, batch_size=0)


def test_other_layouts_are_found(root: Path, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        source = "train2017" if split == "train" else "val2017"
        shutil.copytree(root / source, tmp_path / split)
        shutil.copy(
            root / "annotations" / f"instances_{source}.json",
            tmp_path / split / "_annotations.coco.json",
        )
    module = data(tmp_path, tmp_path, train="train", val="valid")
    module.setup("fit")
    assert (len(module.dataset("train")), len(module.dataset("val"))) == (24, 11)


def test_splits_with_other_classes_are_refused(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "other"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must share their categories"):
        data(tmp_path / "data", tmp_path).setup("fit")


@pytest.mark.parametrize("kept", ["live", "cached"])
def test_skipped_pictures_are_left_out_and_listed(
    kept: str, root: Path, resnet: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(root, tmp_path / "data")
    broken = sorted((tmp_path / "data" / "val2017").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(OSError, match=f"{broken.name}, image .*can't be read"):
        trainer(tmp_path).validate(
            model(resnet), datamodule=data(tmp_path / "data", tmp_path), verbose=False
        )
    network = model(resnet, num_classes=len(CLASSES))
    options: dict[str, Any] = {"on_error": "skip", "features": kept}
    with caplog.at_level(logging.WARNING):
        (result,) = trainer(tmp_path).validate(
            network, datamodule=data(tmp_path / "data", tmp_path, **options), verbose=False
        )
    assert "1 of the 11 images of" in caplog.text
    assert f"{broken.name}, image" in caplog.text
    # The same as for a set without the picture.
    file = tmp_path / "data" / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    (image,) = [i for i in content["images"] if i["file_name"] == broken.name]
    content["images"].remove(image)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image["id"]]
    file.write_text(json.dumps(content))
    (expected,) = trainer(tmp_path).validate(
        network, datamodule=data(tmp_path / "data", tmp_path), verbose=False
    )
    assert result == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# features that are computed once


class Counting(nn.Module):
    """A backbone that remembers how many images it has seen, and may fail after some."""

    def __init__(self, limit: int = 10**6) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 5)
        self.seen, self.limit = 0, limit

    def forward(self, images: Tensor) -> Tensor:
        if self.seen >= self.limit:
            raise KeyboardInterrupt
        self.seen += len(images)
        return self.layer(images.mean(dim=(1, 3)))


def test_the_head_becomes_the_same_with_and_without_the_cache(
    root: Path, resnet: str, tmp_path: Path
) -> None:
    results = {}
    for kept in ("live", "cached", "cached"):
        network = model(resnet, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
        torch.manual_seed(2)
        run = trainer(tmp_path, max_epochs=3)
        run.fit(network, datamodule=data(root, tmp_path, features=kept))
        assert network.head is not None
        results[kept] = (network.head.weight.detach(), dict(run.callback_metrics))
    torch.testing.assert_close(results["live"][0], results["cached"][0])
    for name, value in results["live"][1].items():
        torch.testing.assert_close(results["cached"][1][name], value)


def test_features_are_computed_once_and_an_interrupted_run_goes_on(
    root: Path, tmp_path: Path
) -> None:
    module = data(root, tmp_path)
    module.setup("fit")
    images = module.dataset("train")
    torch.manual_seed(0)
    backbone = Counting(limit=16)
    with pytest.raises(KeyboardInterrupt):
        cached_features(backbone, images, tmp_path / "f", batch_size=5)
    done = backbone.seen - 1  # the first image told the size
    backbone.limit, backbone.seen = 10**6, 0
    found = cached_features(backbone, images, tmp_path / "f", batch_size=5)
    assert backbone.seen == 24 - done
    with torch.no_grad():
        expected = torch.cat([backbone(images[i][0][None]) for i in range(24)])
    torch.testing.assert_close(torch.stack([found[i][0] for i in range(24)]), expected)
    torch.testing.assert_close(torch.stack([found[i][1] for i in range(24)]), images.labels.float())
    backbone.seen = 0
    cached_features(backbone, images, tmp_path / "f", batch_size=5)
    assert backbone.seen == 0


def test_a_stale_cache_is_never_used(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    torch.manual_seed(0)
    backbone = Counting()

    def seen(**options: Any) -> int:
        module = data(tmp_path / "data", tmp_path, **options)
        module.setup("fit")
        backbone.seen = 0
        cached_features(backbone, module.dataset("train"), tmp_path / "f")
        return backbone.seen

    assert seen() > 0
    assert seen() == 0
    assert seen(mean=(0.5, 0.5, 0.5)) > 0, "another transform"
    with torch.no_grad():
        backbone.layer.bias[0] += 1e-6
    assert seen() > 0, "other weights"
    picture = sorted((tmp_path / "data" / "train2017").iterdir())[0]
    os.utime(picture, ns=(1, 1))
    assert seen() > 0, "another picture"
    assert seen() == 0


def test_half_precision_features(root: Path, tmp_path: Path) -> None:
    module = data(root, tmp_path)
    module.setup("fit")
    backbone = Counting()
    full, half = (
        cached_features(backbone, module.dataset("val"), tmp_path / "f", precision=p)
        for p in ("float32", "float16")
    )
    assert half.features.nbytes * 2 == full.features.nbytes
    torch.testing.assert_close(half[3][0], full[3][0], atol=1e-3, rtol=1e-3)
    assert half[3][0].dtype == torch.float32
    with torch.no_grad():
        backbone.layer.weight *= 1e6
    with pytest.raises(ValueError, match=r"features of .*png are not finite in float16.*float32"):
        cached_features(backbone, module.dataset("val"), tmp_path / "f", precision="float16")


def test_what_cannot_be_cached_is_told(root: Path, resnet: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a frozen backbone"):
        trainer(tmp_path).fit(
            model(resnet, train_backbone=True), datamodule=data(root, tmp_path, features="cached")
        )

    class Other(pl.LightningModule):
        def training_step(self, batch: Any) -> None: ...

        def validation_step(self, batch: Any) -> None: ...

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    with pytest.raises(ValueError, match="needs a model with a `backbone`"):
        trainer(tmp_path).fit(Other(), datamodule=data(root, tmp_path, features="cached"))


@pytest.mark.wide
def test_the_monitor_explains_pictures_where_features_are_trained_on(
    root: Path, resnet: str, tmp_path: Path
) -> None:
    monitor = ExplanationMonitor(GradCAM(), probe=3, metrics=False)
    run = trainer(tmp_path, monitor, max_epochs=1)
    run.fit(model(resnet), datamodule=data(root, tmp_path, features="cached"))
    assert {"explain/pointing_game", "explain/energy_in_mask"} <= set(run.callback_metrics)
    assert Probe.from_state(monitor.state_dict()).images.shape == (3, 3, 48, 48)


KILLED = """
import sys, time
from pathlib import Path
import torch
from torch import nn
from lightning_aop.coco import CocoMultilabel, Preprocess
from lightning_aop.coco.features import cached_features

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 5)
    def forward(self, images):
        print("images", len(images), flush=True)
        time.sleep(float(sys.argv[3]))
        return self.layer(images.mean(dim=(1, 3)))

torch.manual_seed(0)
data = CocoMultilabel.from_root(sys.argv[1], transform=Preprocess(48))
cached_features(Slow().eval(), data, Path(sys.argv[2]), batch_size=2)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_its_features(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(root), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, "0.2"], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        for _ in range(6):  # the size, and five batches of which the last is under way
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    (state,) = tmp_path.glob("*/state.npy")
    done = int((np.load(state) == 1).sum())
    assert 6 <= done < 24
    again = finish([*command, "0"], env=environment)
    assert again.count("images 2") == (24 - done) // 2
    assert (np.load(state) == 1).all()


# --------------------------------------------------------------------------------------------------
# what once went wrong


def test_shares_fit_each_other_though_another_process_has_begun(root: Path, tmp_path: Path) -> None:
    module = data(root, tmp_path)
    module.setup("fit")
    images = module.dataset("val")
    torch.manual_seed(0)
    backbone = Counting(limit=5)
    with pytest.raises(KeyboardInterrupt):
        cached_features(backbone, images, tmp_path / "f", batch_size=2)
    backbone.limit = 10**6
    # The first of two is done before the second looks: it must not find its share shifted.
    with pytest.raises(OSError, match="which another process had to compute"):
        cached_features(backbone, images, tmp_path / "f", batch_size=2, rank=0, world_size=2)
    found = cached_features(backbone, images, tmp_path / "f", batch_size=2, rank=1, world_size=2)
    with torch.no_grad():
        expected = torch.cat([backbone(images[i][0][None]) for i in range(len(images))])
    torch.testing.assert_close(torch.from_numpy(np.array(found.features)), expected)


def test_a_picture_that_is_mended_is_taken_in(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    picture = sorted((tmp_path / "data" / "val2017").iterdir())[0]
    whole, stat = picture.read_bytes(), picture.stat()
    picture.write_bytes(bytes(len(whole)))
    os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    backbone = Counting()
    for expected in (True, False):
        module = data(tmp_path / "data", tmp_path, on_error="skip")
        module.setup("validate")
        found = cached_features(backbone, module.dataset("val"), tmp_path / "f")
        assert bool((found[0][1] < 0).all()) is expected
        # The same size and time, as after an error of the disk that passes.
        picture.write_bytes(whole)
        os.utime(picture, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_features_of_a_backbone_in_half_precision(root: Path, tmp_path: Path) -> None:
    module = data(root, tmp_path)
    module.setup("validate")
    found = cached_features(Counting().bfloat16(), module.dataset("val"), tmp_path / "f")
    assert found[0][0].dtype == torch.float32


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_networks_that_transform_their_input_do_so_with_any_weights(name: str) -> None:
    backbone, _ = load_backbone(name, None)
    assert backbone.transform_input


def _judge(rank: int, port: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    report = Report(["a", "b"])
    logits, labels = torch.tensor([[2.0, -1.0], [-1.0, 1.0]]), torch.tensor([[1.0, 0], [0, 1]])
    if rank == 1:
        labels = torch.full_like(labels, -1.0)
    report.update(torch.tensor(0.5), torch.tensor(2.0 if rank == 0 else 0.0), logits, labels)
    values = {name: float(value) for name, value in report.compute().items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_process_without_a_picture_that_counts(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_judge, (port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["mAP"] == first["F1_micro"] == 1.0


def test_each_epoch_that_asks_for_a_loader_gets_another_order(
    root: Path, resnet: str, tmp_path: Path
) -> None:
    orders = []

    class Note(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            orders.append(list(trainer.train_dataloader.sampler))

    run = trainer(tmp_path, Note(), max_epochs=2, reload_dataloaders_every_n_epochs=1)
    run.fit(model(resnet), datamodule=data(root, tmp_path, features="cached"))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(24))
    assert orders[0] != orders[1]
