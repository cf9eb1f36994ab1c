"""What a model's output means: from tensors, dictionaries, tuples and objects to logits [B, K]."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_aop.errors import InvalidValueError
from lightning_aop.model.batches import members
from lightning_aop.scores import Score, full_precision, sigmoid, softmax, value

__all__ = ["Expected", "Kind", "Meaning", "OutputError", "find_meaning"]

Kind: TypeAlias = Literal["class", "one-hot", "soft", "multi-hot", "value", "mask", "boxes"]
"""What the labels of a batch are."""

_NAMES = (
    *("logits", "logit", "class_logits", "cls_logits", "out", "output", "outputs", "scores"),
    *("preds", "pred", "prediction", "predictions", "y_hat", "y_pred", "cls", "pred_score"),
    *("probs", "prob", "probabilities"),
)
_EMBEDDINGS = (
    *("embedding", "embeddings", "embed", "emb", "image_embeds", "features", "feature", "feats"),
    *("projection", "projections", "proj", "z", "pooler_output", "representation"),
)
_VALUES = ("pred_score", "anomaly_score", "anomaly_scores")
_TINY = 1e-7


class OutputError(InvalidValueError):
    """An output from which no logits can be read."""


@dataclass(frozen=True)
class Expected:
    """What is known of the outputs beforehand.

    Attributes:
        kind: what the labels are, None if there are none.
        highest: the highest class index among the labels.
        classes: how many classes there are, None where nobody says.
        separately: whether each class is trained on its own, by binary cross entropy.
        values: whether it is trained by losses of values alone, such as the squared error.
        embeddings: whether a loss compares outputs with each other.
        trusted: whether the user has said that the outputs are what is to be explained.
        heads: what is known of each of several outputs, by the key of its labels in the batch; or,
            of all that may be the labels in a tuple, by its place.
        columns: how many numbers of an image the labels are, 0 where none is of the whole image.
        pixels: whether there are no labels, but values for each pixel beside the images.
        images: the shape of an image, [C, H, W].
    """

    kind: Kind | None = None
    highest: int = -1
    classes: int | None = None
    separately: bool = False
    values: bool = False
    embeddings: bool = False
    trusted: bool = False
    heads: Mapping[str, "Expected"] = field(default_factory=dict)
    columns: int = 1
    pixels: bool = False
    images: Sequence[int] = ()

    def of(self, head: str | None) -> "Expected":
        """Return what is known by the labels of a head; by the own ones for None."""
        if head is None:
            return self
        return replace(self.heads[head], trusted=self.trusted, images=self.images)


@dataclass(frozen=True)
class Meaning:
    """How to get logits out of an output, in words too.

    Attributes:
        read: the output, and the number of images, to logits [B, K].
        description: what the output is.
        score: the class score that fits.
        classes: K.
        names: what the K columns are, where they are no classes.
        head: the key of the output's labels, where there are several.
    """

    read: Callable[[Any, int], Float[Tensor, "b k"]]
    description: str
    score: Score
    classes: int
    names: Sequence[str] | None = None
    head: str | None = None


def find_meaning(output: Any, count: int, expected: Expected) -> Meaning:
    """Tell what a model's output for a batch of `count` images means.

    An output that ends in a sigmoid is told from logits by its graph: it has to have one.

    Raises:
        OutputError: it has no logits, or their number does not fit the labels.
    """
    queries = _queries(output, count)
    if queries is not None or _is_detection(output, count):
        boxes = next((key for key, each in expected.heads.items() if each.kind == "boxes"), None)
        known = expected.of(boxes)
        of_boxes = _query_detection(*queries, known) if queries else _detection(output, known)
        return _labelled(of_boxes, expected, boxes)
    found: list[tuple[_Path, Tensor]] = [
        (path, tensor) for path, tensor in _tensors(output) if _fits(tensor, count)
    ]
    if not found:
        raise OutputError(f"gives {_describe(output)}, no logits for {count} images")
    named = [
        (path, tensor)
        for name in _NAMES
        for path, tensor in found
        if path and str(path[-1]).lower() == name
    ]
    counted = [(p, t) for p, t in found if t.ndim > 1 and t.shape[1] == expected.classes]
    headed = [(p, t) for p, t in found if p and str(p[-1]).lower() in expected.heads]
    if not (headed or named or counted or expected.trusted):
        found = _without_latents(found, expected)
    flat = [(path, tensor) for path, tensor in found if tensor.ndim <= 2]
    flat = [(p, t) for p, t in flat if not _is_embedding(t, p)] or flat
    several = len({tensor.shape for _, tensor in flat}) > 1
    if expected.kind == "class":
        # The output that has the classes of the labels and no other, or all of them, if there is one.
        ends = {each.highest + 1 for each in (expected, *expected.heads.values())} - {0, 1}
        rows = [(p, t) for p, t in flat if t.ndim == 2]
        exact = [(p, t) for p, t in rows if several and t.shape[1] in ends]
        flat = exact or [(p, t) for p, t in rows if t.shape[1] > expected.highest] or flat
    path, tensor = (headed or named or counted or _last_layers(flat) or found)[0]
    name = str(path[-1]) if path else ""
    head = name.lower() if headed else None
    if head is None and expected.kind is not None:
        shape = tensor.shape[1:]
        one_row = math.prod(shape) == max(shape, default=1)
        size = math.prod(shape) if one_row else 0
        same = {k: h for k, h in expected.heads.items() if several and h.highest + 1 == size > 1}
        head = fitting(same or expected.heads, size, not one_row)
    call = f"module(images){_code(output, path)}"
    meaning = _labelled(_meaning_of(tensor, count, name, call, expected.of(head)), expected, head)
    if not path:
        return meaning
    where = written(path)
    others = [
        written(p)
        for p, t in found
        if p != path and t.ndim == 2 and not (computed_from(t, tensor) or computed_from(tensor, t))
    ]
    rest = f"; of other outputs, {', '.join(others[:4])}, none is explained" if others else ""

    def read(output: Any, count: int) -> Tensor:
        return meaning.read(_at(output, path), count)

    described = f"{where} {meaning.description}{rest}"
    return replace(meaning, read=read, description=described)


_Path: TypeAlias = tuple[object, ...]


def _labelled(meaning: Meaning, expected: Expected, head: str | None) -> Meaning:
    """Say which labels of a batch an output has, where it has been chosen by what they are."""
    if head is None or expected.kind is None:
        return replace(meaning, head=head)
    described = meaning.description
    if others := ", ".join(key for key in expected.heads if key != head):
        described += f"; of the batch, {head} has the labels, not {others}"
    return replace(meaning, head=head, description=described)


def fitting(heads: Mapping[str, Expected], outputs: int, maps: bool = False) -> str | None:
    """Return which of all that may be the labels fits a model's outputs best, the first of several.

    Args:
        heads: what each says of the outputs.
        outputs: how many an image has, K.
        maps: these are maps.
    """

    def misfit(labels: Expected) -> int:
        if maps:
            return int(labels.kind != "mask")
        if outputs == 1 or labels.values:
            one = outputs == 1 and labels.separately and labels.highest > 1
            return int(labels.columns != outputs or one)
        if labels.kind == "class":
            return 0 if 0 <= labels.highest < outputs else 2
        if labels.columns == outputs:
            return int(labels.kind == "value")
        return 3

    return min(heads, key=lambda key: misfit(heads[key]), default=None)


def _last_layers(found: list[tuple[_Path, Tensor]]) -> list[tuple[_Path, Tensor]]:
    """Leave out features from which another output, of another size, is computed.

    Of several of one size the least nested is the whole model's, as in ([side, side], final).
    """
    chosen = found[:1]
    for path, tensor in found[1:]:
        last, of_last = chosen[0]
        same = tensor.shape == of_last.shape
        if len(path) < len(last) if same else computed_from(tensor, of_last):
            chosen = [(path, tensor)]
    return chosen


def _without_latents(
    found: list[tuple[_Path, Tensor]], expected: Expected
) -> list[tuple[_Path, Tensor]]:
    """Leave out vectors from which the images are made again, and others of their size, as in a VAE.

    Where another vector is left, it is the images made again that are left out.
    """
    pictures = [t for _, t in found if t.ndim > 1 and _like_images(t.shape[1:], expected)]
    latent = {
        t.shape
        for _, t in found
        if t.ndim == 2 and any(t is not each and computed_from(each, t) for each in pictures)
    }
    rest = [(path, t) for path, t in found if t.shape not in latent]
    others = [(path, t) for path, t in rest if not any(t is each for each in pictures)]
    return others if pictures and any(t.ndim == 2 for _, t in others) else rest


def _like_images(shape: Sequence[int], expected: Expected) -> bool:
    """Tell whether an output has a number for each of an image, in its shape or in one row."""
    images = tuple(expected.images)
    return bool(images) and tuple(shape) in (images, (math.prod(images),))


def computed_from(tensor: Tensor, other: Tensor) -> bool:
    """Tell by its graph whether a tensor comes from another, which is no leaf."""
    ahead: list[Any] = [tensor.grad_fn]
    seen: set[Any] = {None}
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        if node is other.grad_fn:
            return True
        seen.add(node)
        ahead.extend(before for before, _ in node.next_functions)
    return False


def written(path: _Path) -> str:
    """Return how code says the way to a part."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def _code(output: Any, path: _Path) -> str:
    """Return how Python says the way to a part of an output."""
    said = ""
    for i, key in enumerate(path):
        by_key = isinstance(key, int) or not hasattr(_at(output, path[:i]), str(key))
        said += f"[{key!r}]" if by_key else f".{key}"
    return said


def _fits(tensor: Tensor, count: int) -> bool:
    if not tensor.is_floating_point():
        return False
    if tensor.ndim == 0:
        return False
    return len(tensor) == count and tensor.ndim <= 4


def _tensors(output: Any, path: _Path = (), depth: int = 3) -> Iterator[tuple[_Path, Tensor]]:
    if isinstance(output, Tensor):
        yield path, output
    elif depth:
        own = getattr(output, "logits", None)
        parts = members(output)
        if isinstance(own, Tensor) and "logits" not in dict(parts):
            parts = [("logits", own), *parts]
        for key, part in parts:
            yield from _tensors(part, (*path, key), depth - 1)


def _at(output: Any, path: _Path) -> Any:
    for key in path:
        if isinstance(output, Mapping) or isinstance(key, int):
            output = output[key]
        else:
            output = getattr(output, str(key))
    return output


def _meaning_of(tensor: Tensor, count: int, name: str, call: str, expected: Expected) -> Meaning:
    shape = tuple(tensor.shape[1:])
    if math.prod(shape) == 1:
        return _one_output(tensor, name, expected)
    if math.prod(shape) == max(shape):  # [B, K], and with dimensions of one
        return _class_outputs(tensor.flatten(1), name, call, expected)
    if len(shape) == 2 and _is_map(shape, expected):
        tensor, shape = tensor[:, None], (1, *shape)
    if len(shape) != 3:
        raise OutputError(
            f"gives {list(tensor.shape)}, which is neither [B, K] nor [B, K, H, W], but may be tokens, "
            "queries or anchors: logits=fn takes their mean, or the best, to logits [B, K]"
        )
    if expected.kind != "mask" and not expected.trusted:
        _refuse_other_maps(shape, call, expected)
    return _segmentation(tensor, expected)


def _is_map(shape: Sequence[int], expected: Expected) -> bool:
    """Tell whether [H, W] is a map of the image, and not tokens or anchors."""
    size = tuple(expected.images[1:])
    if expected.kind == "mask":
        return not size or shape[0] * size[1] == shape[1] * size[0]
    return shape == size and (expected.kind is None or expected.trusted)


def _refuse_images(shape: Sequence[int], call: str, expected: Expected) -> None:
    """Refuse what an autoencoder gives: the images again, in their shape or in rows."""
    if not _like_images(shape, expected) or expected.classes == shape[0]:
        return
    same = tuple(shape) == tuple(expected.images)
    raise OutputError(
        f"gives [B, {', '.join(map(str, shape))}], {'the shape' if same else 'the size'} of the images, "
        "as an autoencoder does, which has no classes: explain, for example, how alike they are, "
        f"logits=lambda module, images: -({call}{'' if same else '.view_as(images)'} - images).square()"
        ".mean(dim=(1, 2, 3))[:, None]; or, where they are classes, logits=lambda module, images: "
        f"{call}"
    )


def _refuse_other_maps(shape: Sequence[int], call: str, expected: Expected) -> None:
    """Refuse maps that are no segmentation, as far as the labels and losses tell."""
    maps = f"[B, {', '.join(map(str, shape))}]"
    _refuse_images(shape, call, expected)
    if expected.values or expected.pixels or expected.kind == "value":
        raise OutputError(
            f"gives {maps}, values for each pixel, such as depths or heatmaps, which have no classes: "
            "explain, for example, their mean over the image, or over a part of it, "
            f"logits=lambda module, images: {call}.mean(dim=(2, 3))"
        )
    if expected.kind == "boxes" and expected.classes != shape[0]:
        raise OutputError(
            f"gives {maps}, a grid of predictions, where the labels are boxes: explain, for example, "
            f"the best score of each class, logits=lambda module, images: {call}[:, first:]."
            "amax(dim=(2, 3)), where the classes begin at first"
        )
    _check_range(max(shape[0], 2), expected)


def _one_output(tensor: Tensor, name: str, expected: Expected) -> Meaning:
    # How anomalous an image is has a scale of its own, also where the labels are normal or not.
    of_value = (expected.kind == "value" and not expected.separately) or expected.values
    if of_value or expected.embeddings or expected.highest > 1 or name in _VALUES:
        return _values(1)
    probability = _ends_in(tensor, "Sigmoid") or ("prob" in name and _in_unit(tensor))

    def read(output: Tensor, count: int) -> Tensor:
        z = output.reshape(count, 1)
        z = _logit(z) if probability else z
        return torch.cat([-z, z], dim=1)

    what = "the probability" if probability else "the logit"
    return Meaning(read, f"[B, 1], {what} of class 1 of two", sigmoid, 2)


def _values(count: int) -> Meaning:
    """Return each value and its negative: what raises it, and what lowers it."""

    def read(output: Tensor, images: int) -> Tensor:
        values = full_precision(output).reshape(images, count)
        return torch.cat([values, -values], dim=1)

    what = "a value" if count == 1 else "values"
    names = [
        word if count == 1 else f"{word} of value {index}"
        for word in ("more", "less")
        for index in range(count)
    ]
    return Meaning(
        read,
        f"[B, {count}], {what} to predict, of which is explained what raises and what lowers it",
        value,
        2 * count,
        names,
    )


def _class_outputs(logits: Tensor, name: str, call: str, expected: Expected) -> Meaning:
    classes = logits.shape[1]
    if not expected.trusted:
        _refuse_images((classes,), call, expected)
    _check_range(classes, expected)
    embedding = expected.embeddings or _is_embedding(logits, (name,))
    if embedding and not expected.trusted:
        raise OutputError(
            f"gives [B, {classes}], an embedding, which has no class: give it a score, such as how "
            "like it is to a reference, logits=lambda module, images: "
            f"torch.cosine_similarity({call}, reference)[:, None]"
        )
    size = f"[B, {classes}]"

    def as_it_is(output: Tensor, count: int) -> Tensor:
        return output if output.shape == (count, classes) else output.reshape(count, classes)

    if expected.kind == "value" or (expected.kind in ("multi-hot", None) and expected.values):
        return _values(classes)
    values = full_precision(logits.detach())
    if _in_unit(values) and sums_to_one(values):
        return Meaning(
            lambda t, n: full_precision(t.reshape(n, classes)).clamp_min(_TINY).log(),
            f"{size}, probabilities by softmax, of which the logarithm is taken",
            softmax,
            classes,
        )
    if _ends_in(logits, "Sigmoid"):
        return Meaning(
            lambda t, n: _logit(t.reshape(n, classes)),
            f"{size}, probabilities by sigmoid, of which the logit is taken",
            sigmoid,
            classes,
        )
    if bool((values <= 0).all()) and bool((values.logsumexp(dim=1).abs() < 1e-3).all()):
        return Meaning(as_it_is, f"{size}, logarithms of probabilities", softmax, classes)
    separate = expected.kind == "multi-hot" or (
        expected.separately and expected.kind in ("one-hot", "boxes", None)
    )
    return Meaning(as_it_is, f"logits {size}", sigmoid if separate else softmax, classes)


def _is_embedding(outputs: Tensor, path: _Path) -> bool:
    """Tell by its name or values whether an output is an embedding."""
    if path and str(path[-1]).lower() in _EMBEDDINGS:
        return True
    values = full_precision(outputs.detach())
    return (
        outputs.ndim == 2
        and outputs.shape[1] > 2
        and bool(((values.norm(dim=1) - 1).abs() < 1e-3).all())
        and bool((values < 0).any())
    )


def _check_range(classes: int, expected: Expected) -> None:
    if expected.kind in ("class", "soft", "one-hot", "multi-hot") and expected.highest >= classes:
        from_one = (
            " (if they count from 1, set read_batch=fn, such as lambda batch: (batch[0], batch[1] - 1))"
            if expected.highest == classes and expected.kind == "class"
            else ""
        )
        raise OutputError(
            f"gives {classes} outputs an image, where the labels go up to class {expected.highest}"
            f"{from_one}"
        )


def _segmentation(maps: Tensor, expected: Expected) -> Meaning:
    """Return the share of the image that each class has: the mean of its pixels' probabilities."""
    classes = maps.shape[1]
    probable = _in_unit(maps) and (_ends_in(maps, "Sigmoid") or sums_to_one(maps.detach()))

    def read(output: Tensor, count: int) -> Tensor:
        values = full_precision(output).reshape(count, classes, *output.shape[-2:])
        if classes == 1:
            p = (values if probable else values.sigmoid()).mean(dim=(2, 3))
            return torch.cat([-_logit(p), _logit(p)], dim=1)
        p = (values if probable else values.softmax(dim=1)).mean(dim=(2, 3))
        return p.clamp_min(_TINY).log()

    return Meaning(
        read,
        f"[B, {classes}, H, W], a semantic segmentation, scored by a class's mean probability over "
        "the image",
        sigmoid if classes == 1 else softmax,
        max(classes, 2),
    )


def _is_detection(output: Any, count: int) -> bool:
    return (
        isinstance(output, (list, tuple))
        and len(output) == count
        and all(isinstance(found, Mapping) and {"scores", "labels"} <= {*found} for found in output)
    )


def _detection(output: Any, expected: Expected) -> Meaning:
    """Return the best score of each class over the boxes of an image."""
    seen = [int(found["labels"].max()) for found in output if len(found["labels"])]
    # Names of classes may leave out the background, which counts here.
    classes = max([(expected.classes or 1) - 1, expected.highest, *seen]) + 1

    def read(output: Any, count: int) -> Tensor:
        rows = []
        for found in output:
            scores, labels = full_precision(found["scores"]), found["labels"].long()
            known = labels < classes
            # Without a box the score is 0, with a gradient that is 0 too.
            best = scores.new_zeros(classes) + 0 * scores.sum()
            best = best.scatter_reduce(0, labels[known], scores[known], "amax")
            rows.append(_logit(best))
        return torch.stack(rows)

    return Meaning(
        read,
        f"detections, scored by the best box of each of {classes} classes",
        sigmoid,
        classes,
    )


def _queries(output: Any, count: int) -> tuple[_Path, Tensor] | None:
    """Return the class logits [B, Q, K] that stand beside boxes or masks of as many queries."""
    tensors = {p: t for p, t in _tensors(output, depth=1) if p and t.ndim >= 3 and len(t) == count}
    for path, logits in tensors.items():
        if "logits" not in str(path[-1]) or logits.ndim != 3:
            continue
        for other, tensor in tensors.items():
            place = any(word in str(other[-1]) for word in ("box", "mask"))
            if place and tensor.shape[1] == logits.shape[1]:
                return path, logits
    return None


def _query_detection(path: _Path, logits: Tensor, expected: Expected) -> Meaning:
    """Return the best probability of each class over the queries of an image."""
    last = logits.shape[2]
    # As a rule the last output is for no object; without one, each class has a sigmoid of its own.
    known = expected.classes if expected.classes is not None else expected.highest + 1
    separate = known == last
    classes = last if separate else last - 1
    _check_range(classes, replace(expected, kind="class"))

    def read(output: Any, count: int) -> Tensor:
        found = full_precision(_at(output, path))
        scores = found.sigmoid() if separate else found.softmax(dim=2)[..., :classes]
        return _logit(scores.amax(dim=1))

    how = "a sigmoid each" if separate else "a softmax with one output for no object"
    return Meaning(
        read,
        f"{written(path)} [B, {logits.shape[1]}, {last}], detections, scored by the best of the "
        f"queries for each of {classes} classes, {how}",
        sigmoid,
        classes,
    )


def _logit(probability: Tensor) -> Tensor:
    return torch.logit(full_precision(probability), eps=_TINY)


def sums_to_one(values: Tensor) -> bool:
    """Tell whether the classes of each row, [B, K, …], sum to 1, as half precision rounds."""
    return bool(((values.sum(dim=1) - 1).abs() < 1e-3).all())


def _in_unit(values: Tensor) -> bool:
    found = values.detach()
    return bool(((found >= 0) & (found <= 1)).all())


# What hands on its input's values.
_SAME = ("Squeeze", "Unsqueeze", "View", "Reshape", "Select", "Slice", "ToCopy", "Clone", "Alias")


def _ends_in(tensor: Tensor, operation: str) -> bool:
    """Tell by its graph whether an operation was the last to compute a tensor."""
    node: Any = tensor.grad_fn
    while node is not None and any(name in node.name() for name in _SAME):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith(operation)


def _describe(output: Any) -> str:
    """Return the kind and the shapes of an output, and none of its values."""
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)}"
    parts = [
        f"{key}: {list(part.shape) if isinstance(part, Tensor) else type(part).__name__}"
        for key, part in members(output)[:6]
    ]
    return f"a {type(output).__name__}" + (f" ({', '.join(parts)})" if parts else "")
