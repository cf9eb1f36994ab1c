"""What the commands on photos share: their options, reading a photo, building the model, the bar."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

from lightning_aop.data.images import ImageError, ValueRange, read_image
from lightning_aop.data.networks import load_classifier, published_input
from lightning_aop.errors import UserError, did_you_mean
from lightning_aop.model.adapter import predict
from lightning_aop.model.passes import Evaluations, count_evaluations
from lightning_aop.types import Images, Targets


def photo_options(parser: ArgumentParser) -> None:
    """Add the options that say which photos, which model, and how the one becomes input of the other."""
    add = parser.add_argument
    add("photos", nargs="+", type=Path, metavar="PHOTO", help="image files")
    add("--model", default="resnet50", help="a torchvision classifier, or timm/NAME")
    add("--weights", type=Path | None, help="a local file; default: the published weights")
    add("--target-class", nargs="+", help="index or name; default: the likeliest class")
    add("--target-layer", type=str | None, help="by name; default: the last feature map")
    add("--fit", choices=["crop", "squash"], default="crop", help="how a photo becomes square")
    add(
        "--size", type=PositiveInt | None, help="pixels; default: what the model was published with"
    )
    add("--mean", nargs=3, type=float, help="normalisation; default: the published weights'")
    add("--std", nargs=3, type=float, help="normalisation; default: the published weights'")
    add(
        "--range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="values shown black and white, for greyscale photos of more than 8 bits; default: 0 65535",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1, …")


def photos_first(words: Sequence[str]) -> list[str]:
    """Put photos first that follow an option with several values, which would take them for its own.

    `--target-class 281 cat.jpg` means the photo cat.jpg.
    """
    photos: list[str] = []
    others: list[str] = []
    several = False
    for word in words:
        if word.startswith("-"):
            several = word in ("--target-class", "--methods", "--layers")
        is_photo = several and word.lower().endswith(IMG_EXTENSIONS)
        (photos if is_photo else others).append(word)
    return photos + others


@dataclass(frozen=True)
class Recipe:
    """A model with what it wants of a photo."""

    model: nn.Module
    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]
    value_range: ValueRange | None = None

    def read(self, photo: Path, fit: str) -> Images:
        """Return the photo as a batch of one, upright and normalised."""
        try:
            image = read_image(photo, value_range=self.value_range)
        except ImageError as error:
            raise UserError(f"{photo}: {error}") from error
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
        return cast("Tensor", transform(image))[None].as_subclass(Tensor)

    def pairs(
        self, photo: Path, fit: str, classes: Sequence[int]
    ) -> tuple[Images, Targets, list[str]]:
        """Return the photo once for each class, or for its likeliest one, with names and scores."""
        image = self.read(photo, fit).to(next(self.model.parameters()).device)
        try:
            probabilities = predict(self.model, image).softmax(dim=1)[0].cpu()
        except RuntimeError as error:
            if "size" not in str(error):
                raise
            raise UserError(
                f"--size {self.size}: too small or otherwise unfit for the model, which was published "
                f"with larger images ({str(error).splitlines()[0]})"
            ) from error
        chosen = list(classes) or [int(probabilities.argmax())]
        labels = [f"{self.classes[c]} {float(probabilities[c]):.2f}" for c in chosen]
        targets = torch.tensor(chosen, device=image.device)
        return image.repeat(len(chosen), 1, 1, 1), targets, labels

    def class_index(self, name: str) -> int:
        """Return the class that a user means by an index or a name."""
        if name.isdigit():
            if int(name) < len(self.classes):
                return int(name)
            raise UserError(
                f"--target-class {name}: the model has classes 0..{len(self.classes) - 1}"
            )
        wanted = name.lower().replace("_", " ")
        exact = [i for i, c in enumerate(self.classes) if c.lower() == wanted]
        partly = [i for i, c in enumerate(self.classes) if wanted in c.lower()]
        found = exact[:1] or partly
        if len(found) == 1:
            return found[0]
        some = ", ".join(f"{i} {self.classes[i]}" for i in found[:5])
        raise UserError(
            f"--target-class {name}: "
            + (
                f"could be {some}; give the index"
                if found
                else f"no class of the model has this name{did_you_mean(wanted, self.classes)}"
            )
        )


@dataclass(frozen=True)
class Pairs:
    """Photos with a class each, as a batch."""

    images: Images
    targets: Targets
    labels: list[str]
    photos: list[Path]


def read_pairs(recipe: Recipe, options: Namespace) -> tuple[Pairs | None, int]:
    """Return all photos with their classes, or None without any, and how many can't be read."""
    classes = [recipe.class_index(name) for name in options.target_class or []]
    images, targets, labels, photos, failures = [], [], [], [], 0
    for photo in options.photos:
        try:
            pictures, chosen, names = recipe.pairs(photo, options.fit, classes)
        except UserError as error:
            print(f"lightning-aop: {error}", file=sys.stderr)
            failures += 1
            continue
        images.append(pictures)
        targets.append(chosen)
        labels += names
        photos += [photo] * len(names)
    if not photos:
        return None, failures
    return Pairs(torch.cat(images), torch.cat(targets), labels, photos), failures


@contextmanager
def progress(model: nn.Module, total: int) -> Iterator[Any]:
    """Show a bar of explanations, with the model evaluations that they have cost so far."""
    with tqdm(total=total, unit="map", dynamic_ncols=True) as bar:

        def show(count: Evaluations) -> None:
            bar.set_postfix_str(f"{count.total} model evaluations", refresh=False)
            bar.update(0)

        with count_evaluations(model, show):
            yield bar


def load(options: Namespace) -> Recipe:
    """Build the model, with published or local weights, and say what it wants of a photo."""
    weights = "DEFAULT" if options.weights is None else str(options.weights)
    model, classes = load_classifier(options.model, weights)
    wants = published_input(options.model, model)
    size = options.size or wants.size
    return Recipe(
        model.eval().to(_device(options.device)),
        size,
        resize=round(size * wants.resize / wants.size),
        mean=tuple(options.mean or wants.mean),
        std=tuple(options.std or wants.std),
        classes=classes,
        value_range=options.range and tuple(options.range),
    )


def _device(name: str) -> torch.device:
    try:
        if name == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} is not available on this machine ({error}): use --device cpu, or leave "
            "--device out to take a GPU where there is one"
        ) from error
