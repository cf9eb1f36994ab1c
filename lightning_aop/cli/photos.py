"""What the commands on photos share: finding and reading photos, building the model, the bar."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jsonargparse import Namespace
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

from lightning_aop import scores
from lightning_aop.cli.options import SUFFIXES
from lightning_aop.data.classes import class_index, read_classes
from lightning_aop.data.hub import is_hub, load_hub
from lightning_aop.data.images import ImageError, ValueRange, middle, read_image
from lightning_aop.data.networks import load_classifier, published_input, trained_input
from lightning_aop.errors import UserError, did_you_mean, did_you_mean_file
from lightning_aop.model.adapter import predict
from lightning_aop.model.layers import named_layer
from lightning_aop.model.passes import Evaluations, count_evaluations
from lightning_aop.scores import Score, of_all_classes
from lightning_aop.types import Images, Targets


def found_photos(options: Namespace) -> list[Path]:
    """Return the photos that the words name: files, what folders and patterns hold, `-` for stdin.

    Raises:
        UserError: a folder or a pattern holds none, or no file is there at all.
    """
    photos: list[Path] = []
    for word in options.photos:
        if re.match("https?:/", str(word)):
            raise UserError(
                f"{word}: it is an address, and nothing is downloaded: save the photo, or name it - and "
                "pipe it in"
            )
        if word.is_dir():
            entries = sorted(word.iterdir())
            inside = [entry for entry in entries if entry.name.lower().endswith(SUFFIXES)]
            if not inside:
                raise UserError(f"{word}: the folder holds no images ({', '.join(SUFFIXES)})")
            photos += inside
        elif not word.exists() and any(letter in str(word) for letter in "*?["):
            matching = [Path(name) for name in sorted(glob(str(word), recursive=True))]
            if not matching:
                raise UserError(f"{word}: no file has such a name")
            photos += matching
        else:
            photos.append(word)
    if not any(photo == _STDIN or photo.is_file() for photo in photos):
        # Before the network is made, which may be downloaded.
        missing = "it is not a file" if photos[0].exists() else "the file is missing"
        raise UserError(f"{photos[0]}: {missing}{did_you_mean_file(photos[0])}")
    return photos


_STDIN = Path("-")


class Label(NamedTuple):
    """A class of a photo, and its score: the probability that the model gives it."""

    name: str
    position: int
    score: float

    def __str__(self) -> str:
        return f"{self.name} {self.score:.2f}"

    def values(self) -> dict[str, Any]:
        """Return what --json prints of it."""
        return {"class": self.name, "class_index": self.position, "score": self.score}


@dataclass(frozen=True)
class Recipe:
    """A model with what it wants of a photo."""

    model: nn.Module
    size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]
    score_name: str
    value_range: ValueRange | None = None

    @property
    def score(self) -> Score:
        """The class score that is explained and shown, a probability."""
        score: Score = getattr(scores, self.score_name)
        return score

    def read(self, photo: Path, fit: str) -> Images:
        """Return the photo as a batch of one, upright and normalised."""
        try:
            file = BytesIO(sys.stdin.buffer.read()) if photo == _STDIN else photo
            image = read_image(file, value_range=self.value_range)
        except ImageError as error:
            raise UserError(f"{photo}: {error}") from error
        if (frames := image.info["frames"]) > 1:
            tqdm.write(f"{photo}: the first of its {frames} frames is shown", file=sys.stderr)
        bilinear = v2.InterpolationMode.BILINEAR
        shape = (
            v2.Resize((self.size, self.size))
            if fit == "squash"
            else v2.Lambda(lambda whole: middle(whole, self.size, self.resize, bilinear), Tensor)
        )
        transform = v2.Compose(
            [
                v2.ToImage(),
                shape,
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.mean, self.std),
            ]
        )
        return cast("Tensor", transform(image))[None].as_subclass(Tensor)

    def pairs(
        self, photo: Path, fit: str, classes: Sequence[int]
    ) -> tuple[Images, Targets, list[Label]]:
        """Return the photo once for each class, or for its likeliest one, with names and scores."""
        image = self.read(photo, fit).to(next(self.model.parameters()).device)
        try:
            probabilities = of_all_classes(self.score, predict(self.model, image))[0].cpu()
        except (RuntimeError, AssertionError, ValueError) as error:
            # A CNN's pooling says "size"; ViTs that want one size alone assert the height.
            if isinstance(error, UserError) or not re.search("size|height|width", str(error)):
                raise
            raise UserError(
                f"--size {self.size}: too small or otherwise unfit for the model, which was published "
                f"with larger images ({str(error).splitlines()[0]})"
            ) from error
        chosen = list(classes) or [int(probabilities.argmax())]
        labels = [Label(self.classes[c], c, float(probabilities[c])) for c in chosen]
        targets = torch.tensor(chosen, device=image.device)
        return image.repeat(len(chosen), 1, 1, 1), targets, labels

    def class_index(self, name: str) -> int:
        """Return the class that a user means by an index or a name."""
        if name.removeprefix("-").isdecimal():
            if 0 <= int(name) < len(self.classes):
                return int(name)
            raise UserError(
                f"--target-class {name}: the model has classes 0..{len(self.classes) - 1}"
            )
        if (index := class_index(name, self.classes)) is not None:
            return index
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
    labels: list[Label]
    photos: list[Path]


def each_photo(
    recipe: Recipe, options: Namespace, classes: Sequence[int]
) -> Iterator[tuple[Path, Images, Targets, list[Label]]]:
    """Yield each photo as `Recipe.pairs` gives it; one that can't be read is named and left out."""
    for photo in options.photos:
        try:
            found = recipe.pairs(photo, options.fit, classes)
        except UserError as error:
            tqdm.write(f"lightning-aop: {error}", file=sys.stderr)
            continue
        yield photo, *found


def read_pairs(recipe: Recipe, options: Namespace) -> tuple[Pairs | None, int]:
    """Return all photos with their classes, or None without any, and how many can't be read."""
    classes = [recipe.class_index(name) for name in options.target_class or []]
    read = list(each_photo(recipe, options, classes))
    failures = len(options.photos) - len(read)
    if not read:
        return None, failures
    photos, images, targets, labels = zip(*read, strict=True)
    return Pairs(
        torch.cat(images),
        torch.cat(targets),
        [label for names in labels for label in names],
        [photo for photo, names in zip(photos, labels, strict=True) for _ in names],
    ), failures


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar that says how many maps are left, and how long they take once there is a first."""

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return what the bar's format may name."""
        values = dict(super().format_dict)
        left = values["total"] - values["n"]
        values["left"] = f"{left} map{'' if left == 1 else 's'} left"
        return values

    def update(self, n: float | None = 1) -> bool | None:
        """Count maps."""
        if n:
            self.bar_format = _BAR + ", about {remaining}" + _SPENT
        return super().update(n)


_BAR = "{desc}{bar:20} {left}"
_SPENT = ", {elapsed} so far{postfix}"


@contextmanager
def progress(model: nn.Module, total: int) -> Iterator[Any]:
    """Show a bar of explanations, with the model evaluations that they have cost so far."""
    with _Bar(total=total, dynamic_ncols=True, bar_format="{desc}{left}" + _SPENT) as bar:

        def show(count: Evaluations) -> None:
            bar.set_postfix_str(f"{count.total} model evaluations", refresh=False)
            bar.update(0)

        with count_evaluations(model, show):
            yield bar


def load(options: Namespace) -> Recipe:
    """Build the model, with published or local weights, and say what it wants of a photo.

    Replaces the photos of the options by the files that they name, and what is left open of `--fit`:
    all that can be checked is, before the network is loaded.
    """
    options.photos = found_photos(options)
    names = None if options.classes is None else read_classes(options.classes)
    mean, std = _normalisation(options)
    if options.range and not options.range[0] < options.range[1]:
        raise UserError(
            f"--range {' '.join(f'{v:g}' for v in options.range)}: must be two numbers, the lower first"
        )
    with redirect_stdout(sys.stderr):  # where torch says what it downloads: results go to stdout
        if is_hub(options.model):
            model, classes, multilabel, wants = load_hub(options.model, options.weights)
        else:
            weights = "DEFAULT" if options.weights is None else str(options.weights)
            model, classes, multilabel = load_classifier(options.model, weights)
            wants = trained_input(weights) or published_input(options.model, model)
    options.fit = options.fit or wants.fit
    if names is not None and len(names) != len(classes):
        raise UserError(
            f"--classes {options.classes}: holds {len(names)} names, where {options.model} has "
            f"{len(classes)} classes"
        )
    if options.target_layer is not None:
        named_layer(model, options.target_layer)  # once, and not for each method of several
    size = options.size or wants.size
    return Recipe(
        model.eval().to(_device(options.device)),
        size,
        resize=round(size * wants.resize / wants.size),
        mean=mean or wants.mean,
        std=std or wants.std,
        classes=names or classes,
        score_name=_score(options.score, multilabel, len(classes)),
        value_range=options.range and tuple(options.range),
    )


def _score(chosen: str | None, multilabel: bool, classes: int) -> str:
    """Return the name of the class score: what is chosen, or what the model was trained for."""
    if classes == 1 and chosen == "softmax":
        raise UserError(
            "--score softmax: the model has one class, whose softmax is always 1: use --score sigmoid, "
            "or leave it out"
        )
    if chosen is None and (multilabel or classes == 1):
        why = "the model is multilabel" if multilabel else "the model has one class"
        print(f"scores are sigmoid, each class on its own, since {why}", file=sys.stderr)
        return "sigmoid"
    return chosen or "softmax"


def _normalisation(options: Namespace) -> list[tuple[float, ...] | None]:
    """Return --mean and --std for values up to 1; numbers above 1 are for values up to 255."""
    given: dict[str, list[float]] = {}
    for name in ("mean", "std"):
        values = options[name]
        if values is None:
            continue
        if len(values) not in (1, 3) or (name == "std" and min(values) <= 0):
            raise UserError(
                f"--{name} {' '.join(map(str, values))}: must be one number or three, for red, green "
                f"and blue{', above 0' if name == 'std' else ''}"
            )
        given[name] = values * 3 if len(values) == 1 else values
    bytes_meant = any(abs(value) > 1 for values in given.values() for value in values)
    if bytes_meant:
        words = " ".join(f"--{k} {' '.join(f'{v:g}' for v in vs)}" for k, vs in given.items())
        print(f"{words}: taken for values from 0 to 255", file=sys.stderr)
    scale = 255 if bytes_meant else 1
    return [
        tuple(value / scale for value in given[name]) if name in given else None
        for name in ("mean", "std")
    ]


def _device(name: str) -> torch.device:
    try:
        if name == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        value = torch.zeros(1, device=name)
        value.item()  # on meta nothing is computed
        return value.device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} is not available on this machine ({error}): use --device cpu, or leave "
            "--device out to take a GPU where there is one"
        ) from error
