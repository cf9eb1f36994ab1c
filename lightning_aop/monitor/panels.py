"""The pictures of a probe: its maps, with what the labels and the model say of each, now and before."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_aop.monitor.explanation import Found
from lightning_aop.monitor.probe import Probe
from lightning_aop.view.grid import Panel, heatmap_grid

Picture: TypeAlias = UInt8[Tensor, "3 height width"]

# A picture of more is slow to open and no longer to be taken in; what is over goes into further ones.
_EXPLANATIONS = 32
_CHANGES = 16


def draw_probe(
    probe: Probe,
    found: Found,
    names: Sequence[str] | None,
    *,
    title: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    panels: Sequence[Panel] = ("overlay",),
) -> Iterator[Picture]:
    """Draw each explanation with its class, score and over-all AUC, and its mask's outline if known.

    Under a single-label picture stands also what the model would have said where it is wrong. The
    explanations of one multilabel picture stand together: found classes, missed ones (a score of at
    most 0.5) and false positives are told apart, and the classes that are not drawn are listed.

    Yields:
        As many pictures as are needed: one shows at most 32 explanations, but all of one probe picture.
    """
    order = found.rows.argsort(stable=True) if probe.multilabel else torch.arange(len(found.rows))
    pages = _pages(found.rows[order].tolist(), together=probe.multilabel)
    for number, page in enumerate(pages):
        part = found.only(order[page])
        layout: dict[str, Any] = {"mean": mean, "std": std, "panels": panels}
        layout["title"] = title if len(pages) == 1 else f"{title} · {number + 1} of {len(pages)}"
        if probe.multilabel:
            layout["groups"] = part.rows.tolist()
            layout["headings"] = _headings(probe, part, names)
        if probe.masks is not None:
            layout["outlines"] = part.masks
        if "curves" in panels:
            layout["curves"] = part.curves.cpu()
        captions = (_multilabel_captions if probe.multilabel else _captions)(probe, part, names)
        images = probe.images[part.rows].to(part.maps.device)
        yield heatmap_grid(images, part.maps, captions, **layout)


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
    probe: Probe,
    found: Found,
    before: Sequence[tuple[str, dict[tuple[int, int], UInt8[Tensor, "i j"]]]],
    drift: Sequence[float | None],
    names: Sequence[str] | None,
    *,
    title: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Picture | None:
    """Draw the first map, the previous one and that of now side by side, of up to 16 explanations.

    Args:
        probe: what is explained.
        found: what was found now.
        before: titles and maps of the first time and, if it is another, of the previous one.
        drift: 1 − the rank correlation of each map with the previous one.
        names: by class index.
        title: when.
        mean: see `heatmap_grid`.
        std: see `heatmap_grid`.

    Returns:
        The picture, or None where nothing was explained before.
    """
    pairs = [n for n, pair in enumerate(found.pairs) if any(pair in maps for _, maps in before)]
    pairs = pairs[:_CHANGES]
    if not pairs:
        return None
    height, width = found.maps.shape[1:]
    rows, groups, maps, captions, headings = [], [], [], [], []
    names_of_times = ["first", "previous"] if len(before) == 2 else ["previous"]
    for group, n in enumerate(pairs):
        pair = found.pairs[n]
        headings.append(f"{_name(names, pair[1])}\n{float(found.scores[n]):.2f}")
        times = [
            (f"{word}\n{when}", earlier[pair].to(found.maps) / 255)
            for word, (when, earlier) in zip(names_of_times, before, strict=True)
            if pair in earlier
        ]
        moved = drift[n]
        times.append(("now" if moved is None else f"now\ndrift {moved:.2f}", found.maps[n]))
        for caption, each in times:
            rows.append(int(found.rows[n]))
            groups.append(group)
            captions.append(caption)
            maps.append(_enlarged(each, height, width))
    return heatmap_grid(
        probe.images[rows].to(found.maps.device),
        torch.stack(maps),
        captions,
        title=f"{title} · change of the maps",
        mean=mean,
        std=std,
        groups=groups,
        headings=headings,
    )


def _enlarged(map_: Float[Tensor, "i j"], height: int, width: int) -> Float[Tensor, "h w"]:
    if map_.shape == (height, width):
        return map_
    return interpolate(map_[None, None], (height, width), mode="bilinear")[0, 0]


def _captions(probe: Probe, found: Found, names: Sequence[str] | None) -> list[str]:
    """Return the class, its score and AUC for each pair; for a wrong prediction that one as well."""
    logits = found.logits[found.rows]
    predicted = logits.argmax(dim=1)
    columns = (found.targets, found.scores, predicted, found.score(logits, predicted))
    captions = []
    for (target, value, other, higher), area in zip(
        zip(*(c.tolist() for c in columns), strict=True), _areas(found), strict=True
    ):
        wrong = [] if other == target else [f"predicted {_name(names, other)} {higher:.2f}"]
        captions.append(f"{_name(names, target)} {value:.2f}\n{' · '.join(wrong + area)}")
    return captions


def _areas(found: Found) -> list[list[str]]:
    """Return the over-all AUC of each pair in words, nothing where it was not measured."""
    deletion, insertion = found.aucs.cpu().unbind(dim=1)
    overall = (insertion - deletion).tolist()
    # Adding 0 leaves no minus at what is rounded to it.
    return [[] if math.isnan(v) else [f"AUC {round(v, 2) + 0.0:.2f}"] for v in overall]


def _multilabel_captions(probe: Probe, found: Found, names: Sequence[str] | None) -> list[str]:
    assert probe.labels is not None
    positive = (probe.labels[found.rows, found.targets] > 0.5).tolist()
    columns = (found.targets.tolist(), found.scores.tolist(), positive, _areas(found))
    captions = []
    for target, value, labelled, area in zip(*columns, strict=True):
        if labelled:
            verdict = [] if value > 0.5 else ["missed"]
        else:
            verdict = ["false positive" if value > 0.5 else "not in the picture"]
        captions.append(f"{_name(names, target)} {value:.2f}\n{' · '.join(verdict + area)}")
    return captions


def _headings(probe: Probe, found: Found, names: Sequence[str] | None) -> list[str]:
    """Return for each picture which classes were found, missed or made up, beside those drawn."""
    assert probe.labels is not None
    scores = found.logits.sigmoid().cpu()
    positive, over = probe.labels > 0.5, scores > 0.5
    drawn = torch.zeros_like(positive)
    drawn[found.rows, found.targets] = True
    headings = []
    for row in found.rows.unique_consecutive().tolist():
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
