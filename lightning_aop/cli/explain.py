"""`lightning-aop explain`: show where in a photo a classifier sees a class."""

import json
import sys
from pathlib import Path

import torch
from jsonargparse import Namespace
from torch import Tensor

from lightning_aop.cli.output import (
    RASTER,
    VECTOR,
    check_output,
    figure_of,
    write_figure,
    write_picture,
)
from lightning_aop.cli.photos import Label, Recipe, each_photo, found_photos, load, progress
from lightning_aop.methods.names import make_method
from lightning_aop.metrics import auc, deletion_insertion_curves
from lightning_aop.tables import decimals
from lightning_aop.types import Images, Maps
from lightning_aop.view.grid import heatmap_grid
from lightning_aop.view.heat import displayable


def main(options: Namespace) -> int:
    """Explain photos; one that can't be read is named and left out."""
    make_method(options.method, option="--method")  # refused before the network is loaded
    check_output(options.output, RASTER + VECTOR, found_photos(options))
    recipe = load(options)
    method = make_method(options.method, options.target_layer, recipe.score)
    chosen = [recipe.class_index(name) for name in options.target_class or []]
    pictures: list[Tensor] = []
    maps: list[Tensor] = []
    captions: list[str] = []
    with progress(recipe.model, len(options.photos) * max(len(chosen), 1)) as bar:
        for photo, images, targets, labels in each_photo(recipe, options, chosen):
            found = method.explain(recipe.model, images, targets)
            curves = deletion_insertion_curves(
                recipe.model, images, found, targets, steps=28, score=recipe.score
            )
            lines = []
            for label, deletion, insertion in zip(
                labels, *(auc(curve).tolist() for curve in curves), strict=True
            ):
                captions.append(f"{label}\noverall AUC {decimals(insertion - deletion)}")
                lines.append(_line(options, recipe, photo, label, deletion, insertion))
            pictures.append(images.cpu())
            maps.append(found.cpu())
            bar.update(len(targets))
            # After every photo, so that an interrupted run leaves what it has.
            _draw(options, recipe, torch.cat(pictures), torch.cat(maps), captions)
            bar.write("\n".join(lines))
    if pictures:
        print(f"wrote {options.output}", file=sys.stderr if options.json else sys.stdout)
    return 1 if len(pictures) < len(options.photos) else 0


def _draw(
    options: Namespace, recipe: Recipe, images: Images, maps: Maps, captions: list[str]
) -> None:
    title = f"{options.model} · {options.method}\n{recipe.score_name} score"
    mean, std = recipe.mean, recipe.std
    if options.output.suffix.lower() in VECTOR:
        shown = displayable(images, mean, std)
        write_figure(figure_of(shown, maps, captions, title), options.output)
        return
    grid = heatmap_grid(images, maps, captions, title=title, mean=mean, std=std)
    write_picture(grid, options.output)


def _line(
    options: Namespace,
    recipe: Recipe,
    photo: Path,
    label: Label,
    deletion: float,
    insertion: float,
) -> str:
    overall = insertion - deletion
    if not options.json:
        return (
            f"{photo}: {label}, deletion {deletion:.3f}, insertion {insertion:.3f}, "
            f"overall {decimals(overall, 3)}"
        )
    metrics = {"deletion_auc": deletion, "insertion_auc": insertion, "overall_auc": overall}
    made = {"method": options.method, "model": options.model, "picture": str(options.output)}
    score = {"score_function": recipe.score_name}
    return json.dumps({"photo": str(photo), **label.values(), **score, **metrics, **made})
