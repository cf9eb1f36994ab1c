"""`lightning-aop explain`: show where in a photo a torchvision classifier sees a class."""

import sys
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from jsonargparse import ArgumentParser, Namespace
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

from lightning_aop.errors import CommandError
from lightning_aop.methods import METHODS
from lightning_aop.metrics import Faithfulness
from lightning_aop.probing import Evaluations, count_evaluations, predict
from lightning_aop.rendering import heatmap_grid, write_png
from lightning_aop.scores import softmax
from lightning_aop.types import Images


def explain_parser() -> ArgumentParser:
    """Return the options of `lightning-aop explain`."""
    parser = ArgumentParser(
        prog="lightning-aop explain",
        description="Show where in a photo a torchvision classifier sees a class. Writes one picture "
        "with every photo beside its heatmap, and prints how faithful each map is.",
    )
    add = parser.add_argument
    add("photos", nargs="+", type=Path, metavar="PHOTO", help="picture files")
    add("--model", default="resnet50", help="a torchvision classifier by name")
    add("--weights", type=Path | None, help="a local state_dict; default: the published weights")
    add("--method", default="sigcam", choices=list(METHODS), help="how to explain")
    add("--target-class", nargs="+", help="index or name; default: the likeliest class")
    add("--target-layer", type=str | None, help="by name; default: the last feature map")
    add("--fit", choices=["crop", "squash"], default="crop", help="how a photo becomes square")
    add("--size", type=int | None, help="pixels; default: what the model was published with")
    add("--mean", nargs=3, type=float, help="normalisation; default: the published weights'")
    add("--std", nargs=3, type=float, help="normalisation; default: the published weights'")
    add("--device", default="auto", help="cpu, cuda, cuda:1, …")
    add("-o", "--output", type=Path, default=Path("explanation.png"), help="the picture to write")
    return parser


@dataclass(frozen=True)
class Recipe:
    """A model with what it wants of a photo."""

    model: nn.Module
    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]

    def read(self, photo: Path, fit: str) -> Images:
        """Return the photo as a batch of one, the right way up and normalised."""
        try:
            with Image.open(photo) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise CommandError(f"{photo}: no readable picture ({error})") from error
        shape = (
            [v2.Resize((self.size, self.size))]
            if fit == "squash"
            else [v2.Resize(self.resize), v2.CenterCrop(self.size)]
        )
        transform = v2.Compose(
            [
                v2.ToImage(),
                *shape,
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.mean, self.std),
            ]
        )
        return cast("Tensor", transform(picture))[None].as_subclass(Tensor)

    def class_index(self, name: str) -> int:
        """Return the class that a user means by an index or a name."""
        if name.isdigit():
            if int(name) < len(self.classes):
                return int(name)
            raise CommandError(
                f"--target-class {name}: the model has classes 0..{len(self.classes) - 1}"
            )
        wanted = name.lower().replace("_", " ")
        exact = [i for i, c in enumerate(self.classes) if c.lower() == wanted]
        partly = [i for i, c in enumerate(self.classes) if wanted in c.lower()]
        found = exact[:1] or partly
        if len(found) == 1:
            return found[0]
        some = ", ".join(f"{i} {self.classes[i]}" for i in found[:5])
        raise CommandError(
            f"--target-class {name}: "
            + (
                f"could be {some}; give the index"
                if found
                else "no class of the model has this name"
            )
        )


def explain(options: Namespace) -> int:
    """Explain photos; one that can't be read is named and left out."""
    recipe = load(options)
    chosen = [recipe.class_index(name) for name in options.target_class or []]
    method = METHODS[options.method](options.target_layer, softmax)
    device = next(recipe.model.parameters()).device
    failures = 0
    pictures: list[Tensor] = []
    maps: list[Tensor] = []
    captions: list[str] = []
    with _progress(recipe.model, len(options.photos) * max(len(chosen), 1)) as bar:
        for photo in options.photos:
            try:
                images = recipe.read(photo, options.fit).to(device)
            except CommandError as error:
                bar.write(f"lightning-aop: {error}", file=sys.stderr)
                bar.update(max(len(chosen), 1))
                failures += 1
                continue
            probabilities = predict(recipe.model, images).softmax(dim=1)[0]
            targets = torch.tensor(chosen or [int(probabilities.argmax())], device=device)
            images = images.repeat(len(targets), 1, 1, 1)
            found = method.explain(recipe.model, images, targets)
            for target, image, found_map in zip(targets, images, found, strict=True):
                judge = Faithfulness(steps=28)
                judge.update(recipe.model, image[None], found_map[None], target[None])
                auc = {name: float(value) for name, value in judge.to("cpu").compute().items()}
                label = f"{recipe.classes[int(target)]} {float(probabilities[target]):.2f}"
                captions.append(f"{label}\nover-all AUC {auc['overall_auc']:.2f}")
                bar.write(
                    f"{photo}: {label}, deletion {auc['deletion_auc']:.3f}, "
                    f"insertion {auc['insertion_auc']:.3f}, over-all {auc['overall_auc']:.3f}"
                )
            pictures.append(images.cpu())
            maps.append(found.cpu())
            bar.update(len(targets))
            # After every photo, so that an interrupted run leaves what it has.
            grid = heatmap_grid(
                torch.cat(pictures),
                torch.cat(maps),
                captions,
                title=f"{options.model} · {options.method}",
                mean=recipe.mean,
                std=recipe.std,
            )
            write_png(grid, options.output)
    if pictures:
        print(f"wrote {options.output}")
    return 1 if failures else 0


@contextmanager
def _progress(model: nn.Module, total: int) -> Iterator[Any]:
    """Show a bar of explanations, with the model evaluations that they have cost so far."""
    with tqdm(total=total, unit="map", dynamic_ncols=True) as bar:

        def show(count: Evaluations) -> None:
            bar.set_postfix_str(f"{count.total} model evaluations", refresh=False)
            bar.update(0)

        with count_evaluations(model, show):
            yield bar


def load(options: Namespace) -> Recipe:
    """Build the model, with published or local weights, and say what it wants of a photo."""
    name, file = options.model, options.weights
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise CommandError(
            f"--model {name}: torchvision has no classifier of this name; it has resnet50, "
            "mobilenet_v3_large, efficientnet_b0, … (torchvision.models.list_models())"
        )
    published = torchvision.models.get_model_weights(name).DEFAULT
    wants = published.transforms()
    if file is None:
        try:
            model = torchvision.models.get_model(name, weights=published)
        except (urllib.error.URLError, OSError) as error:
            raise CommandError(
                f"--model {name}: its published weights could not be downloaded ({error}); give a "
                "local file with --weights"
            ) from error
        classes = list(published.meta["categories"])
    else:
        model, classes = _from_file(name, file, list(published.meta["categories"]))
    size = options.size or wants.crop_size[0]
    return Recipe(
        model.eval().to(_device(options.device)),
        size,
        resize=round(size * wants.resize_size[0] / wants.crop_size[0]),
        mean=tuple(options.mean or wants.mean),
        std=tuple(options.std or wants.std),
        classes=classes,
    )


def _from_file(name: str, file: Path, imagenet: list[str]) -> tuple[nn.Module, list[str]]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CommandError(f"--weights {file}: no such file") from error
    except Exception as error:
        raise CommandError(
            f"--weights {file}: no state_dict can be read from it ({error})"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CommandError(f"--weights {file}: holds no state_dict of tensors")
    classes = len(list(state.values())[-1])
    extra: dict[str, Any] = (
        # Their own initialisation takes minutes and is overwritten.
        {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    )
    try:
        model = torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(
            f"--weights {file}: these are no weights of {name} ({reason}); name their architecture "
            "with --model"
        ) from error
    return model, imagenet if classes == len(imagenet) else [f"class {i}" for i in range(classes)]


def _device(name: str) -> torch.device:
    try:
        if name == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {name}: not to be had here ({error})") from error
