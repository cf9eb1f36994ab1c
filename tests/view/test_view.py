import itertools
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import matplotlib
import numpy as np
import pytest
import torch
from conftest import assert_same
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_aop.view import grid as grids
from lightning_aop.view import heat as overlays
from lightning_aop.view import text as texts
from lightning_aop.view.grid import heatmap_grid
from lightning_aop.view.heat import displayable, overlay
from lightning_aop.view.png import write_png
from lightning_aop.view.table import map_table
from lightning_aop.view.text import font_of, shortened, wrapped


def pictures(count: int = 2, size: tuple[int, int] = (128, 160), channels: int = 3) -> Tensor:
    """Return random bytes as floats, so that every pixel survives the way to uint8 and back."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, *size), generator=generator).float() / 255


def ramps(count: int = 2, size: tuple[int, int] = (128, 160)) -> Tensor:
    return torch.linspace(0, 1, size[1]).expand(count, *size).clone()


def find(grid: Tensor, patch: Tensor) -> list[tuple[int, int]]:
    """Return where the uint8 patch [3, h, w] occurs in the grid, pixel for pixel."""
    _, height, width = patch.shape
    places = (grid == patch[:, :1, :1]).all(0).nonzero().tolist()
    return [(y, x) for y, x in places if torch.equal(grid[:, y : y + height, x : x + width], patch)]


def as_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().byte()


# displayable


def test_pictures_in_range_are_kept_and_others_stretched_one_by_one() -> None:
    images = pictures(3, (4, 5))
    images[1] = images[1] * 8 - 3
    images[2] = images[2] * 0.1 + 0.3
    shown = displayable(images)
    assert torch.equal(shown[0], images[0])
    assert torch.equal(shown[2], images[2])
    low, high = images[1].min(), images[1].max()
    torch.testing.assert_close(shown[1], (images[1] - low) / (high - low))
    overshoot = torch.tensor([-0.002, 0.4, 1.002]).expand(1, 3, 1, 3)
    assert displayable(overshoot)[0, 0, 0].tolist() == pytest.approx([0, 0.4, 1])


def test_mean_and_std_undo_a_normalisation() -> None:
    images = pictures(2, (4, 5))
    mean, std = [0.485, 0.456, 0.406], (0.229, 0.224, 0.225)
    normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(displayable(normalised, mean, std), images)
    clipped = displayable(normalised * 9, mean, std)
    assert [clipped.min().item(), clipped.max().item()] == [0, 1]


@pytest.mark.parametrize(
    ("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (7, [0, 1, 2])]
)
def test_any_number_of_channels_becomes_three(channels: int, shown: list[int]) -> None:
    images = pictures(2, (4, 5), channels)
    assert torch.equal(displayable(images), images[:, shown])
    images[:, 3:] = 1e6  # a channel that isn't shown must not decide how the others are stretched
    assert torch.equal(displayable(images), images[:, shown])


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_pixels_without_a_number_are_black_and_spoil_no_other(scale: float) -> None:
    images = pictures(1, (4, 5)) * scale
    expected = displayable(images)
    images[0, :, 1, 1:4] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    shown = displayable(images)
    assert (shown[0, :, 1, 1:4] == 0).all()
    shown[0, :, 1, 1:4] = expected[0, :, 1, 1:4]
    torch.testing.assert_close(shown, expected, atol=0.05, rtol=0)
    assert (displayable(images, [0.5] * 3, [2.0] * 3)[0, :, 1, 1:4] == 0).all()
    assert (displayable(torch.full((1, 3, 2, 2), float("nan"))) == 0).all()
    assert (displayable(torch.full((1, 3, 2, 2), 7.0)) == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_is_drawn_as_float32(dtype: torch.dtype) -> None:
    images, maps = pictures(1, (8, 8)).to(dtype).requires_grad_(), ramps(1, (8, 8)).to(dtype)
    assert displayable(images).dtype == torch.float32
    drawn = overlay(images, maps)
    assert drawn.dtype == torch.float32
    assert not drawn.requires_grad
    torch.testing.assert_close(drawn, overlay(images.float(), maps.float()))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (pictures()[0],),
            r"images must have shape \[B, C, H, W\].*\[3, 128, 160\].*images\[None\]",
        ),
        ((pictures()[:, :0],), r"C above 0, got \[2, 0, 128, 160\]"),
        ((pictures(), [0.5], [0.5] * 3), r"mean must hold one number.* 3 channels, got 1, \[0.5\]"),
        ((pictures(), [0.5] * 3, [0.5] * 2), "std must hold one number.* 3 channels, got 2"),
        ((pictures(), [0.5] * 3, [0.5, 0.0, 1.0]), r"std must be above 0.*\[0.5, 0.0, 1.0\]: give"),
        ((pictures(), [0.5] * 3), "mean and std must come together, got mean but no std: give std"),
        ((pictures(), None, [0.5] * 3), "got std but no mean: give mean"),
    ],
)
def test_displayable_says_what_is_wrong(arguments: tuple[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        displayable(*arguments)


# overlay


def test_overlay_agrees_with_a_loop_over_pixels() -> None:
    images, maps = pictures(2, (6, 7)), torch.rand(2, 6, 7, generator=torch.manual_seed(3))
    maps[0, 0, :4] = torch.tensor([0.0, 1.0, 0.5, 1 / 256])
    drawn = overlay(images, maps)
    table = matplotlib.colormaps["inferno"]
    for b, y, x in np.ndindex(2, 6, 7):
        value, (red, green, blue) = maps[b, y, x].item(), images[b, :, y, x].tolist()
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        share = 0.85 * value**0.75
        expected = [
            (1 - share) * 0.75 * (0.2 * photo + 0.8 * grey) + share * heat
            for photo, heat in zip((red, green, blue), table(value), strict=False)
        ]
        assert drawn[b, :, y, x].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_cold_region_is_the_photo_darker_and_greyer() -> None:
    images = pictures(1, (40, 40))
    cold = overlay(images, torch.zeros(1, 40, 40))
    grey = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(cold, 0.75 * (0.2 * images + 0.8 * grey))
    both = torch.stack((cold.mean(1).flatten(), images.mean(1).flatten()))
    assert torch.corrcoef(both)[0, 1] > 0.8


def test_equal_values_get_equal_colours_whatever_else_is_drawn() -> None:
    images = torch.full((3, 3, 8, 8), 0.4)
    maps = torch.stack((torch.full((8, 8), 0.3), ramps(1, (8, 8))[0], torch.zeros(8, 8)))
    maps[1:, 2, 2] = 0.3
    colours = overlay(images, maps)[:, :, 2, 2]
    assert torch.equal(colours[0], colours[1])
    assert torch.equal(colours[0], colours[2])
    assert torch.equal(overlay(images[:1], maps[:1])[0, :, 2, 2], colours[0])


def test_on_a_photo_of_one_shade_more_heat_glows_more() -> None:
    bar = overlay(torch.full((1, 3, 1, 256), 0.3), ramps(1, (1, 256)))[0, :, 0]
    luma = (bar * torch.tensor([0.299, 0.587, 0.114])[:, None]).sum(0)
    assert luma[-1] > 0.7
    assert (luma[128:].diff() > 0).all()


def test_values_that_are_no_heat_are_drawn_cold_and_others_clipped() -> None:
    images = pictures(1, (1, 6))
    wild = torch.tensor([float("nan"), float("inf"), -float("inf"), -2.0, 3.0, 0.5])[None, None]
    tame = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.5])[None, None]
    assert torch.equal(overlay(images, wild), overlay(images, tame))


@pytest.mark.usefixtures("unchecked")
def test_overlay_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\].*displayable\(\)"):
        overlay(pictures(channels=1), ramps())
    for maps in (ramps(3), ramps(2, (128, 159)), ramps()[:, None]):
        with pytest.raises(ValueError, match=r"maps must have shape \[2, 128, 160\].*resized"):
            overlay(pictures(), maps)


# heatmap_grid


def test_grid_holds_inputs_and_overlays_pixel_for_pixel_in_reading_order() -> None:
    images, maps = pictures(5), ramps(5)
    grid = heatmap_grid(images, maps, list("abcde"), title="epoch 3 · step 120", columns=2)
    assert (grid.dtype, grid.device.type, grid.is_contiguous()) == (torch.uint8, "cpu", True)
    places = []
    for image, heat in zip(as_bytes(images), as_bytes(overlay(images, maps)), strict=True):
        [(y, x)], [(y_heat, x_heat)] = find(grid, image), find(grid, heat)
        assert y_heat == y
        assert 0 < x_heat - (x + 160) < 10
        places.append((y, x))
    (top, left), (_, right) = places[:2]
    assert [x for _, x in places] == [left, right, left, right, left]
    assert places[1][0] == top < places[2][0] == places[3][0] < places[4][0]


def test_small_pictures_are_enlarged_by_whole_pixels() -> None:
    images, maps = pictures(1, (32, 28)), ramps(1, (32, 28))
    grid = heatmap_grid(images, maps, ["a"])
    large = as_bytes(images)[0].repeat_interleave(7, 1).repeat_interleave(7, 2)
    assert len(find(grid, large)) == 1


@pytest.mark.parametrize("cell", [None, 100])
def test_large_pictures_are_reduced(cell: int | None) -> None:
    images = torch.full((1, 3, 300, 600), 1.0)
    grid = heatmap_grid(images, torch.zeros(1, 300, 600), [""], cell=cell)
    longer = cell or 224
    white = (grid == 255).all(0)
    assert [int(white.sum(axis).max()) for axis in (1, 0)] == [longer, longer // 2]


@pytest.mark.parametrize(("count", "size"), [(1, (224, 224)), (5, (32, 32)), (16, (32, 32))])
@pytest.mark.parametrize("caption", ["a 0.9", "a\nb"])
def test_default_columns_make_a_landscape(count: int, size: tuple[int, int], caption: str) -> None:
    grid = heatmap_grid(pictures(count, size), ramps(count, size), [caption] * count)
    assert 1.1 < grid.shape[2] / grid.shape[1] < 2.5
    tall = heatmap_grid(pictures(count, size), ramps(count, size), [caption] * count, columns=1)
    assert tall.shape[2] == heatmap_grid(pictures(1, size), ramps(1, size), ["a"]).shape[2]


def inferno(values: Tensor) -> Tensor:
    return as_bytes(
        torch.from_numpy(matplotlib.colormaps["inferno"](values.numpy())[..., :3])
    ).permute(2, 0, 1)


def test_more_panels_stand_beside_the_overlay() -> None:
    images, maps = pictures(), ramps()
    curves = torch.full((2, 2, 29), torch.nan)
    curves[0] = torch.tensor([0.25, 0.75])[:, None]
    grid = heatmap_grid(
        images, maps, ["a", "b"], panels=["overlay", "map", "curves"], curves=curves, columns=1
    )
    [(y, x)] = find(grid, as_bytes(images)[0])
    [(overlay_y, overlay_x)] = find(grid, as_bytes(overlay(images, maps))[0])
    heats = find(grid, inferno(maps[0]))
    assert len(heats) == 2
    assert overlay_y == heats[0][0] == y
    seam = overlay_x - x - 160
    assert 0 < seam < 20
    assert heats[0][1] == x + 2 * (160 + seam)
    # Both curves are level: a quarter and three quarters up the axis, each as wide as it.
    left = x + 3 * (160 + seam)
    chart = grid[:, y : y + 128, left : left + 160].permute(1, 2, 0).int()
    rows = {}
    for name, colour in grids._GAMES.items():
        alike = (chart[40:] - torch.tensor(colour)).abs().sum(2) < 60
        long = alike.sum(1) > 130
        assert 1 <= long.sum() <= 4
        rows[name] = 40 + float(long.nonzero().double().mean())
    axis = (chart - torch.tensor(grids._AXIS)).abs().sum(2) < 6
    bottom = float((axis.sum(1) > 130).nonzero().double().mean())
    top = bottom - float(axis.sum(0).max()) + 1
    for name, value in (("deletion", 0.25), ("insertion", 0.75)):
        assert rows[name] == pytest.approx(bottom - value * (bottom - top), abs=1.5)
    # The second has none: no line, but words.
    other = grid[:, heats[1][0] : heats[1][0] + 128, left : left + 160].permute(1, 2, 0).int()
    for colour in grids._GAMES.values():
        assert ((other - torch.tensor(colour)).abs().sum(2) > 60).all()
    assert (other.float().mean(2) > 120).any()


def test_panels_of_a_group_stand_together() -> None:
    images, maps = (
        pictures(1).repeat(3, 1, 1, 1),
        ramps(3) * torch.tensor([1, 0.8, 0.6])[:, None, None],
    )
    grid = heatmap_grid(
        images, maps, ["a", "b", "c"], groups=[0, 0, 1], panels=["map", "overlay"], cell=160
    )
    laid = as_bytes(overlay(images, maps))
    for n in range(3):
        [(y, x)] = find(grid, inferno(maps[n]))
        [(overlay_y, overlay_x)] = find(grid, laid[n])
        assert (overlay_y, 160 < overlay_x - x < 180) == (y, True)
    assert len(find(grid, as_bytes(images)[0])) == 2


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("panels", "curves", "said"),
    [
        ([], None, "one or more"),
        (["heat"], None, "heat"),
        ("map", None, "such as"),
        (["curves"], None, r"shape \[2, 2, points\] to be drawn, got None"),
        (["curves"], torch.zeros(3, 2, 9), r"got \[3, 2, 9\]"),
    ],
)
def test_wrong_panels(panels: Any, curves: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        heatmap_grid(pictures(), ramps(), ["a", "b"], panels=panels, curves=curves)


def changed(first: Tensor, second: Tensor) -> tuple[int, int, int, int]:
    """Return the box (top, bottom, left, right) of what differs."""
    assert first.shape == second.shape
    rows, columns = (first != second).any(0).nonzero(as_tuple=True)
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def test_blank_and_nan_maps_are_labelled_on_their_overlay_and_nowhere_else() -> None:
    images = pictures()
    faint, blank, nan = (torch.zeros(2, 128, 160) for _ in range(3))
    faint[:] = 1e-9  # drawn as nothing, yet not blank
    blank[0] = 1e-9
    nan[0] = 1e-9
    nan[1, 0, 0] = float("nan")
    grids = [heatmap_grid(images, maps, ["a", "b"], columns=2) for maps in (faint, blank, nan)]
    [(y, x)] = find(grids[0], as_bytes(overlay(images, faint))[1])
    for first, second in ((0, 1), (0, 2), (1, 2)):
        top, bottom, left, right = changed(grids[first], grids[second])
        assert y < top < bottom < y + 128
        assert x < left < right < x + 160
    negative = torch.where(blank > 0, blank, -1.0)
    assert torch.equal(heatmap_grid(images, negative, ["a", "b"], columns=2), grids[1])
    infinite = nan.clone()
    infinite[1, 0, 0] = float("inf")
    assert torch.equal(heatmap_grid(images, infinite, ["a", "b"], columns=2), grids[2])


@pytest.mark.parametrize("size", [(32, 32), (200, 3)])
def test_labels_and_texts_are_whole_at_the_smallest_size(size: tuple[int, int]) -> None:
    images = torch.zeros(1, 3, *size)
    labelled = heatmap_grid(images, torch.zeros(1, *size), ["cat 0.5"], cell=32, title="epoch 1")
    bare = heatmap_grid(images, torch.full((1, *size), 1e-9), ["cat 0.5"], cell=32, title="epoch 1")
    top, bottom, left, right = changed(labelled, bare)
    assert bottom - top >= 8
    assert right - left >= 45
    assert right < labelled.shape[2] - 8
    ink = (labelled.float().mean(0) > 200).any(1)
    assert ink.sum() > 20
    untitled = heatmap_grid(images, torch.zeros(1, *size), ["cat 0.5"], cell=32)
    assert untitled.shape[1] < labelled.shape[1]


def drawn_text(caption: str) -> Tensor:
    return heatmap_grid(torch.zeros(1, 3, 128, 128), torch.ones(1, 128, 128), [caption])


def test_long_captions_are_shortened_and_keep_their_score() -> None:
    long = "soft-coated wheaten terrier, " * 4
    assert torch.equal(drawn_text(f"{long} one 0.93"), drawn_text(f"{long} two 0.93"))
    assert not torch.equal(drawn_text(f"{long} 0.93"), drawn_text(f"{long} 0.94"))
    assert torch.equal(drawn_text("9" * 90), drawn_text("9" * 99))
    blank = drawn_text("")
    for caption in (long, f"{long} 0.93", "a " + "9" * 99, "W" * 99):
        _, _, left, right = changed(drawn_text(caption), blank)
        pair = blank.shape[2] - 2 * left
        assert 0.8 * pair < right - left < pair + 2


@hypothesis.given(
    st.text(min_size=1, max_size=80), st.integers(20, 300), st.sampled_from(["", " 0.93", " 12%"])
)
@hypothesis.settings(max_examples=200, deadline=None)
def test_text_is_shortened_as_letter_by_letter(text: str, width: int, score: str) -> None:
    font = font_of("DejaVuSans.ttf", 12)
    whole = " ".join(text.split()) + score  # as captions are
    found = shortened(whole, font, width)
    if font.getlength(whole) <= width:
        assert found == whole
        return
    tail = re.search(r"\s[-+.\d]+%?$", whole)
    end = tail.group() if tail and font.getlength(tail.group()) < width / 2 else ""
    kept = whole.removesuffix(end)
    while kept and font.getlength(f"{kept}…{end}") > width:
        kept = kept[:-1].rstrip()
    assert found == f"{kept}…{end}"


@pytest.mark.parametrize("text", ["n" * 5_000_000, "one, " * 100_000, "\u0301" * 100_000])
def test_the_longest_text_is_shortened_at_once(text: str) -> None:
    font, start = font_of("DejaVuSans.ttf", 12), time.process_time()
    assert font.getlength(shortened(f"{text} 0.93", font, 200)) <= 200
    assert time.process_time() - start < 0.5


def test_a_caption_has_up_to_three_lines() -> None:
    one, two, three = drawn_text("a"), drawn_text("a\nb"), drawn_text("a\nb\nc")
    assert three.shape[1] > two.shape[1] > one.shape[1]
    assert torch.equal(two, drawn_text(" a \n  b\n"))
    assert torch.equal(drawn_text("a\nb\nc d"), drawn_text("a\nb\nc\nd"))
    assert not torch.equal(drawn_text("ä"), drawn_text("ж"))


@pytest.mark.parametrize(("narrow", "count"), [(4, 1), (4, 3), (4, 12), (3, 2), (5, 12)])
def test_a_narrow_grid_is_so_many_panels_wide_whatever_their_number(
    narrow: int, count: int
) -> None:
    """Pairs, or an input and its overlays, of 160 pixels: a picture that doesn't jump."""
    images, maps, texts = pictures(count), ramps(count), ["a"] * count
    widths = set()
    for layout in ({}, {"groups": [0] * count}, {"groups": list(range(count))}):
        grid = heatmap_grid(images, maps, texts, narrow=narrow, **layout)
        side, panels = images.shape[-1], narrow if layout else 2 * (narrow // 2)
        assert panels * side < grid.shape[2] < 1.4 * panels * side
        widths.add((bool(layout), grid.shape[2]))
    assert len(widths) == 2  # of pairs, and of groups
    with pytest.raises(ValueError, match=r"columns=2 and narrow=4 both .*: leave one"):
        heatmap_grid(images, maps, texts, narrow=4, columns=2)
    with pytest.raises(ValueError, match=r"narrow must be 2 or more, .* got 1: leave it out"):
        heatmap_grid(images, maps, texts, narrow=1)


@pytest.mark.parametrize(("size", "factor"), [(28, 5), (32, 4), (64, 2), (96, 2), (128, 1)])
def test_small_images_are_no_larger_in_a_narrow_grid_than_is_legible(
    size: int, factor: int
) -> None:
    images = pictures(1, (size, size))
    grid = heatmap_grid(images, ramps(1, (size, size)), ["a"], narrow=4)
    large = as_bytes(images)[0].repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    assert len(find(grid, large)) == 1


def test_a_long_title_stays_inside() -> None:
    images, maps = pictures(1), ramps(1)
    grid = heatmap_grid(images, maps, ["a"], title="epoch " * 99)
    assert grid.shape == heatmap_grid(images, maps, ["a"], title="epoch 3").shape
    paper = grid[:, :1, :1]
    assert (grid[:, :, -15:] == paper).all()
    assert (grid[:, :, :15] == paper).all()


def test_the_colour_bar_shows_the_colours_of_the_overlay() -> None:
    images, maps = torch.full((1, 3, 140, 144), 0.5), torch.zeros(1, 140, 144)
    grid = heatmap_grid(images, maps, [""])
    em = round(144 / 13)
    ramp = torch.linspace(0, 1, 12 * em)[None, None]
    bar = as_bytes(overlay(torch.full((1, 3, 1, 12 * em), 0.5), ramp))[0]
    assert len(find(grid, bar)) == round(0.7 * em)


def test_drawing_leaves_the_process_as_it_was() -> None:
    images, maps = pictures().requires_grad_(), ramps().requires_grad_()
    kept = images.detach().clone(), maps.detach().clone()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), dict(matplotlib.rcParams)  # type: ignore[index]
    first = heatmap_grid(images, maps, ["a", "b"])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        second = heatmap_grid(images, maps, ["a", "b"])
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), dict(matplotlib.rcParams)  # type: ignore[index]
    assert_same(before, after)
    assert_same(kept, (images.detach(), maps.detach()))
    assert torch.equal(first, second)


def test_importing_it_imports_no_plotting() -> None:
    source = Path(sys.modules[displayable.__module__].__file__ or "")
    code = (
        "import sys, types; package = types.ModuleType('lightning_aop'); "
        f"package.__path__ = [{str(source.parents[1])!r}]; sys.modules['lightning_aop'] = package; "
        "from lightning_aop.view import heatmap_grid; import torch; "
        "assert 'matplotlib' not in sys.modules; "
        "heatmap_grid(torch.rand(1, 3, 8, 8), torch.rand(1, 8, 8), ['a']); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class Copies(TorchDispatchMode):
    """Count the copies from a device to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if any(isinstance(a, Tensor) and a.is_cuda for a in args):
            self.count += not isinstance(out, Tensor) or not out.is_cuda
        return out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_and_is_copied_from_once() -> None:
    images, maps = pictures(3, (300, 260)), ramps(3, (300, 260))
    assert overlay(images, maps.cuda()).is_cuda
    expected = heatmap_grid(images, maps, ["a", "b", "c"])
    with Copies() as copies:  # type: ignore[no-untyped-call]
        grid = heatmap_grid(images.cuda(), maps.cuda(), ["a", "b", "c"])
    assert copies.count == 1
    assert (grid.int() - expected.int()).abs().max() <= 2


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda x, m: heatmap_grid(x, m, ["a"]), "captions must hold 2 texts, .* got 1: give"),
        (lambda x, m: heatmap_grid(x, m, "ab"), "captions must hold 2 texts, .* got the text 'ab'"),
        (
            lambda x, m: heatmap_grid(x, m[:1], ["a", "b"]),
            r"maps .* \[2, 128, 160\] .*\[1, 128, 160",
        ),
        (lambda x, m: heatmap_grid(x, m[:, 1:], ["a", "b"]), r"got \[2, 127, 160\]: .*resized"),
        (lambda x, m: heatmap_grid(x[:0], m[:0], []), r"at least one image .*\[0, 3, 128, 160\]"),
        (lambda x, m: heatmap_grid(x[..., :0], m[..., :0], ["a", "b"]), "at least one pixel"),
        (
            lambda x, m: heatmap_grid(x, m, ["a", "b"], columns=0),
            "columns must be 1 or more, got 0",
        ),
        (lambda x, m: heatmap_grid(x, m, ["a", "b"], cell=8), "cell must be 32 pixels .*, got 8"),
        (lambda x, m: heatmap_grid(x, m, ["a", "b"], mean=[0.5] * 3), "got mean but no std"),
    ],
)
def test_grid_says_what_is_wrong(draw: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(pictures(), ramps())


# write_png


def test_png_holds_the_pixels_and_replaces_an_older_one(tmp_path: Path) -> None:
    first, second = as_bytes(pictures(2, (9, 7)))
    path = tmp_path / "new" / "folder" / "grid.png"
    for picture in (first, second):
        assert write_png(picture, str(path)) == path
        with Image.open(path) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert np.array_equal(np.asarray(image), picture.permute(1, 2, 0).numpy())
    assert list(path.parent.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = as_bytes(pictures(2, (9, 7)))
    path = write_png(first, tmp_path / "grid.png")
    old = path.read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        write_png(second, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("unchecked")
def test_write_png_says_what_is_wrong(tmp_path: Path) -> None:
    for wrong in (pictures()[0], as_bytes(pictures()), as_bytes(pictures())[0, :1]):
        with pytest.raises(ValueError, match=r"image must be torch.uint8 of shape \[3, H, W\]"):
            write_png(wrong, tmp_path / "grid.png")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# outlines and groups


def disc(size: int, y: int, x: int, radius: int) -> Tensor:
    v, u = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return (v - y) ** 2 + (u - x) ** 2 <= radius**2


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("hot", [0.0, 1.0])
def test_an_outline_stands_out_on_any_ground(level: float, hot: float) -> None:
    pictures = torch.full((1, 2, 3, 224, 224), level)
    pictures[:, 1] = overlay(pictures[:, 0], torch.full((1, 224, 224), hot))
    mask = disc(224, 100, 120, 40)[None, None].expand(1, 2, -1, -1)
    drawn = overlays.outlined(pictures, mask)
    luma = torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)
    light = (drawn * luma).sum(2)[0]
    # The ground is even, so what differs is the line, its halo or the ground beside them.
    assert (light.amax((1, 2)) - light.amin((1, 2)) > 0.4).all()


def test_an_outline_is_the_inner_border_of_the_mask() -> None:
    pictures = torch.full((2, 1, 3, 60, 50), 0.5)
    masks = torch.stack([disc(60, 30, 20, 12)[:, :50], torch.zeros(60, 50).bool()])[:, None]
    drawn = overlays.outlined(pictures, masks)
    assert torch.equal(drawn[1], pictures[1]), "an empty mask has no outline"
    mask = masks[0, 0].numpy()
    line = np.zeros_like(mask)
    for y in range(60):
        for x in range(50):
            near = mask[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            line[y, x] = mask[y, x] and not near.all()
    colour = torch.tensor(overlays.LINE).view(3, 1, 1)
    np.testing.assert_array_equal((drawn[0, 0] == colour).all(0).numpy(), line)


def test_outlines_are_drawn_on_both_panels_and_explained() -> None:
    images, maps = torch.full((1, 3, 64, 64), 0.5), torch.zeros(1, 64, 64)
    mask = disc(64, 32, 32, 20)[None]
    plain = heatmap_grid(images, maps, ["a"], outlines=torch.zeros_like(mask))
    drawn = heatmap_grid(images, maps, ["a"], outlines=mask)
    columns = (plain != drawn).any(0).any(0).nonzero()[:, 0]
    assert int(columns.max() - columns.min()) > 192, "both panels"
    line = torch.tensor(overlays.LINE).mul(255).round().byte()[:, None, None]
    assert (plain == line).all(0).sum() > 20, "the legend has a sample of the line"
    assert not (heatmap_grid(images, maps, ["a"]) == line).all(0).any()


def test_a_group_shows_its_input_once_with_all_outlines() -> None:
    images = torch.rand(3, 3, 64, 64)
    images[1] = images[0]
    maps = torch.zeros(3, 64, 64)
    masks = torch.stack([disc(64, 16, 16, 8), disc(64, 48, 48, 8), disc(64, 32, 32, 8)])
    panels, _ = grids.panels_of(images[[0, 2]], maps, 64, masks, [[0, 1], [2]])
    line = np.round(np.array(overlays.LINE) * 255).astype(np.uint8)
    lines = (panels == line).all(-1)
    inner = torch.stack([disc(64, 16, 16, 8), disc(64, 48, 48, 8)]).any(0).numpy()
    assert lines[0, 0][inner].sum() == lines[0, 0].sum() > 0
    assert lines[0, 0].sum() == lines[0, 1].sum() + lines[1, 1].sum(), "the input has both"
    # Three panels and two, against three pairs: the input that is shown twice is gone.
    grouped = heatmap_grid(images, maps, ["a"] * 3, groups=[4, 4, 7], cell=64)
    background = (grouped == torch.tensor(texts.PAPER, dtype=torch.uint8)[:, None, None]).all(0)
    pairs = heatmap_grid(images, maps, ["a"] * 3, cell=64)
    empty = (pairs == torch.tensor(texts.PAPER, dtype=torch.uint8)[:, None, None]).all(0)
    saved = int((~empty).sum()) - int((~background).sum())
    assert 0.8 * 64 * 64 < saved < 1.2 * 64 * 64


def test_tiles_do_not_overlap_and_rows_keep_to_their_width() -> None:
    sizes = [(100, 50), (300, 50), (120, 80), (500, 50), (90, 50)]
    for limit in (90, 300, 420, 1200):
        places = grids._flow(sizes, limit)
        boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(places, sizes, strict=True)]
        for i, a in enumerate(boxes):
            assert a[2] <= limit or a[0] == 0, "wider than the row only where it stands alone"
            for b in boxes[i + 1 :]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def grouped(
    sizes: list[int], size: tuple[int, int], captions: list[str] | None = None, **layout: Any
) -> tuple[Tensor, list[list[tuple[int, int]]]]:
    """Return a grid of groups, and where the input and the overlays of each group are in it."""
    count = sum(sizes)
    groups = [i for i, n in enumerate(sizes) for _ in range(n)]
    generator = torch.Generator().manual_seed(1)
    images, maps = pictures(len(sizes), size)[groups], torch.rand(count, *size, generator=generator)
    grid = heatmap_grid(images, maps, captions or ["a"] * count, groups=groups, **layout)
    heats = iter(as_bytes(overlay(images, maps)))
    places = []
    for i, n in enumerate(sizes):
        patches = [as_bytes(images)[groups.index(i)], *(next(heats) for _ in range(n))]
        found = [find(grid, patch) for patch in patches]
        assert all(len(f) == 1 for f in found), "each panel is there once, pixel for pixel"
        places.append([f[0] for f in found])
    return grid, places


def test_groups_are_whole_apart_and_in_reading_order() -> None:
    grid, places = grouped([1, 4, 2, 3, 1, 7], (128, 160))
    assert 1.1 < grid.shape[2] / grid.shape[1] < 2.3
    for (y, x), *heats in places[:5]:
        assert {row for row, _ in heats} == {y}, "not split"
        gaps = np.diff([x, *(at for _, at in heats)]) - 160
        assert (gaps > 0).all()
        assert (gaps < 10).all(), "close together"
    ends = [(group[0], group[-1]) for group in places]
    for (_, (y, x)), ((next_y, next_x), _) in itertools.pairwise(ends):
        assert (next_y == y and next_x >= x + 160 + 15) or next_y > y + 128
    (top, left), *heats = places[5]
    rows = sorted({y for y, _ in heats})
    assert rows[0] == top < rows[1] - 128, "seven are too many for one row"
    assert sum(y == top for y, _ in heats) == 4
    assert all(x > left for _, x in heats)


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (224, 40), (40, 224)])
def test_texts_of_neighbours_do_not_touch(size: tuple[int, int]) -> None:
    heads = [f"missed: {'W' * 40} 0.12\nfalse: {'M' * 40} 0.55"]
    long = [f"{'W' * 40} 0.{i}\n{'M' * 40}" for i in range(10, 13)]
    cell = max(size)
    whole, [places] = grouped([3], size, long, headings=heads, cell=cell)
    right = [x for _, x in places[1:]] + [whole.shape[2]]
    for i, start in enumerate(x for _, x in places):
        fewer, texts = list(heads), list(long)
        if i:
            texts[i - 1] = "\n"
        else:
            fewer = ["\n"]
        without, _ = grouped([3], size, texts, headings=fewer, cell=cell)
        below = places[0][0] + size[0]
        _, _, first, last = changed(whole[:, below:], without[:, below:])
        assert start <= first
        assert last < right[i] - 3


@pytest.mark.parametrize("size", [(32, 32), (224, 40)])
def test_narrow_panels_of_a_group_keep_scores_verdicts_and_labels(size: tuple[int, int]) -> None:
    images, maps = torch.zeros(2, 3, *size), torch.full((2, *size), 1e-9)

    def drawn(captions: list[str], maps: Tensor = maps) -> Tensor:
        return heatmap_grid(images, maps, captions, groups=[0, 0], cell=max(size))

    long = "W" * 30
    first = drawn([f"{long} 0.93\nfalse positive", "b"])
    assert not torch.equal(first, drawn([f"{long} 0.94\nfalse positive", "b"])), "score"
    assert not torch.equal(first, drawn([f"{long} 0.93\nfalse positivW", "b"])), "verdict"
    blank = [maps.clone() for _ in range(2)]
    for i in range(2):
        blank[i][i] = 0
    plain = drawn(["a", "b"])
    boxes = [changed(plain, drawn(["a", "b"], m)) for m in blank]
    assert boxes[0][3] - boxes[0][2] == boxes[1][3] - boxes[1][2], "both labels are whole"
    assert boxes[0][3] < boxes[1][2]


def test_a_shortened_heading_keeps_no_score_of_another_class() -> None:
    images, maps = torch.zeros(1, 3, 64, 64), torch.ones(1, 64, 64)

    def drawn(heading: str) -> Tensor:
        return heatmap_grid(images, maps, ["a"], groups=[0], headings=[heading], cell=64)

    assert torch.equal(drawn(f"missed: {'W' * 40} 0.12"), drawn(f"missed: {'W' * 40} 0.93"))
    assert not torch.equal(drawn("chair 0.12"), drawn("chair 0.93"))


@pytest.mark.parametrize("cell", [64, 224])
def test_outlines_follow_whole_pixels_and_small_objects_stay(cell: int) -> None:
    masks = torch.zeros(2, 448, 448).bool()
    masks[0, 200:202, 200:202] = True
    masks[1, 100, 50:400] = True
    line = torch.tensor(overlays.LINE).mul(255).round().byte().numpy()
    large = torch.full((2, 3, 448, 448), 0.5)
    panels, _ = grids.panels_of(large, torch.zeros(2, 448, 448), cell, masks, [[0], [1]])
    drawn = (panels[:, 1] == line).all(-1)
    assert drawn[0].any()
    assert drawn[1].any(0).sum() >= 350 * cell // 448
    blocky = disc(16, 7, 8, 5)[None]
    panels, _ = grids.panels_of(
        torch.full((1, 3, 16, 16), 0.5), torch.zeros(1, 16, 16), 96, blocky, [[0]]
    )
    drawn = (panels[0, 0] == line).all(-1)
    inside = blocky[0].repeat_interleave(6, 0).repeat_interleave(6, 1).numpy()
    assert not drawn[~inside].any()
    border = inside & ~np.roll(inside, 1, 0)
    assert drawn[border].all()


def test_verdicts_have_their_colours() -> None:
    images, maps = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64)
    for verdict, colour in texts.VERDICTS.items():
        picture = heatmap_grid(images, maps, [f"dog 0.31\n{verdict}", "cat 0.9"], groups=[0, 1])
        same = (picture == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0)
        assert same.sum() > 20


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"outlines": torch.zeros(2, 8, 9).bool()},
            r"outlines must be torch.bool of shape \[2, 8, 8\]",
        ),
        ({"outlines": torch.zeros(2, 8, 8)}, "got torch.float32"),
        ({"groups": [1]}, "groups must hold 2 numbers, one per image, got 1: give"),
        ({"groups": [1, 1], "columns": 2}, "columns=2 counts pairs"),
        ({"groups": [1, 1], "headings": ["a", "b"]}, "headings must hold 1 texts, one a group"),
        (
            {"groups": [1, 1], "headings": "a"},
            "headings must hold 1 texts.* got the text 'a': give",
        ),
        ({"headings": ["a", "b"]}, "headings must come with groups, got 2 but no groups: give"),
    ],
)
def test_layouts_that_do_not_fit_are_told(layout: Any, message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        heatmap_grid(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8), ["a", "b"], **layout)


def table_of(count: int, many: int, **more: Any) -> Tensor:
    maps = torch.rand(count, many, 24, 32, generator=torch.Generator().manual_seed(2))
    rows = [list(row) for row in maps]
    captions = [[f"overall 0.{i}{j}\nsmall" for j in range(many)] for i in range(count)]
    return map_table(
        torch.rand(count, 3, 24, 32, generator=torch.Generator().manual_seed(3)),
        rows,
        [f"method {j}" for j in range(many)],
        captions,
        [f"class {i}" for i in range(count)],
        **more,
    )


def test_a_table_has_a_row_for_each_image_and_bands_of_columns() -> None:
    one, wide = table_of(1, 2, cell=96), table_of(1, 4, cell=96)
    step = 96 + 5  # the panel and the gap
    assert wide.shape[2] - one.shape[2] == 2 * step
    two = table_of(2, 2, cell=96)
    row = two.shape[1] - one.shape[1]
    assert 72 + 30 < row < 72 + 90
    bands = table_of(1, 4, cell=96, abreast=2)
    assert bands.shape[2] == one.shape[2]
    assert bands.shape[1] > one.shape[1] + row


@hypothesis.given(st.text("ab ", max_size=80), st.integers(30, 300))
def test_a_text_is_wrapped_without_losing_a_word(text: str, width: int) -> None:
    font = font_of("DejaVuSans.ttf", 12)
    lines = wrapped(text, font, width)
    assert all(line and font.getlength(line) <= width for line in lines)
    words = [shortened(word, font, width) for word in text.split()]
    assert " ".join(lines).split() == words
    # No line could take the first word of the next.
    for line, after in itertools.pairwise(lines):
        assert font.getlength(f"{line} {after.split()[0]}") > width


def test_what_follows_the_title_of_a_grid_takes_the_lines_that_it_needs() -> None:
    images, maps = torch.rand(1, 3, 64, 64), torch.rand(1, 64, 64)
    plain, one, many = (
        heatmap_grid(images, maps, ["a"], title=f"net{note}") for note in ("", "\nof", "\nof " * 40)
    )
    line = one.shape[1] - plain.shape[1]
    assert line > 0
    assert (many.shape[1] - plain.shape[1]) % line == 0
    assert many.shape[1] > one.shape[1]
    assert plain.shape[2] == one.shape[2] == many.shape[2]


def test_what_follows_the_title_of_a_table_takes_the_lines_that_it_needs() -> None:
    plain, named = table_of(1, 1, cell=96), table_of(1, 1, cell=96, title="net")
    explained = [
        table_of(1, many, cell=96, title="net\n" + "lower is better " * 6) for many in (1, 6)
    ]
    heights = [picture.shape[1] for picture in (plain, named, *explained)]
    assert heights[0] < heights[1] < heights[3] < heights[2]
    assert torch.equal(explained[0][:, -plain.shape[1] + 40 :], plain[:, 40:])


def test_every_map_of_a_table_is_the_overlay_of_its_own_image() -> None:
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    maps = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    picture = map_table(
        images, [list(row) for row in maps], list("abc"), [list("xyz")] * 2, list("pq"), cell=40
    )
    found = picture.permute(1, 2, 0).numpy().astype(int)

    def places(panel: Tensor) -> list[tuple[int, int]]:
        wanted = (panel * 255).round().permute(1, 2, 0).numpy().astype(int)
        rows, columns = np.nonzero((found[:-39, :-39] == wanted[0, 0]).all(axis=2))
        return [
            (y, x)
            for y, x in zip(rows.tolist(), columns.tolist(), strict=True)
            if (found[y : y + 40, x : x + 40] == wanted).all()
        ]

    where = {}
    for i in range(2):
        [where[i, "input"]] = places(images[i])
        for j in range(3):
            [where[i, j]] = places(overlay(images[i : i + 1], maps[i : i + 1, j])[0])
    for i in range(2):
        assert len({where[i, k][0] for k in ("input", 0, 1, 2)}) == 1
        assert where[i, "input"][1] < where[i, 0][1] < where[i, 1][1] < where[i, 2][1]
    assert where[0, 0][0] < where[1, 0][0]


def test_missing_and_blank_maps_and_the_best_are_marked() -> None:
    images, some = torch.rand(1, 3, 64, 64), torch.rand(64, 64)

    def draw(maps: list[Tensor | None], best: list[int | None] | None = None) -> Tensor:
        captions = [["0.1", "0.2"]]
        return map_table(images, [maps], ["a", "b"], captions, ["cat"], best=best, cell=64)

    whole, missing = draw([some, some]), draw([some, None])
    blank = draw([some, torch.zeros(64, 64)])
    assert not torch.equal(whole, missing)
    assert not torch.equal(missing, blank)  # "no map" and "blank map"
    green = torch.tensor([134, 239, 172], dtype=torch.uint8)
    assert not (whole == green[:, None, None]).all(dim=0).any()
    marked = (draw([some, some], [1]) == green[:, None, None]).all(dim=0)
    assert marked.any()
    assert marked.nonzero()[:, 1].min() > whole.shape[2] / 2


def test_maps_of_a_table_may_be_shares_of_a_percentile() -> None:
    faint = 0.1 * torch.rand(64, 64, generator=torch.Generator().manual_seed(2))
    outshone = faint.clone()
    outshone[3, 3] = 1.0

    def draw(found: Tensor, percentile: int | None) -> Tensor:
        return map_table(
            torch.full((1, 3, 64, 64), 0.5),
            [[found]],
            ["a"],
            [[""]],
            [""],
            cell=64,
            percentile=percentile,
        )

    def heat(picture: Tensor) -> float:
        return float((picture[0].float() - picture[2].float()).clamp(min=0).sum())

    assert heat(draw(outshone, 99)) > 3 * heat(draw(outshone, None))
    expected = (outshone / outshone.quantile(0.9)).clamp(max=1)
    # Above the colour bar, whose text differs.
    assert torch.equal(draw(outshone, 90)[:, :100], draw(expected, None)[:, :100])
    sparse = torch.zeros(64, 64)
    sparse[5, 5] = 1.0
    assert torch.equal(draw(sparse, 99)[:, :100], draw(sparse, None)[:, :100])


@pytest.mark.usefixtures("unchecked")
def test_a_table_says_what_does_not_fit() -> None:
    images, one = torch.rand(1, 3, 32, 32), torch.rand(32, 32)
    with pytest.raises(ValueError, match=r"maps must hold 2 entries.*for each of the 1 images"):
        map_table(images, [[one]], ["a", "b"], [["x", "y"]], ["cat"])
    with pytest.raises(ValueError, match=r"captions must hold 1 entries, .* got \[2\]"):
        map_table(images, [[one]], ["a"], [["x", "y"]], ["cat"])
    with pytest.raises(ValueError, match=r"headings must hold a text for each of the 1 images"):
        map_table(images, [[one]], ["a"], [["x"]], [])
