"""A network of timm, and which of its layers to look at.

python examples/timm_model.py --name resnet18
python examples/timm_model.py --name convnext_tiny --pretrained true    # needs the internet once
"""

from pathlib import Path

import pytorch_lightning as pl
import timm
import torch
from common import Classifier, Shapes, loaders
from jsonargparse import auto_cli

from lightning_aop import GradCAM, LayerCAM, SaliencyMethod, fast_sigcam
from lightning_aop.metrics import OverallAUC
from lightning_aop.model import find_target_layer
from lightning_aop.view import map_table, write_png


def main(
    name: str = "resnet18",
    pretrained: bool = False,
    epochs: int = 2,
    pictures: int = 600,
    output: Path = Path("runs/timm_model.png"),
) -> None:
    """Train it a little, then explain the same images with three methods."""
    pl.seed_everything(0)
    network = timm.create_model(name, pretrained=pretrained, num_classes=3)
    trainer = pl.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(network, learning_rate=5e-4), *loaders(pictures))

    test = Shapes(4, seed=2)
    layer = find_target_layer(network, test.pictures)
    print(f"the last feature map before the classifier is that of {layer!r}")
    maps, captions = [], []
    methods: dict[str, SaliencyMethod] = {
        "GradCAM": GradCAM(),
        "LayerCAM": LayerCAM(),
        "fast_sigcam": fast_sigcam(),
    }
    for method in methods.values():
        maps.append(method.explain(network, test.pictures, test.labels))
        metric = OverallAUC(steps=28)
        areas = []
        for row in range(len(test)):
            metric.reset()
            metric.update(network, test.pictures[[row]], maps[-1][[row]], test.labels[[row]])
            areas.append(f"overall AUC {float(metric.compute()):.2f}")
        captions.append(areas)
    table = map_table(
        test.pictures,
        [list(row) for row in torch.stack(maps, dim=1)],
        list(methods),
        [list(row) for row in zip(*captions, strict=True)],
        [Shapes.classes[int(label)] for label in test.labels],
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_png(table, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    auto_cli(main)
