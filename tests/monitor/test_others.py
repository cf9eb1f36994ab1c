"""Modules that others have written, trained as their users train them, with the monitor added.

Each project says how its module is trained, and computes by hand what the module says of the images
of the probe: the scores of all classes, without anything of this package. Run with `make test-others`.
"""

import copy
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, random_split

pytestmark = [
    pytest.mark.others,
    # What the libraries say of each other.
    pytest.mark.filterwarnings("default"),
]

pl = pytest.importorskip("lightning.pytorch")

SIZE, COUNT, PROBE = 64, 16, 4


def blobs(channels: int = 3, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return images of noise with a bright square, whose place is the class, and where it is."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(COUNT) % classes
    x = torch.rand(COUNT, channels, SIZE, SIZE, generator=generator) * 0.2
    masks = torch.zeros(COUNT, SIZE, SIZE, dtype=torch.bool)
    for row, left in enumerate((y * 20 + 2).tolist()):
        masks[row, 20:38, left : left + 18] = True
    x += 0.8 * masks[:, None]
    return x, y, masks


class Samples(Dataset[Any]):
    """Samples that a function makes, as a dataset of the user's would."""

    def __init__(self, make: Callable[[int], Any], **facts: Any) -> None:
        self.make = make
        vars(self).update(facts)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


@dataclass
class Project:
    """How a module is trained, and what it says of images.

    Attributes:
        module: the module.
        data: what `Trainer.fit` takes.
        scores: the module and a batch to the score of each class, [N, K].
        says: a part of the sentence that the monitor says of the outputs.
        targets: the classes that are explained, in order; those of the first images.
        settings: of the monitor; the lines that a user has to write.
        trainer: settings that the module's users give the trainer.
        note: a part of the one sentence that the monitor warns with, empty where it is silent.
        faint: after so little training no blur moves a class's mean over the image, and maps are blank.
    """

    module: Any
    data: dict[str, Any]
    scores: Callable[[Any, Any], Tensor]
    says: str
    targets: list[int]
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    faint: bool = False


def loaders(
    make: Callable[[int], Any], loader: Any = DataLoader, **settings: Any
) -> dict[str, Any]:
    dataset = Samples(make)
    return {
        "train_dataloaders": loader(dataset, batch_size=8, shuffle=True, **settings),
        "val_dataloaders": loader(dataset, batch_size=8, **settings),
    }


# --------------------------------------------------------------------------------------------------
# torchgeo


def torchgeo_binary(folder: Path) -> Project:
    trainers = pytest.importorskip("torchgeo.trainers")
    x, y, _ = blobs(classes=2)
    return Project(
        trainers.ClassificationTask(model="resnet18", task="binary", loss="bce"),
        loaders(lambda i: {"image": x[i], "label": y[i]}),
        lambda m, b: torch.cat([1 - m(b["image"]).sigmoid(), m(b["image"]).sigmoid()], dim=1),
        "the logit of class 1 of two",
        y[:PROBE].tolist(),
    )


def torchgeo_multiclass(folder: Path) -> Project:
    trainers = pytest.importorskip("torchgeo.trainers")
    x, y, _ = blobs(channels=5)
    return Project(
        trainers.ClassificationTask(model="resnet18", num_classes=3, in_channels=5),
        loaders(lambda i: {"image": x[i], "label": y[i]}),
        lambda m, b: m(b["image"]).softmax(1),
        "logits [B, 3]",
        y[:PROBE].tolist(),
    )


def torchgeo_multilabel(folder: Path) -> Project:
    trainers = pytest.importorskip("torchgeo.trainers")
    x, y, _ = blobs()
    hot = F.one_hot(y, 4)
    hot[:, 3] = y == 0
    return Project(
        trainers.ClassificationTask(model="resnet18", task="multilabel", num_labels=4, loss="bce"),
        loaders(lambda i: {"image": x[i], "label": hot[i]}),
        lambda m, b: m(b["image"]).sigmoid(),
        "logits [B, 4]",
        hot[:PROBE].nonzero()[:, 1].tolist(),
    )


def torchgeo_regression(folder: Path) -> Project:
    trainers = pytest.importorskip("torchgeo.trainers")
    x, y, _ = blobs()
    return Project(
        trainers.RegressionTask(model="resnet18", num_outputs=1),
        loaders(lambda i: {"image": x[i], "label": y[i].float() / 3}),
        lambda m, b: torch.cat([m(b["image"]), -m(b["image"])], dim=1),
        "a value to predict",
        [0, 1] * PROBE,
    )


def torchgeo_segmentation(folder: Path) -> Project:
    trainers = pytest.importorskip("torchgeo.trainers")
    x, y, masks = blobs(classes=2)
    pixels = masks * (y[:, None, None] + 1)
    return Project(
        trainers.SemanticSegmentationTask(model="unet", backbone="resnet18", num_classes=3),
        loaders(lambda i: {"image": x[i], "mask": pixels[i]}),
        lambda m, b: m(b["image"]).softmax(1).mean(dim=(2, 3)),
        "a semantic segmentation",
        [each for c in y[:PROBE].tolist() for each in (0, c + 1)],
    )


def torchgeo_binary_segmentation(folder: Path) -> Project:
    trainers = pytest.importorskip("torchgeo.trainers")
    x, _, masks = blobs()

    def scores(module: Any, batch: Any) -> Tensor:
        p = module(batch["image"]).sigmoid().mean(dim=(2, 3))
        return torch.cat([1 - p, p], dim=1)

    return Project(
        trainers.SemanticSegmentationTask(
            model="unet", backbone="resnet18", task="binary", loss="bce"
        ),
        loaders(lambda i: {"image": x[i], "mask": masks[i].long()}),
        scores,
        "a semantic segmentation",
        [0, 1] * PROBE,
    )


def best_boxes(outputs: Any, classes: int) -> Tensor:
    """Return the score of each class's best box, by a loop."""
    scores = torch.zeros(len(outputs), classes)
    for row, found in enumerate(outputs):
        for label, score in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True):
            scores[row, label] = max(float(scores[row, label]), score)
    return scores


def torchgeo_detection(folder: Path) -> Project:
    trainers = pytest.importorskip("torchgeo.trainers")
    x, y, _ = blobs(classes=2)

    def sample(i: int) -> dict[str, Any]:
        left = float(y[i]) * 20 + 2
        box = torch.tensor([[left, 20.0, left + 18, 38.0]])
        return {"image": x[i], "bbox_xyxy": box, "label": y[i : i + 1] + 1}

    def collate(samples: Any) -> dict[str, Any]:
        batch = {key: [each[key] for each in samples] for key in samples[0]}
        return {**batch, "image": torch.stack(batch["image"])}

    return Project(
        trainers.ObjectDetectionTask(model="fcos", backbone="resnet18", num_classes=3),
        loaders(sample, collate_fn=collate),
        lambda m, b: best_boxes(m(b["image"]), 3),
        "detections, scored by the best box",
        (y[:PROBE] + 1).tolist(),
        note="ObjectDetectionTask has no layer that gives a feature map",
    )


# --------------------------------------------------------------------------------------------------
# anomalib


def anomalib_stfpm(folder: Path) -> Project:
    pytest.importorskip("anomalib")
    from anomalib.data import ImageBatch, ImageItem
    from anomalib.models import Stfpm
    from anomalib.models.image.stfpm import torch_model

    # Its teacher's weights would be downloaded.
    extractor = torch_model.TimmFeatureExtractor
    torch_model.TimmFeatureExtractor = lambda **settings: extractor(
        **{**settings, "pre_trained": False}
    )
    try:
        small = Stfpm.configure_pre_processor((SIZE, SIZE))
        module = Stfpm(pre_processor=small, visualizer=False, evaluator=False, post_processor=False)
    finally:
        torch_model.TimmFeatureExtractor = extractor
    x, y, masks = blobs(classes=2)

    def sample(i: int) -> Any:
        return ImageItem(
            image=x[i], gt_label=y[i], gt_mask=(masks[i] & bool(y[i])), image_path=f"{i}.png"
        )

    def scores(module: Any, batch: Any) -> Tensor:
        score = module(batch.image).pred_score
        return torch.cat([score, -score], dim=1)

    return Project(
        module,
        loaders(sample, collate_fn=ImageBatch.collate),
        scores,
        ".pred_score [B, 1], a value",
        [0, 1] * PROBE,
        trainer=module.trainer_arguments,
        note="the batch's masks have shape",
        faint=True,
    )


# --------------------------------------------------------------------------------------------------
# ordinary modules around others' networks


class Ordinary(pl.LightningModule):
    """The steps that most projects share."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor] = F.cross_entropy) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def step(self, batch: Any) -> Tensor:
        return self.loss(self(batch["image"]), batch["label"])

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


def smp_binary(folder: Path) -> Project:
    smp = pytest.importorskip("segmentation_models_pytorch")

    class PetModel(Ordinary):
        """As the library's own example has it."""

        def __init__(self) -> None:
            model = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=1)
            super().__init__(model, smp.losses.DiceLoss("binary", from_logits=True))
            self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))

        def forward(self, image: Tensor) -> Tensor:
            mask: Tensor = self.model((image - self.mean) / self.std)
            return mask

        def step(self, batch: Any) -> Tensor:
            assert batch["mask"].ndim == 4
            return self.loss(self(batch["image"]), batch["mask"])

    x, _, masks = blobs()

    def scores(module: Any, batch: Any) -> Tensor:
        p = module(batch["image"]).sigmoid().mean(dim=(2, 3))
        return torch.cat([1 - p, p], dim=1)

    return Project(
        PetModel(),
        loaders(lambda i: {"image": x[i], "mask": masks[i][None].float()}),
        scores,
        "a semantic segmentation",
        [0, 1] * PROBE,
    )


def smp_multiclass(folder: Path) -> Project:
    smp = pytest.importorskip("segmentation_models_pytorch")
    x, y, masks = blobs(classes=2)
    pixels = (masks * (y[:, None, None] + 1)).long()

    class Segmentation(Ordinary):
        def step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

    model = smp.FPN("mobilenet_v2", encoder_weights=None, in_channels=3, classes=3)
    return Project(
        Segmentation(model),
        loaders(lambda i: (x[i], pixels[i])),
        lambda m, b: m(b[0]).softmax(1).mean(dim=(2, 3)),
        "a semantic segmentation",
        [each for c in y[:PROBE].tolist() for each in (0, c + 1)],
        faint=True,
    )


class Transformer(Ordinary):
    """A model of the transformers library, which computes its own loss."""

    def forward(self, **batch: Any) -> Any:  # type: ignore[override]
        return self.model(**batch)

    def step(self, batch: Any) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss


def transformers_vit(folder: Path) -> Project:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=SIZE,
        patch_size=8,
        num_labels=3,
    )
    x, y, _ = blobs()
    return Project(
        Transformer(transformers.ViTForImageClassification(config)),
        loaders(lambda i: {"pixel_values": x[i], "labels": y[i]}),
        lambda m, b: m.model(pixel_values=b["pixel_values"]).logits.softmax(1),
        "logits [B, 3]",
        y[:PROBE].tolist(),
    )


def transformers_convnext(folder: Path) -> Project:
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(
        hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_labels=3
    )
    x, y, _ = blobs()
    return Project(
        Transformer(transformers.ConvNextForImageClassification(config)),
        loaders(lambda i: {"pixel_values": x[i], "labels": y[i]}),
        lambda m, b: m.model(pixel_values=b["pixel_values"]).logits.softmax(1),
        "logits [B, 3]",
        y[:PROBE].tolist(),
    )


def transformers_detr(folder: Path) -> Project:
    transformers = pytest.importorskip("transformers")
    x, y, _ = blobs(classes=2)
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=transformers.ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 24, 32, 48],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage4"],
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=6,
        num_labels=2,
        auxiliary_loss=False,
    )

    class Detr(Ordinary):
        """As the tutorials have it."""

        def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Any:  # type: ignore[override]
            return self.model(pixel_values=pixel_values, pixel_mask=pixel_mask)

        def step(self, batch: Any) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

    def sample(i: int) -> tuple[Tensor, dict[str, Tensor]]:
        box = [(float(y[i]) * 20 + 11) / SIZE, 29 / SIZE, 18 / SIZE, 18 / SIZE]
        return x[i], {"class_labels": y[i : i + 1], "boxes": torch.tensor([box])}

    def collate(samples: Any) -> dict[str, Any]:
        images = torch.stack([image for image, _ in samples])
        mask = torch.ones(len(images), SIZE, SIZE, dtype=torch.long)
        return {"pixel_values": images, "pixel_mask": mask, "labels": [t for _, t in samples]}

    def scores(module: Any, batch: Any) -> Tensor:
        logits = module(batch["pixel_values"], batch["pixel_mask"]).logits
        best: Tensor = logits.softmax(-1)[..., :-1].amax(dim=1)
        return best

    return Project(
        Detr(transformers.DetrForObjectDetection(config)),
        loaders(sample, collate_fn=collate),
        scores,
        "detections, scored by the best",
        y[:PROBE].tolist(),
    )


def monai_classifier(folder: Path) -> Project:
    networks = pytest.importorskip("monai.networks.nets")
    from monai.data import DataLoader as Loader
    from monai.data import MetaTensor

    x, y, _ = blobs(channels=1)
    model = networks.DenseNet(
        spatial_dims=2, in_channels=1, out_channels=3, init_features=16, block_config=(2, 2)
    )
    return Project(
        Ordinary(model),
        loaders(lambda i: {"image": MetaTensor(x[i]), "label": int(y[i])}, Loader),
        lambda m, b: m(b["image"].as_tensor()).softmax(1),
        "logits [B, 3]",
        y[:PROBE].tolist(),
    )


def monai_unet(folder: Path) -> Project:
    networks = pytest.importorskip("monai.networks.nets")
    from monai.data import DataLoader as Loader
    from monai.data import MetaTensor
    from monai.losses import DiceCELoss

    x, _, masks = blobs(channels=1)
    model = networks.UNet(
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        channels=(8, 16, 32),
        strides=(2, 2),
        num_res_units=1,
    )
    return Project(
        Ordinary(model, DiceCELoss(to_onehot_y=True, softmax=True)),
        loaders(
            lambda i: {"image": MetaTensor(x[i]), "label": MetaTensor(masks[i][None].float())},
            Loader,
        ),
        lambda m, b: m(b["image"].as_tensor()).softmax(1).mean(dim=(2, 3)),
        "a semantic segmentation",
        [0, 1] * PROBE,
    )


# --------------------------------------------------------------------------------------------------
# the structure of the lightning-hydra-template


class LitModule(pl.LightningModule):
    """A net, an optimizer and a scheduler that are made elsewhere, and metrics for each stage."""

    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any, compile: bool) -> None:
        from torchmetrics import MaxMetric, MeanMetric
        from torchmetrics.classification import Accuracy

        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc = Accuracy(task="multiclass", num_classes=3)
        self.val_acc = Accuracy(task="multiclass", num_classes=3)
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.val_acc_best = MaxMetric()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def on_train_start(self) -> None:
        for metric in (self.val_loss, self.val_acc, self.val_acc_best):
            metric.reset()

    def model_step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self.forward(x)
        return self.criterion(logits, y), logits.argmax(dim=1), y

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss, preds, targets = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, targets)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        loss, preds, targets = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, targets)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)
        self.log("val/acc", self.val_acc, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_acc_best.compute(), sync_dist=True)

    def setup(self, stage: str) -> None:
        if self.hparams["compile"] and stage == "fit":
            self.net = torch.compile(self.net)

    def configure_optimizers(self) -> Any:
        optimizer = self.hparams["optimizer"](params=self.parameters())
        scheduler = self.hparams["scheduler"](optimizer=optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch"},
        }


class LitDataModule(pl.LightningDataModule):
    """Sets that are split from one, and a batch size for each device."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.train_set: Any = None

    def setup(self, stage: str | None = None) -> None:
        x, y, _ = blobs(channels=1)
        if self.train_set is None:
            self.train_set, self.val_set = random_split(
                Samples(lambda i: (x[i], int(y[i])), classes=["left", "middle", "right"]),
                (COUNT - 8, 8),
                torch.Generator().manual_seed(42),
            )

    def train_dataloader(self) -> Any:
        return DataLoader(self.train_set, batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val_set, batch_size=8)


def hydra_template(folder: Path) -> Project:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 3),
    )
    data = LitDataModule()
    data.setup()
    module = LitModule(
        net,
        partial(torch.optim.Adam, lr=0.005),
        partial(torch.optim.lr_scheduler.ReduceLROnPlateau, mode="min", factor=0.1),
        False,
    )
    return Project(
        module,
        {"datamodule": data},
        lambda m, b: m.net(b[0]).softmax(1),
        "logits [B, 3]",
        [data.val_set[i][1] for i in range(PROBE)],
    )


# --------------------------------------------------------------------------------------------------
# the tests

PROJECTS = [
    torchgeo_binary,
    torchgeo_multiclass,
    torchgeo_multilabel,
    torchgeo_regression,
    torchgeo_segmentation,
    torchgeo_binary_segmentation,
    torchgeo_detection,
    anomalib_stfpm,
    smp_binary,
    smp_multiclass,
    transformers_vit,
    transformers_convnext,
    transformers_detr,
    monai_classifier,
    monai_unet,
    hydra_template,
]


class Keeps:
    """Keeps every explanation."""

    def __init__(self) -> None:
        self.explanations: list[Any] = []

    def write(self, explanation: Any, moment: Any) -> None:
        self.explanations.append(explanation)


def fit(project: Project, folder: Path, *callbacks: Any) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(1, verbose=False)
    pl.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            **project.trainer,
        }
    ).fit(project.module, **project.data)


@pytest.mark.parametrize("make", PROJECTS, ids=lambda make: make.__name__)
def test_a_module_of_others_is_explained(make: Callable[[Path], Project], tmp_path: Path) -> None:
    from lightning_aop import ExplanationMonitor

    torch.manual_seed(0)
    project = make(tmp_path)
    # One that a compiled network or a closure keeps from being copied is made anew.
    torch.manual_seed(0)
    plain = make(tmp_path)
    fit(plain, tmp_path / "without")
    keeps = Keeps()
    monitor = ExplanationMonitor(**project.settings, controls=False, sinks=[keeps])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(project, tmp_path / "with", monitor)
    said = [str(w.message) for w in caught if "ExplanationMonitor" in str(w.message)]
    assert len(said) == bool(project.note), said
    assert project.note in "".join(said)
    # The training is as without the monitor.
    before, after = plain.module.state_dict(), project.module.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    # Before the training, and after the epoch.
    assert len(keeps.explanations) == 2
    last = keeps.explanations[-1]
    assert last.targets.tolist()[: len(project.targets)] == project.targets
    assert last.maps.isfinite().all()
    assert bool(last.blank.any()) == project.faint, last.blank
    loader = project.data.get("val_dataloaders") or project.data["datamodule"].val_dataloader()
    batch = next(iter(loader))
    project.module.eval()
    with torch.no_grad():
        wanted = project.scores(project.module, copy.copy(batch))
    torch.testing.assert_close(last.chances, wanted, rtol=1e-3, atol=1e-4)
    run = monitor._run
    assert run is not None
    assert run.adapter is not None
    assert project.says in run.adapter.description
    assert len(project.settings) <= 1
