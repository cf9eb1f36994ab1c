"""The pictures of a probe: its maps, with what the labels and the model say of each, now and before."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_aop.monitor.explanation import Explanation
from lightning_aop.tables import decimals
from lightning_aop.view.grid import heatmap_grid
from lightning_aop.view.heat import Picture

# A picture of more is slow to open and no longer to be taken in; what is over goes into further ones.
_EXPLANATIONS = 20
# Drawing takes longer than explaining: these take seconds, thousands would take minutes.
_DRAWN = 320
_CHANGES = 16
# Panels in a row, the input being one: two pairs; the label and what is said instead; several classes,
# or times. As many at every epoch, so that nothing moves under a logger's slider.
_PAIRS, _CONFUSED, _SEVERAL = 4, 3, 4


def draw_probe(
    explanation: Explanation, *, title: str, headings: Sequence[str] | None = None
) -> Iterator[Picture]:
    """Draw each explanation with its class, score and overall AUC, and its mask's outline if known.

    Under a single-label picture stands also what the model would have said where it is wrong. The
    explanations of one multilabel picture stand together: found classes, missed ones (a score of at
    most 0.5) and false positives are told apart, and the classes that are not drawn are listed.

    Of more than 320 explanations as many are drawn, from all pictures alike, as the title says.

    Args:
        explanation: what was found.
        title: when.
        headings: a text below each image of the probe; then all maps of an image stand together.

    Yields:
        As many pictures as are needed: one shows at most 20 explanations, but all of one probe picture.
    """
    count = len(explanation.rows)
    if count > _DRAWN:
        explanation = explanation.only(_first_of_each(explanation.rows))
        title = f"{title} · {_DRAWN} of {count} explanations"
    probe, rows, look = explanation.probe, explanation.rows, explanation.look
    names, panels = look.names, look.panels
    # Both maps of an image that was confused belong together, too.
    together = probe.multilabel or headings is not None or _are_confused(explanation)
    order = rows.argsort(stable=True) if together else torch.arange(len(rows))
    pages = _pages(rows[order].tolist(), together)
    for number, page in enumerate(pages):
        part = explanation.only(order[page])
        layout: dict[str, Any] = {
            "mean": look.mean,
            "std": look.std,
            "panels": panels,
            "narrow": _SEVERAL if probe.multilabel else _CONFUSED if together else _PAIRS,
        }
        layout["title"] = title if len(pages) == 1 else f"{title} · {number + 1} of {len(pages)}"
        if together:
            layout["groups"] = part.rows.tolist()
        if headings is not None:
            layout["headings"] = [headings[row] for row in part.rows.unique_consecutive().tolist()]
        elif probe.multilabel:
            layout["headings"] = _headings(part, names)
        if probe.masks is not None:
            layout["outlines"] = part.masks
        if "curves" in panels:
            layout["curves"] = part.curves.cpu()
        if probe.multilabel:
            captions = _multilabel_captions(part, names)
        else:
            captions = _captions(part, names, together)
        images = probe.images[part.rows].to(part.maps.device)
        yield heatmap_grid(images, part.maps, captions, **layout)


def _are_confused(explanation: Explanation) -> bool:
    """Tell whether images have a second map, of what the model says in place of the label."""
    rows = explanation.rows
    second = rows[1:] == rows[:-1]
    said = explanation.targets[1:] == explanation.predicted[1:].cpu()
    first = explanation.targets[:-1] != explanation.predicted[:-1].cpu()
    alone = len(rows) - int(second.sum()) == len(rows.unique())
    at_most_two = not bool((second[1:] & second[:-1]).any())
    return alone and at_most_two and bool(second.any()) and bool((said & first)[second].all())


def _first_of_each(rows: Int[Tensor, " p"]) -> Int[Tensor, " d"]:
    """Return the places of what is drawn: of each picture the first, then the second, and so on."""
    before: Counter[int] = Counter()
    ranks = []
    for row in rows.tolist():
        ranks.append(before[row])
        before[row] += 1
    return torch.tensor(ranks).argsort(stable=True)[:_DRAWN].sort().values


def _pages(rows: list[int], together: bool) -> list[slice]:
    """Cut explanations, in the order of their pictures, into pages."""
    runs = [len(list(run)) for _, run in itertools.groupby(rows)] if together else [1] * len(rows)
    pages, start, end = [], 0, 0
    for length in runs:
        if end > start and end + length - start > _EXPLANATIONS:
            pages.append(slice(start, end))
            start = end
        end += length
    return [*pages, slice(start, end)]


def draw_change(
    explanation: Explanation,
    before: Sequence[tuple[str, dict[tuple[int, int], UInt8[Tensor, "i j"]]]],
    *,
    title: str,
) -> Picture | None:
    """Draw the first map, the previous one and that of now side by side, of up to 16 explanations.

    Args:
        explanation: what was found now.
        before: titles and maps of the first time and, if it is another, of the previous one.
        title: when.

    Returns:
        The picture, or None where nothing was explained before.
    """
    known = [
        (n, pair)
        for n, pair in enumerate(explanation.pairs)
        if any(pair in maps for _, maps in before)
    ]
    if not known:
        return None
    height, width = explanation.maps.shape[1:]
    look, names = explanation.look, explanation.look.names
    rows, groups, maps, captions, headings = [], [], [], [], []
    names_of_times = ["first", "previous"] if len(before) == 2 else ["previous"]
    for group, (n, pair) in enumerate(known[:_CHANGES]):
        headings.append(f"{_name(names, pair[1])}\n{float(explanation.scores[n]):.2f}")
        times = [
            (f"{word}\n{_in_lines(when)}", earlier[pair].to(explanation.maps) / 255)
            for word, (when, earlier) in zip(names_of_times, before, strict=True)
            if pair in earlier
        ]
        moved = explanation.drift[n]
        times.append(("now" if moved is None else f"now\ndrift {moved:.2f}", explanation.maps[n]))
        for caption, each in times:
            rows.append(int(explanation.rows[n]))
            groups.append(group)
            captions.append(caption)
            maps.append(_enlarged(each, height, width))
    return heatmap_grid(
        explanation.probe.images[rows].to(explanation.maps.device),
        torch.stack(maps),
        captions,
        title=f"{title} · change of the maps",
        mean=look.mean,
        std=look.std,
        groups=groups,
        headings=headings,
        narrow=_SEVERAL,
    )


def _enlarged(map_: Float[Tensor, "i j"], height: int, width: int) -> Float[Tensor, "h w"]:
    if map_.shape == (height, width):
        return map_
    return interpolate(map_[None, None], (height, width), mode="bilinear")[0, 0]


def _in_lines(title: str) -> str:
    """Return the title of a moment for a place that is no wider than a panel."""
    return title.replace(" · ", "\n").replace("before ", "before\n")


def _captions(
    explanation: Explanation, names: Sequence[str] | None, together: bool = False
) -> list[str]:
    """Return the class, its score and AUC of each pair; for a wrong prediction that one as well.

    Where its map stands beside that of the label, which of the two each is.
    """
    columns = (
        explanation.targets.tolist(),
        explanation.scores.tolist(),
        explanation.predicted.tolist(),
        explanation.predicted_scores.tolist(),
        _areas(explanation),
        explanation.verdicts,
    )
    captions = []
    for target, value, other, higher, area, verdict in zip(*columns, strict=True):
        wrong = [] if other == target else [f"predicted {_name(names, other)} {higher:.2f}"]
        if together and verdict == "wrong":
            wrong = ["predicted" if other == target else "label"]
        captions.append("\n".join([f"{_name(names, target)} {value:.2f}", *area, *wrong]))
    return captions


def _areas(explanation: Explanation) -> list[list[str]]:
    """Return the overall AUC of each pair in words, nothing where it was not measured."""
    deletion, insertion = explanation.aucs.cpu().unbind(dim=1)
    overall = (insertion - deletion).tolist()
    return [[] if math.isnan(v) else [f"AUC {decimals(v)}"] for v in overall]


def _multilabel_captions(explanation: Explanation, names: Sequence[str] | None) -> list[str]:
    columns = (
        explanation.targets.tolist(),
        explanation.scores.tolist(),
        explanation.verdicts,
        _areas(explanation),
    )
    words: dict[str | None, list[str]] = {
        "right": [],
        "missed": ["missed"],
        "false positive": ["false positive"],
        "absent": ["not in the image"],
        None: [],
    }
    return [
        "\n".join([f"{_name(names, target)} {value:.2f}", *area, *words[verdict]])
        for target, value, verdict, area in zip(*columns, strict=True)
    ]


def _headings(explanation: Explanation, names: Sequence[str] | None) -> list[str]:
    """Return for each picture which classes were found, missed or made up, beside those drawn."""
    labels = explanation.probe.labels
    assert labels is not None
    scores = explanation.chances
    positive, over = labels > 0.5, scores > 0.5
    drawn = torch.zeros_like(positive)
    drawn[explanation.rows, explanation.targets] = True
    headings = []
    if explanation.verdicts[0] is None:  # numbers to predict
        positive = over = drawn
    for row in explanation.rows.unique_consecutive().tolist():
        parts = []
        for word, kind in (
            ("also", positive & over),
            ("missed", positive & ~over),
            ("false", ~positive & over),
        ):
            classes = (kind & ~drawn)[row].nonzero()[:, 0].tolist()
            if classes:
                listed = ", ".join(f"{_name(names, k)} {scores[row, k]:.2f}" for k in classes)
                parts.append(f"{word}: {listed}")
        headings.append("\n".join([*parts[:1], " · ".join(parts[1:])]).strip())
    return headings


def _name(names: Sequence[str] | None, index: int) -> str:
    return str(names[index]) if names is not None and index < len(names) else f"class {index}"
