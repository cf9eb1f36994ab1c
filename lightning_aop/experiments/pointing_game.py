"""The pointing game over a whole data set, as a run that can be stopped, resumed and shared out.

Maps are brought to the size of the photo and compared with its masks there, as TorchRay does: a distance
of 15 pixels is 15 pixels of the photo, whatever the size of the network's input.

The images are cut into fixed groups. A group is explained as a whole, by whichever process gets it,
and becomes one entry of the folder; groups that have an entry are never explained again. So the results
don't depend on the number of processes, or on how often the run was stopped; but each process counts
the evaluation that finds the target layer.
"""

import hashlib
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import pytorch_lightning as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lightning_aop.coco import CocoMultilabel
from lightning_aop.coco.dataset import NoMaskError, Transform
from lightning_aop.data.digests import described, slug, update_with_weights
from lightning_aop.data.images import to_tensor
from lightning_aop.errors import InvalidValueError
from lightning_aop.experiments.groups import NOTHING, Group, group_loader, in_groups, unfinished
from lightning_aop.experiments.pictures import fingerprint
from lightning_aop.experiments.store import Store
from lightning_aop.metrics import energy_in_mask, pointing_hits
from lightning_aop.model.adapter import predict
from lightning_aop.model.passes import count_evaluations
from lightning_aop.tables import Format, formatted
from lightning_aop.types import Maps, SaliencyMethod

Mask: TypeAlias = Bool[Tensor, "1 height width"]


@dataclass(frozen=True)
class Rules:
    """What is counted.

    Attributes:
        tolerances: how far from the mask, in pixels of the photo, a maximum still hits; 0 for the
            exact pixel, 15 for TorchRay's rule.
        score_threshold: classes with a score (sigmoid) above it are tested.
        group_size: images that are explained together. Methods that draw noise draw it for a group.
        limit: the first images of the split only; None for all.
        masks: what a hit lies on: the "segmentation" of the objects, or their "box", as for VOC.
    """

    tolerances: Sequence[float] = (0, 15)
    score_threshold: float = 0.5
    group_size: int = 8
    limit: int | None = None
    masks: Literal["segmentation", "box"] = "segmentation"

    def __post_init__(self) -> None:
        if not 0 <= self.score_threshold < 1:
            raise InvalidValueError(
                f"score_threshold must lie in [0, 1), got {self.score_threshold}"
            )
        if self.group_size < 1 or (self.limit is not None and self.limit < 1):
            raise InvalidValueError(
                f"group_size and limit must be at least 1, got {self.group_size} and {self.limit}"
            )
        if self.masks not in ("segmentation", "box"):
            raise InvalidValueError(f"masks must be 'segmentation' or 'box', got {self.masks!r}")
        if not self.tolerances or min(self.tolerances) < 0:
            raise InvalidValueError(
                f"tolerances must name at least one distance of 0 or more, got {self.tolerances}"
            )


@dataclass(frozen=True)
class ClassResult:
    """The result of one class: how many pairs were tested, and the sums of what they scored."""

    tested: int
    hits: dict[str, float]
    energy: float


@dataclass(frozen=True)
class Result:
    """The result of the pointing game.

    Attributes:
        method: what explained.
        classes: by name, those with at least one tested pair.
        skipped: the number of (image, class) pairs left out, because no mask tells where the class is.
        evaluations: how many model evaluations the explanations cost.
        seconds: their wall-clock time, summed over processes.
    """

    method: str
    classes: dict[str, ClassResult]
    evaluations: int
    seconds: float
    skipped: int = 0

    @property
    def pairs(self) -> int:
        """The number of tested (image, class) pairs."""
        return sum(c.tested for c in self.classes.values())

    def accuracy(self, tolerance: float) -> float:
        """Return the mean over the tested classes of hits / (hits + misses); NaN if none was."""
        return _mean(c.hits[_key(tolerance)] / c.tested for c in self.classes.values())

    @property
    def energy(self) -> float:
        """The mean over the tested classes of the share of the heat that lies in the mask."""
        return _mean(c.energy / c.tested for c in self.classes.values())


def play(
    trainer: pl.Trainer,
    model: nn.Module,
    data: CocoMultilabel,
    method: SaliencyMethod,
    name: str,
    output: Path,
    rules: Rules,
    num_workers: int = 0,
) -> Result:
    """Run the pointing game with one method, and write the results as it goes.

    Args:
        trainer: shares the groups out to its processes.
        model: gives logits [B, K].
        data: images with labels and masks. Its transform must have the way back from the network's
            input to the photo, a method `photo_maps(maps, size)`, as `coco.Preprocess` does.
        method: how to explain.
        name: of the method, for folders and tables.
        output: a folder for the files of all runs.
        rules: what is counted.
        num_workers: processes that read images.

    Returns:
        The results of all groups, those of earlier runs included.
    """
    _on_photo(data.transform, torch.zeros(1, 1, 1), (1, 1))  # refused before hours are spent
    digest = _digest(model, data, method, rules, str(trainer.precision))
    store = Store(output / f"{slug(name)}-{digest}", ("process", "pairs", "evaluations", "seconds"))
    groups = in_groups(min(len(data), rules.limit or len(data)), rules.group_size)
    # Every process sees the same: none writes before all have come to predict().
    done = {number for number, _ in groups if store.read(_name(number)) is not None}
    missing = unfinished(groups, done, trainer.world_size)
    if missing:
        store.folder.mkdir(parents=True, exist_ok=True)
        player = _Player(model, data, method, rules, store)
        loader = group_loader(missing, _Reader(data), num_workers)
        trainer.predict(player, loader, return_predictions=False)
    entries = [store.read(_name(number)) for number, _ in groups]
    return _result(name, [entry for entry in entries if entry], data.classes, rules)


@dataclass(frozen=True)
class _Reader:
    """Reads the images and labels of a group."""

    data: CocoMultilabel

    def __call__(self, group: Group) -> tuple[int, list[int], Tensor, Tensor]:
        number, rows = group
        if not rows:
            return number, [], torch.empty(0), torch.empty(0)
        images, labels = zip(*(self.data[row] for row in rows), strict=True)
        return number, list(rows), torch.stack(images), torch.stack(labels)


class _Player(pl.LightningModule):
    """Explains groups, and keeps an entry for each."""

    def __init__(
        self,
        model: nn.Module,
        data: CocoMultilabel,
        method: SaliencyMethod,
        rules: Rules,
        store: Store,
    ) -> None:
        super().__init__()
        self.model, self.data, self.method = model, data, method
        self.rules, self.store = rules, store

    def predict_step(self, batch: tuple[int, list[int], Tensor, Tensor], batch_idx: int) -> int:
        """Explain a group, and return how many pairs were tested."""
        number, rows, images, labels = batch
        if number == NOTHING:
            return 0
        started = time.perf_counter()
        with count_evaluations(self.model) as evaluations:
            scores = predict(self.model, images).sigmoid()
            tested = (labels > 0.5) & (scores > self.rules.score_threshold)
            masks = {
                (row, target): self._mask(rows[row], target)
                for row, target in tested.nonzero().tolist()
            }
            for (row, target), mask in masks.items():
                tested[row, target] = mask is not None
            at, targets = tested.nonzero(as_tuple=True)
            pairs = []
            if len(at):
                maps = self.method.explain(self.model, images[at], targets)
                columns = torch.cat(
                    [
                        self._judged(cast("Mask", masks[row, target]), found)
                        for row, target, found in zip(
                            at.tolist(), targets.tolist(), maps.split(1), strict=True
                        )
                    ]
                )
                columns = torch.cat([columns, scores[at, targets, None].to(columns)], dim=1)
                for row, target, values in zip(
                    at.tolist(), targets.tolist(), columns.tolist(), strict=True
                ):
                    *hits, energy, score = values
                    pairs.append(
                        {
                            "image": self.data.ids[rows[row]],
                            "class": target,
                            "score": round(score, 6),
                            "hits": dict(zip(map(_key, self.rules.tolerances), hits, strict=True)),
                            "energy": round(energy, 9),
                        }
                    )
        entry = {
            "process": self.global_rank,
            "pairs": pairs,
            "skipped": sum(mask is None for mask in masks.values()),
            "evaluations": evaluations.total,
            "seconds": round(time.perf_counter() - started, 3),
        }
        self.store.write(_name(number), entry)
        return len(pairs)

    def _mask(self, row: int, target: int) -> Mask | None:
        """Return where a class is on a photo; None where nothing tells."""
        try:
            masks = self.data.masks(row, [target], boxes=self.rules.masks == "box")
        except InvalidValueError as error:
            if isinstance(error, NoMaskError) or self.data.on_error == "skip":
                return None
            raise
        return torch.from_numpy(masks) if masks.any() else None

    def _judged(self, mask: Mask, found: Maps) -> Float[Tensor, "1 values"]:
        """Return what one map scores: its hits, and the share of its heat in the mask.

        Photos differ in size, and are judged one by one.
        """
        found = found.cpu() if found.device.type == "mps" else found  # MPS has no float64
        mask = mask.to(found.device)
        found = _on_photo(self.data.transform, found, (mask.shape[1], mask.shape[2]))
        values = [pointing_hits(found, mask, t).double() for t in self.rules.tolerances]
        return torch.stack([*values, energy_in_mask(found, mask).double()], dim=1)

    def on_predict_end(self) -> None:
        """Wait for the other processes, whose entries are read next."""
        self.trainer.strategy.barrier()


def _on_photo(
    transform: Transform, maps: Maps, size: tuple[int, int]
) -> Float[Tensor, "b height width"]:
    """Return maps of the network's input at the photo's own size, where pixels are counted.

    Raises:
        ValueError: the transform has no way back.
    """
    if transform is to_tensor:
        return maps
    back = getattr(transform, "photo_maps", None)
    if back is None:
        raise InvalidValueError(
            f"no map can be brought back to the photo's own size through {transform!r}: give it a "
            "method photo_maps(maps [B, H, W], (height, width)) -> maps [B, height, width], or take "
            "coco.Preprocess"
        )
    placed: Tensor = back(maps, size)
    return placed


def _name(group: int) -> str:
    return f"group-{group:06d}"


def _result(
    name: str, groups: Sequence[dict[str, Any]], classes: Sequence[str], rules: Rules
) -> Result:
    by_class: dict[int, list[dict[str, Any]]] = {}
    for group in groups:
        for pair in group["pairs"]:
            by_class.setdefault(pair["class"], []).append(pair)
    results = {
        classes[index]: ClassResult(
            tested=len(pairs),
            hits={
                key: math.fsum(p["hits"][key] for p in pairs) for key in map(_key, rules.tolerances)
            },
            energy=math.fsum(p["energy"] for p in pairs),
        )
        for index, pairs in sorted(by_class.items())
    }
    return Result(
        method=name,
        classes=results,
        evaluations=sum(group["evaluations"] for group in groups),
        seconds=sum(group["seconds"] for group in groups),
        skipped=sum(group.get("skipped", 0) for group in groups),
    )


def table(results: Sequence[Result], tolerances: Sequence[float], form: Format = "markdown") -> str:
    """Return the results as a table, a row for each method."""
    names = ["exact" if t <= 1 else f"within {t:g} px" for t in tolerances]
    header = ["method", *names, "energy in mask", "classes", "pairs", "evaluations", "seconds"]
    rows = [
        [
            result.method,
            *(_percent(result.accuracy(t)) for t in tolerances),
            _percent(result.energy),
            str(len(result.classes)),
            str(result.pairs),
            str(result.evaluations),
            f"{result.seconds:.0f}",
        ]
        for result in results
    ]
    return formatted(header, rows, form)


def details(result: Result, tolerances: Sequence[float]) -> dict[str, Any]:
    """Return the results of one method for a JSON file, with the counts of every class."""
    return {
        "method": result.method,
        "accuracy": {_key(t): _number(result.accuracy(t)) for t in tolerances},
        "energy": _number(result.energy),
        "pairs": result.pairs,
        "skipped": result.skipped,
        "evaluations": result.evaluations,
        "seconds": round(result.seconds, 1),
        "classes": {
            name: {"tested": c.tested, "hits": c.hits, "energy": c.energy}
            for name, c in result.classes.items()
        },
    }


def _digest(
    model: nn.Module, data: CocoMultilabel, method: SaliencyMethod, rules: Rules, precision: str
) -> str:
    """Return a name for all that the entries of a run depend on."""
    where = "compared at the photo's own size"
    settings = described(
        [method, rules, where, data.transform, data.crowds, data.on_error, precision]
    )
    digest = hashlib.sha256(settings.encode())
    update_with_weights(digest, model)
    digest.update(data.file.read_bytes())
    photos = [(name, None) for name in data.files]
    digest.update(fingerprint(data.folder, photos).encode())
    return digest.hexdigest()[:12]


def name_of(method: SaliencyMethod) -> str:
    """Return a name for tables: the class, and for a method of two stages those of both."""
    stages = [getattr(method, stage, None) for stage in ("activation", "perturbation")]
    inner = ", ".join(type(stage).__name__ for stage in stages if stage is not None)
    return type(method).__name__ + (f"({inner})" if inner else "")


def _key(tolerance: float) -> str:
    return f"{tolerance:g}"


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found) if found else math.nan


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
