"""What the logger's pictures show of a probe: pages, captions and the change of the maps."""

from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_aop.monitor import panels
from lightning_aop.monitor.explanation import Explanation, Plan
from lightning_aop.monitor.facts import Look
from lightning_aop.monitor.panels import draw_change, draw_probe
from lightning_aop.monitor.probe import Probe
from lightning_aop.scores import sigmoid, softmax
from lightning_aop.view.grid import heatmap_grid

NAMES = ["ant", "bee", "cat", "dog", "emu"]


def random_logits(count: int) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(3))


def explained(
    rows: list[int], targets: list[int], labels: Tensor, drift: list[float | None] | None = None
) -> Explanation:
    """Return an explanation with random images, maps, curves and logits; the last has no curves."""
    generator = torch.Generator().manual_seed(0)
    count, multilabel = len(rows), labels.ndim == 2
    curves = torch.rand(count, 2, 5, generator=generator)
    curves[-1] = torch.nan
    maps = torch.rand(count, 32, 32, generator=generator)
    every = torch.ones(count).bool()
    plan = Plan(
        torch.tensor(rows),
        torch.tensor(targets),
        every,
        every,
        random_logits(len(labels)),
        sigmoid if multilabel else softmax,
    )
    images = torch.rand(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    probe = Probe.from_batch((images, labels), None)
    found = replace(
        Explanation.of(probe, plan, maps, curves, {}, {}, maps.new_zeros(count, 0)),
        look=Look(NAMES),
    )
    return found if drift is None else replace(found, drift=drift)


class Grids:
    """What the grids were asked to show."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setattr(panels, "heatmap_grid", self.grid)

    def grid(self, images: Tensor, maps: Tensor, captions: list[str], **layout: Any) -> Tensor:
        self.calls.append({"images": images, "maps": maps, "captions": captions, **layout})
        return heatmap_grid(images, maps, captions, **layout)


def test_captions_tell_score_auc_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    grids, what = Grids(monkeypatch), explained([0, 1, 2], [0, 1, 2], torch.arange(3))
    list(draw_probe(what, title="t"))
    (call,) = grids.calls
    logits = random_logits(3)
    chances = logits.exp() / logits.exp().sum(1, keepdim=True)
    for n, caption in enumerate(call["captions"]):
        first, *said = caption.split("\n")
        assert first == f"{NAMES[n]} {chances[n, n]:.2f}"
        best = int(chances[n].argmax())
        if best != n:
            assert said.pop() == f"predicted {NAMES[best]} {chances[n, best]:.2f}"
        if n < 2:  # the trapezoid rule with a step of a quarter
            areas = [(c[0] / 2 + c[1] + c[2] + c[3] + c[4] / 2) / 4 for c in what.curves[n]]
            assert said == [f"AUC {areas[1] - areas[0]:.2f}"]
        else:
            assert said == []


def test_of_two_maps_of_an_image_each_says_which_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said = random_logits(2).argmax(dim=1).tolist()
    labels = torch.tensor([(said[0] + 1) % 5, said[1]])  # the first is wrong, the second right
    rows, targets = [0, 0, 1], [int(labels[0]), said[0], said[1]]
    grids = Grids(monkeypatch)
    list(draw_probe(explained(rows, targets, labels), title="t"))
    (call,) = grids.calls
    assert [caption.split("\n")[-1] for caption in call["captions"][:2]] == ["label", "predicted"]
    assert not {"label", "predicted"} & set(call["captions"][2].split("\n"))
    assert call["groups"] == rows


def test_hundreds_of_explanations_take_several_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = Grids(monkeypatch)
    what = explained(list(range(300)), [0] * 300, torch.zeros(300).long())
    sizes = [
        tuple(picture.shape)
        for picture in draw_probe(replace(what, look=Look(NAMES, panels=["map"])), title="epoch 3")
    ]
    assert len(sizes) == 15
    assert max(max(size[1:]) for size in sizes) < 4000
    assert [len(call["captions"]) for call in grids.calls] == [20] * 15
    assert torch.equal(torch.cat([call["maps"] for call in grids.calls]), what.maps)
    assert [c["title"] for c in grids.calls][:2] == ["epoch 3 · 1 of 15", "epoch 3 · 2 of 15"]


@pytest.mark.parametrize("multilabel", [False, True])
def test_of_thousands_of_explanations_some_of_each_picture_are_drawn(
    multilabel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 pictures with five classes each: the first four of every picture."""
    grids = Grids(monkeypatch)
    rows, targets = [n for n in range(80) for _ in range(5)], [*range(5)] * 80
    labels = torch.ones(80, 5) if multilabel else torch.zeros(80).long()
    what = explained(rows, targets, labels)
    list(draw_probe(what, title="epoch 3"))
    drawn = torch.cat([call["maps"] for call in grids.calls])
    assert torch.equal(drawn, what.maps.view(80, 5, 32, 32)[:, :4].flatten(0, 1))
    assert all(c["title"].startswith("epoch 3 · 320 of 400 explanations") for c in grids.calls)


def test_the_classes_of_a_picture_stay_on_one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirteen pictures of three classes, given class by class: six pictures fit 20."""
    grids = Grids(monkeypatch)
    rows, targets = [*range(13)] * 3, [0] * 13 + [1] * 13 + [2] * 13
    what = explained(rows, targets, torch.tensor([[1.0, 1, 0, 0, 0]] * 13))
    list(draw_probe(what, title="t"))
    assert [call["groups"] for call in grids.calls] == [
        [n for n in range(6) for _ in range(3)],
        [n for n in range(6, 12) for _ in range(3)],
        [12] * 3,
    ]
    verdicts = [c.split("\n")[-1] for c in grids.calls[0]["captions"]]
    scores = (1 / (1 + (-random_logits(13)).exp()))[:6, :3].flatten()
    for n, (verdict, score) in enumerate(zip(verdicts, scores, strict=True)):
        labelled = n % 3 < 2
        if score <= 0.5:
            assert verdict == ("missed" if labelled else "not in the image")
        else:
            assert verdict.startswith("AUC" if labelled else "false positive")


def test_change_shows_the_first_the_previous_and_the_map_of_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grids, what = (
        Grids(monkeypatch),
        explained([0, 1, 2], [0, 1, 4], torch.arange(3), [0.25, 0.5, None]),
    )
    generator = torch.Generator().manual_seed(2)
    stored = torch.randint(0, 256, (4, 32, 32), dtype=torch.uint8, generator=generator)
    before = [
        ("before training", {(0, 0): stored[0]}),
        ("epoch 1 · step 7", {(0, 0): stored[1], (1, 1): stored[2], (9, 9): stored[3]}),
    ]
    picture = draw_change(what, before, title="epoch 2")
    assert picture is not None
    (call,) = grids.calls
    assert call["captions"] == [
        "first\nbefore\ntraining",
        "previous\nepoch 1\nstep 7",
        "now\ndrift 0.25",
        "previous\nepoch 1\nstep 7",
        "now\ndrift 0.50",
    ]
    assert call["groups"] == [0, 0, 0, 1, 1]
    expected = [stored[0] / 255, stored[1] / 255, what.maps[0], stored[2] / 255, what.maps[1]]
    assert torch.equal(call["maps"], torch.stack(expected))
    assert torch.equal(call["images"], what.probe.images[[0, 0, 0, 1, 1]])
    assert [text.split("\n")[0] for text in call["headings"]] == ["ant", "bee"]
    assert draw_change(what, [], title="t") is None
    assert draw_change(what, [("t", {})], title="t") is None


def test_maps_of_before_are_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    grids, what = Grids(monkeypatch), explained([0], [0], torch.zeros(1).long(), [0.1])
    half = torch.zeros(8, 8, dtype=torch.uint8)
    half[:, 4:] = 255
    draw_change(what, [("t", {(0, 0): half})], title="t")
    shown = grids.calls[0]["maps"][0]
    assert shown.shape == (32, 32)
    assert (shown[:, :14] == 0).all()
    assert (shown[:, 18:] == 1).all()
    assert grids.calls[0]["captions"][0] == "previous\nt"


def test_the_colours_of_the_map_alone_are_inferno() -> None:
    what = explained([0], [0], torch.zeros(1).long())
    what.maps[:] = 1
    (picture,) = draw_probe(replace(what, look=Look(NAMES, panels=["map"])), title="t")
    colour = np.array(matplotlib.colormaps["inferno"](1.0)[:3])
    brightest = torch.from_numpy(np.round(colour * 255).astype(np.uint8))
    assert int((picture == brightest[:, None, None]).all(0).sum()) >= 128 * 128
