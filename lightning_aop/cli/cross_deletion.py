"""`lightning-aop cross-deletion`: blur one class away, and watch another (the paper's Figure 1)."""

from pathlib import Path

import matplotlib
import torch
from jaxtyping import Float
from jsonargparse import Namespace
from matplotlib.figure import Figure
from torch import Tensor

from lightning_aop.cli.output import FIGURE, check_output, write_figure
from lightning_aop.cli.photos import Label, each_photo, found_photos, load, progress
from lightning_aop.errors import UserError
from lightning_aop.methods.names import make_method
from lightning_aop.metrics import deletion_curve
from lightning_aop.types import Images, Maps
from lightning_aop.view.heat import displayable, overlay

_COLOURS = ("#c44536", "#2a6f97")


def main(options: Namespace) -> int:
    """Explain the first class of each photo, and judge its map by both classes' scores.

    A photo that can't be read is named and left out.
    """
    if options.target_class is None or len(options.target_class) != 2:
        raise UserError(
            "cross-deletion: name two classes: --target-class REMOVED WATCHED, by index or name"
        )
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: must be 1 or more")
    check_output(options.output, FIGURE, found_photos(options))
    make_method(options.method, option="--method")  # refused before the network is loaded
    recipe = load(options)
    method = make_method(options.method, options.target_layer, recipe.score)
    classes = [recipe.class_index(name) for name in options.target_class]
    pictures, found, curves, labels = [], [], [], []
    with progress(recipe.model, len(options.photos)) as bar:
        for photo, images, targets, names in each_photo(recipe, options, classes):
            maps = method.explain(recipe.model, images[:1], targets[:1])
            both = maps.expand(2, -1, -1)
            curve = deletion_curve(
                recipe.model, images, both, targets, steps=options.steps, score=recipe.score
            ).cpu()
            for name, scores in zip(names, curve, strict=True):
                bar.write(
                    f"{photo}: {name}, mean score over the deletion {float(scores.mean()):.3f}"
                )
            pictures.append(displayable(images[:1].cpu(), recipe.mean, recipe.std))
            found.append(maps.cpu())
            curves.append(curve)
            labels.append(names)
            bar.update()
    if pictures:
        score = f"{recipe.score_name} score"
        _draw(torch.cat(pictures), torch.cat(found), curves, labels, score, options.output)
        print(f"wrote {options.output}")
    return 1 if len(pictures) < len(options.photos) else 0


@matplotlib.rc_context({"text.parse_math": False})  # a $ in a name begins no formula
def _draw(
    pictures: Images,
    maps: Maps,
    curves: list[Float[Tensor, "2 points"]],
    labels: list[list[Label]],
    score: str,
    path: Path,
) -> None:
    figure = Figure(figsize=(9, 2.7 * len(pictures)), layout="constrained", dpi=150)
    axes = figure.subplots(len(pictures), 3, squeeze=False, width_ratios=(1, 1, 1.5))
    heated = overlay(pictures, maps)
    for row, picture, heat, pair, names in zip(axes, pictures, heated, curves, labels, strict=True):
        row[0].imshow(picture.permute(1, 2, 0).numpy())
        row[1].imshow(heat.permute(1, 2, 0).numpy())
        row[1].set_title(f"map of {names[0].name}", fontsize=9)
        for axis in row[:2]:
            axis.set_axis_off()
        moved = torch.linspace(0, 100, pair.shape[1]).numpy()
        for curve, name, colour in zip(pair, names, _COLOURS, strict=True):
            row[2].plot(moved, curve.numpy(), color=colour, label=str(name), lw=1.8)
        row[2].set(xlim=(0, 100), ylim=(0, None), ylabel=score)
        row[2].spines[["top", "right"]].set_visible(False)
        row[2].legend(frameon=False, fontsize=8)
    axes[-1, 2].set_xlabel(
        "pixels blurred, most salient of the first class first (%)", fontsize=8.5
    )
    write_figure(figure, path)
