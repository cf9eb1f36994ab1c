"""Explain one photo with several methods, and say which map the network agrees with most.

    python examples/compare_methods.py PHOTO [--weights resnet50.pth] [--target-class 281]

The same from the shell, for any number of photos: lightning-aop compare PHOTO --methods all
"""

import argparse
from pathlib import Path

import torch
import torchvision
from torchvision.transforms import v2

from lightning_aop import AOP, EMP, GradCAM, RandomMap, SaliencyMethod, fast_sigcam
from lightning_aop.attribution import integrated_gradients
from lightning_aop.metrics import auc, deletion_insertion_curves
from lightning_aop.probing import count_evaluations
from lightning_aop.rendering import map_table, write_png

METHODS: dict[str, SaliencyMethod] = {
    "GradCAM": GradCAM(),
    "integrated gradients": integrated_gradients(steps=20),
    "GradCAM + EMP": AOP(GradCAM(), EMP(iterations=100)),
    "fast SIGCAM": fast_sigcam(),
    "random": RandomMap(),
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("photo", type=Path)
    add("--model", default="resnet50", help="a torchvision classifier by name")
    add("--weights", type=Path, help="its state_dict; default: the published weights")
    add("--target-class", type=int, help="an index; default: the likeliest class")
    add("--output", type=Path, default=Path("methods.png"))
    return parser.parse_args()


def main() -> None:
    """Explain, judge and draw."""
    o = options()
    model = torchvision.models.get_model(o.model, weights=None if o.weights else "DEFAULT")
    if o.weights:
        model.load_state_dict(torch.load(o.weights, map_location="cpu"))
    transform = v2.Compose(
        [
            v2.Resize(256),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    image = transform(torchvision.io.decode_image(str(o.photo), mode="RGB"))[None]
    with torch.no_grad():
        scores = model.eval()(image).softmax(dim=1)[0]
    chosen = int(scores.argmax()) if o.target_class is None else o.target_class
    target = torch.tensor([chosen])

    maps, captions, names = [], [], []
    for name, method in METHODS.items():
        with count_evaluations(model) as count:
            found = method.explain(model, image, target)
        curves = deletion_insertion_curves(model, image, found, target, steps=28)
        deletion, insertion = (float(auc(curve)) for curve in curves)
        print(f"{name:<21} over-all AUC {insertion - deletion:6.3f}   {count.total} evaluations")
        maps.append(found[0])
        names.append(f"{name}\n{count.total} evaluations")
        captions.append(f"over-all {insertion - deletion:.2f}")
    heading = f"class {chosen}: {float(scores[chosen]):.2f}"
    write_png(map_table(image, [maps], names, [captions], [heading], mean=MEAN, std=STD), o.output)
    print(f"wrote {o.output}")


if __name__ == "__main__":
    main()
