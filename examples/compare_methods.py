"""Explain one photo with several methods, and say which map the network agrees with most.

    python examples/compare_methods.py PHOTO [--weights resnet50.pth] [--target_class 281]

The same from the shell, for any number of photos: lightning-aop compare PHOTO --methods all
"""

from pathlib import Path

import torch
import torchvision
from jsonargparse import auto_cli
from torchvision.transforms import v2

from lightning_aop import AOP, EMP, GradCAM, RandomMap, SaliencyMethod, fast_sigcam
from lightning_aop.methods import integrated_gradients
from lightning_aop.metrics import auc, deletion_insertion_curves
from lightning_aop.model import count_evaluations
from lightning_aop.view import map_table, write_png

METHODS: dict[str, SaliencyMethod] = {
    "GradCAM": GradCAM(),
    "integrated gradients": integrated_gradients(steps=20),
    "GradCAM + EMP": AOP(GradCAM(), EMP(iterations=100)),
    "fast SIGCAM": fast_sigcam(),
    "random": RandomMap(),
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def main(
    photo: Path,
    model: str = "resnet50",
    weights: Path | None = None,
    target_class: int | None = None,
    output: Path = Path("methods.png"),
) -> None:
    """Explain, judge and draw.

    Args:
        photo: an image file.
        model: a torchvision classifier by name.
        weights: its state_dict; by default the published weights.
        target_class: an index; by default the likeliest class.
        output: where the table of maps goes.
    """
    network = torchvision.models.get_model(model, weights=None if weights else "DEFAULT")
    if weights:
        network.load_state_dict(torch.load(weights, map_location="cpu"))
    transform = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    image = transform(torchvision.io.decode_image(str(photo), mode="RGB"))[None]
    with torch.no_grad():
        scores = network.eval()(image).softmax(dim=1)[0]
    chosen = int(scores.argmax()) if target_class is None else target_class
    target = torch.tensor([chosen])

    maps, captions, names = [], [], []
    for name, method in METHODS.items():
        with count_evaluations(network) as count:
            found = method.explain(network, image, target)
        curves = deletion_insertion_curves(network, image, found, target, steps=28)
        deletion, insertion = (float(auc(curve)) for curve in curves)
        print(f"{name:<21} overall AUC {insertion - deletion:6.3f}   {count.total} evaluations")
        maps.append(found[0])
        names.append(f"{name}\n{count.total} evaluations")
        captions.append(f"overall {insertion - deletion:.2f}")
    heading = f"class {chosen}: {float(scores[chosen]):.2f}"
    write_png(map_table(image, [maps], names, [captions], [heading], mean=MEAN, std=STD), output)
    print(f"wrote {output}")


if __name__ == "__main__":
    auto_cli(main)
