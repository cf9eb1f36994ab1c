"""Explaining and judging a list of images with many methods on many networks.

Lightning's Trainer does the work, one `predict` for each network, so devices, nodes, precision and the
bar are its own. The images are cut into fixed groups; what methods draw is drawn for a group.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_aop._version import __version__
from lightning_aop.data.digests import described, slug, update_with_weights
from lightning_aop.data.images import ImageError, Preprocess, ValueRange, read_image
from lightning_aop.data.networks import Network
from lightning_aop.errors import InvalidValueError
from lightning_aop.experiments.groups import NOTHING, Group, group_loader, in_groups, unfinished
from lightning_aop.experiments.pictures import Picture, Pictures, fingerprint
from lightning_aop.experiments.results import Manifest, arrow, finished, write_part
from lightning_aop.methods.names import MethodName, make_method
from lightning_aop.metrics import auc, deletion_insertion_curves
from lightning_aop.metrics.functional import BLUR
from lightning_aop.model.adapter import predict
from lightning_aop.model.layers import find_target_layer
from lightning_aop.model.passes import Passes, count_evaluations, out_of_memory
from lightning_aop.scores import Score, softmax
from lightning_aop.types import Images, SaliencyMethod, Targets

Method = TypeVar("Method")


@dataclass(frozen=True)
class Rules:
    """What is explained, and how it is judged.

    Attributes:
        target: explain the class that the network predicts, or the label.
        images: "all", or only those that are "correct", classified as they are labelled; the others
            are kept as entries without values.
        steps: the number of steps of the curves, if `pixels_per_step` is None.
        pixels_per_step: N of the protocol; 448 by default at 224 × 224.
        group_size: images that are explained together, and lost together when a run is killed. Methods
            that draw noise draw it for a group.
        eval_batch_size: perturbed images in one pass of a network, which bounds the memory. It changes
            no result by more than rounding and can be changed between runs.
    """

    target: Literal["predicted", "label"] = "predicted"
    images: Literal["all", "correct"] = "all"
    steps: int = 112
    pixels_per_step: int | None = None
    group_size: int = 8
    eval_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "pixels_per_step", "group_size", "eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidValueError(f"rules.{name} must be at least 1, got {value}")


def run(
    trainer: pl.Trainer,
    networks: Mapping[str, Network],
    methods: Mapping[str, MethodName | SaliencyMethod],
    data: Pictures,
    rules: Rules,
    output: Path,
    paper: str | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Explain and judge all images, but for those that an earlier run has finished.

    Every process of the trainer has to call this with the same arguments and an `output` that all see.

    Args:
        trainer: shares the groups out to its processes.
        networks: what is explained, by name.
        methods: how, by name; one that needs a target layer and has none gets the network's.
        data: the images.
        rules: what is counted.
        output: the folder of the results.
        paper: the table of the paper that the results are put beside.
        tell: is given what the user should know, on one process.

    Raises:
        ValueError: a network, a method or the data is not available.
        ImportError: a package is missing.
    """
    arrow()
    if not networks or not methods:
        raise InvalidValueError("a benchmark needs at least one network and one method")
    pictures = data.listed()
    count = min(len(pictures), data.limit or len(pictures))
    if data.limit is not None and data.limit > len(pictures):
        tell(f"data.limit asks for {data.limit} images, there are {len(pictures)}")
    groups = in_groups(count, rules.group_size)
    listing = fingerprint(data.folder, pictures)
    jobs: dict[str, tuple[_Judge, list[Group], _Reader]] = {}
    manifest = Manifest(
        __version__, count, rules.images, paper, {}, {}, settings={"data": str(data)}
    )
    # Every process sees the same: none writes before all have come to predict().
    for name, network in networks.items():
        model, score = network.load()
        preprocess = network.preprocess(data.size, data.resize)
        layer = network.layer or _last_layer(model, preprocess)
        named = {label: _made(method, layer, score) for label, method in methods.items()}
        recipe = [network.model, preprocess, data.value_range, rules, trainer.precision]
        settings = described([*recipe, *([] if score is softmax else [score]), __version__])
        digest = hashlib.sha256(f"{settings} {listing}".encode())
        update_with_weights(digest, model)
        folder = output / f"{slug(name)}-{digest.hexdigest()[:12]}"
        told = {label: described(method) for label, method in named.items()}
        digests = {k: hashlib.sha256(v.encode()).hexdigest()[:12] for k, v in told.items()}
        done = finished(folder, groups)
        whole = set.intersection(*(done.get(digest, set()) for digest in digests.values()))
        missing = unfinished(groups, whole, trainer.world_size)
        judge = _Judge(model, named, digests, done, pictures, rules, folder, score)
        jobs[name] = judge, missing, _Reader(data.folder, pictures, preprocess, data.value_range)
        manifest.folders[name] = folder.name
        manifest.methods[name] = digests
        manifest.settings[name] = {"network": settings, "methods": told}
        if whole and missing:
            tell(f"{name}: going on, {len(whole)} of {len(groups)} groups are finished")
    if trainer.is_global_zero:
        if (earlier := Manifest.read(output)) is not None:
            for words in manifest.changes(earlier):
                tell(words)
        manifest.write(output)
    for name, (judge, missing, reader) in jobs.items():
        if missing:
            tell(f"{name}: {len(missing)} groups of {rules.group_size} images to do")
            loader = group_loader(missing, reader, data.num_workers)
            trainer.predict(judge, loader, return_predictions=False)


class _Batch(NamedTuple):
    """A group as the network takes it; an image that can't be read is black, and has a reason."""

    number: int
    rows: list[int]
    images: Tensor
    reasons: list[str | None]


@dataclass(frozen=True)
class _Reader:
    folder: Path
    pictures: Sequence[Picture]
    preprocess: Preprocess
    value_range: ValueRange | None

    def __call__(self, group: Group) -> _Batch:
        number, rows = group
        images: list[Tensor] = []
        reasons: list[str | None] = []
        for row in rows:
            path = self.folder / self.pictures[row].file
            try:
                images.append(self.preprocess(read_image(path, value_range=self.value_range)))
                reasons.append(None)
            except ImageError as error:
                size = self.preprocess.size
                images.append(torch.zeros(3, size, size))
                reasons.append(f"the image can't be used: {error}")
        return _Batch(number, list(rows), torch.stack(images) if rows else torch.empty(0), reasons)


class _Judge(pl.LightningModule):
    """Explains a group with all methods, runs deletion and insertion, and writes the results."""

    def __init__(
        self,
        model: nn.Module,
        methods: Mapping[str, SaliencyMethod],
        digests: Mapping[str, str],
        done: Mapping[str, set[int]],
        pictures: Sequence[Picture],
        rules: Rules,
        folder: Path,
        score: Score,
    ) -> None:
        super().__init__()
        self.model, self.rules, self.folder, self.score = model, rules, folder, score
        self.methods, self.digests, self.done = dict(methods), digests, done
        self.pictures = pictures
        self.passes = Passes(rules.eval_batch_size)

    def predict_step(self, batch: _Batch, batch_idx: int) -> int:
        """Explain a group, and return how many images it has."""
        number, rows, images, unreadable = batch
        if number == NOTHING:
            return 0
        labels = [self.pictures[row].label for row in rows]
        logits, _ = self.passes.within_memory(lambda: predict(self.model, images), len(images))
        logits = logits.float()
        predicted = logits.nan_to_num(-torch.inf).argmax(dim=1).tolist()
        targets = labels if self.rules.target == "label" else predicted
        finite = logits.isfinite().all(dim=1).tolist()
        reasons = [
            reason or self._objection(logits.shape[1], *each)
            for reason, *each in zip(unreadable, labels, predicted, targets, finite, strict=True)
        ]
        usable = [i for i, reason in enumerate(reasons) if reason is None]
        chosen = torch.tensor([targets[i] for i in usable], dtype=torch.long, device=logits.device)
        scores = dict(zip(usable, self.score(logits[usable], chosen).tolist(), strict=True))
        blurred = BLUR(images[usable])  # the same for all methods
        table: list[dict[str, Any]] = []
        for name, method in self.methods.items():
            if number in self.done.get(self.digests[name], ()):
                continue
            found: dict[int, dict[str, Any]] = {}
            if usable:
                judged = self._judged(method, images[usable], chosen, blurred)
                found = dict(zip(usable, judged, strict=True))
            for i, row in enumerate(rows):
                seen = finite[i] and unreadable[i] is None
                table.append(
                    {
                        "group": number,
                        "image": row,
                        "file": self.pictures[row].file,
                        "method": name,
                        "method_digest": self.digests[name],
                        "label": labels[i],
                        "predicted": predicted[i] if seen else None,
                        "target": targets[i] if seen else None,
                        "correct": predicted[i] == labels[i] if seen else None,
                        "score": scores.get(i),
                        **found.get(i, {"reason": reasons[i]}),
                    }
                )
        write_part(self.folder, number, self.global_rank, table)
        return len(rows)

    def on_predict_end(self) -> None:
        """Wait for the other processes, whose results are read next."""
        self.trainer.strategy.barrier()

    def _objection(
        self, classes: int, label: int, predicted: int, target: int, finite: bool
    ) -> str | None:
        """Return why an image is not explained, or None."""
        if not finite:
            return "the network's logits are NaN or infinite"
        if not 0 <= target < classes:
            return f"labelled {label}, but the network has classes 0 to {classes - 1}"
        if self.rules.images == "correct" and predicted != label:
            return "not classified as it is labelled"
        return None

    def _judged(
        self, method: SaliencyMethod, images: Images, targets: Targets, blurred: Images
    ) -> list[dict[str, Any]]:
        """Return the values of each image, or the reason why there are none."""
        try:
            found, _ = self.passes.within_memory(
                lambda: self._figures(method, images, targets, blurred), len(images)
            )
        except (ValueError, RuntimeError) as error:
            if _of_the_machine(error):
                raise
            if len(images) == 1:
                words = (str(error).strip() or "no words").splitlines()[0]
                return [{"reason": f"{type(error).__name__}: {words}"}]
            # One image must not cost the others of its group their values.
            each = zip(images.split(1), targets.split(1), blurred.split(1), strict=True)
            return [self._judged(method, *one)[0] for one in each]
        return found

    def _figures(
        self, method: SaliencyMethod, images: Images, targets: Targets, blurred: Images
    ) -> list[dict[str, Any]]:
        start = time.perf_counter()
        with count_evaluations(self.model) as count:
            maps = self.passes.in_parts(partial(method.explain, self.model), images, targets)
        if maps.device.type != "cpu":
            torch.accelerator.synchronize(maps.device)
        explained = time.perf_counter()
        curves = deletion_insertion_curves(
            self.model,
            images,
            maps,
            targets,
            baseline=lambda _: blurred,
            score=self.score,
            steps=self.rules.steps,
            pixels_per_step=self.rules.pixels_per_step,
        )
        deletion, insertion = (curve.double().cpu() for curve in curves)
        judged = time.perf_counter()
        return [
            {
                "deletion": out,
                "insertion": into,
                "overall": into - out,
                "deletion_curve": falling.tolist(),
                "insertion_curve": rising.tolist(),
                "evaluations": count.total / len(images),
                "seconds": (explained - start) / len(images),
                "curve_seconds": (judged - explained) / len(images),
                "reason": None,
            }
            for out, into, falling, rising in zip(
                auc(deletion).tolist(), auc(insertion).tolist(), deletion, insertion, strict=True
            )
        ]


def _made(method: MethodName | SaliencyMethod, layer: str, score: Score) -> SaliencyMethod:
    if isinstance(method, str):
        method = make_method(method, layer, score)
    return _with(_with(method, "target_layer", None, layer), "score", softmax, score)


def _with(method: Method, name: str, default: object, value: object) -> Method:
    """Return the method with `value` in all fields of this name that hold the default."""
    if not dataclasses.is_dataclass(method) or isinstance(method, type):
        return method
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        held = getattr(method, field.name)
        if field.name == name and held == default and held is not value:
            changes[name] = value
        elif (other := _with(held, name, default, value)) is not held:
            changes[field.name] = other
    return dataclasses.replace(method, **changes) if changes else method


def _last_layer(model: nn.Module, preprocess: Preprocess) -> str:
    """Find the layer once, and not in the counted time of whichever group comes first."""
    return find_target_layer(model, torch.zeros(1, 3, preprocess.size, preprocess.size))


def _of_the_machine(error: Exception) -> bool:
    """Return whether an error would hit the next image too, or is not about the method: no result."""
    fatal = getattr(torch, "AcceleratorError", ())
    return out_of_memory(error) or isinstance(error, fatal) or "CUDA error" in str(error)
