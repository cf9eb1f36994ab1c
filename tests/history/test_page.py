"""What the page of a run says of it and shows in a browser: its verdict, filters, comparisons, live."""

import functools
import http.server
import importlib
import math
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from pages import NONE, Page, decoded, overall, save, synthetic, written

from lightning_aop.history.failures import FailureRecord, url_of
from lightning_aop.history.report import (
    add_failures_to_report,
    add_to_report,
    end_report,
    page,
    write_comparison,
    write_report,
)
from lightning_aop.history.store import History
from lightning_aop.metrics.functional import BLUR, saliency_ranks
from lightning_aop.view.heat import overlay

IMAGES = 8


def run(
    records: int = 4, images: int = IMAGES, seed: int = 0, masked: bool = True, **changes: Any
) -> History:
    """Return a run that goes well: all right, sure, faithful, and with the heat on the object."""
    history = synthetic(
        records=records, explanations=images, pictures=images, classes=3, size=48, map_size=24
    )
    random = np.random.default_rng(seed)
    masks = {}
    for k in range(images):
        mask = np.zeros((48, 48), bool)
        mask[12:24, 12 : 24 + k] = True
        masks[k, k % 3] = mask
    made = []
    for r, record in enumerate(history.records):
        trained = r > 0
        auc = random.normal(0.1 + 0.15 * r, 0.05, images)
        made.append(
            replace(
                record,
                step=40 * r,
                epoch=max(r - 1, 0),
                title="before training" if r == 0 else f"epoch {r - 1} · step {40 * r}",
                values={"overall_auc": float(auc.mean()), "drift": 0.05},
                scores=[0.95 - 0.01 * k for k in range(images)],
                blank=[False] * images,
                drift=[0.05 if trained else None] * images,
                deletion_auc=[0.1] * images,
                insertion_auc=[0.1 + float(value) for value in auc],
                controls={"centre gaussian": {"overall_auc": 0.2}} if r == 1 else {},
                predicted=list(record.targets),
                verdicts=["right"] * images,
                energy=[0.6 + 0.02 * (k % 3) for k in range(images)],
                hits=[1.0] * images,
                peaks=[[0.35, 0.35]] * images,
                away=[0.0] * images,
            )
        )
    return replace(history, masks=masks if masked else {}, records=made, **changes)


def last(history: History, **changes: Any) -> History:
    """Give the last record other values."""
    *before, record = history.records
    return replace(history, records=[*before, replace(record, **changes)])


def sentences(shown: Page) -> dict[str, bool]:
    """Return what the page says, and whether it says so in red."""
    found = shown.js(
        "return [...document.querySelectorAll('#answers li')]"
        ".map(li => [li.innerText, li.dataset.bad === 'true', getComputedStyle(li.firstChild).color])"
    )
    red = shown.js(
        "const p = document.createElement('p'); p.style.color = 'var(--bad)'; document.body.append(p);"
        "const c = getComputedStyle(p).color; p.remove(); return c"
    )
    assert all((colour == red) == bad for _, bad, colour in found)
    return {re.sub(r"Wrong:\s*", "", text).replace("\xa0", " "): bad for text, bad, _ in found}


def student(values: np.ndarray) -> str:
    """Return a mean and half of its 95 % interval, by scipy."""
    low, high = scipy.stats.t.interval(
        0.95, len(values) - 1, values.mean(), scipy.stats.sem(values)
    )
    return f"{written(values.mean())} ± {written((high - low) / 2)}"


def cases(shown: Page) -> dict[int, list[str]]:
    found = shown.js(
        "return [...document.querySelectorAll('#cases-grid figure')]"
        ".map(f => [+f.dataset.index, [...f.querySelectorAll('.why')].map(w => w.textContent)])"
    )
    return {k: [reason.replace("\xa0", " ") for reason in why] for k, why in found}


def index(shown: Page) -> list[int]:
    return list(
        shown.js("return [...document.querySelectorAll('#grid figure')].map(f => +f.dataset.index)")
    )


def choose(shown: Page, selector: str, value: str) -> None:
    shown.js(
        "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
        "if (s.value !== arguments[1]) throw new Error(`no ${arguments[1]} in ${s.innerText}`);"
        "s.dispatchEvent(new Event('change'));",
        selector,
        value,
    )
    shown.settle()


# ---- the verdict ------------------------------------------------------------------------------------


def test_the_verdict_is_of_the_runs_own_numbers(browser: Any, tmp_path: Path) -> None:
    history = run()
    first, end = history.records[0], history.records[-1]
    auc = np.array([overall(end, k) or 0.0 for k in range(IMAGES)])
    rise = auc - [overall(first, k) or 0.0 for k in range(IMAGES)]
    area = np.mean([mask.mean() for mask in history.masks.values()])
    shown = Page(browser, history, tmp_path)
    assert sentences(shown) == {
        f"Hottest pixel on the object in 8 of 8, by chance {IMAGES * area:.1f}": False,
        f"{student(np.array(end.energy, float))} of the heat on the objects, which cover "
        f"{written(area)} of the image": False,
        "8 of 8 right": False,
        f"Overall AUC rose by {student(rise)} since the start": False,
        "Maps settled since the start": False,
        f"Overall AUC {written(auc.mean())}, centre gaussian 0.20: maps beat a guess by "
        f"{student(auc - 0.2)} (± of the maps alone)": False,
    }
    assert cases(shown) == {}
    assert not browser.find_element("id", "cases").is_displayed()
    shown.assert_sound()


def measured(history: History, record: int, aucs: np.ndarray) -> History:
    """Give a record the overall AUC of each centre gaussian."""
    found = {
        "controls": {"centre gaussian": {"overall_auc": float(aucs.mean())}},
        "control_aucs": {"centre gaussian": aucs.tolist()},
    }
    records = list(history.records)
    records[record] = replace(records[record], **found)
    return replace(history, records=records)


def trust(shown: Page) -> str:
    (found,) = [text for text in sentences(shown) if "centre gaussian" in text]
    return found


def test_maps_beat_a_guess_by_the_differences_for_the_same_image(
    browser: Any, tmp_path: Path
) -> None:
    """What an image gives any map does not widen the interval of the difference."""
    history = run()
    auc = np.array([overall(history.records[-1], k) or 0.0 for k in range(IMAGES)])
    guess = auc - 0.4 + 0.02 * np.random.default_rng(3).normal(size=IMAGES)
    # The last measurement holds, also when the explanations were in another order then.
    turned = {
        name: values[::-1]
        for name, values in vars(history.records[2]).items()
        if isinstance(values, list)
    }
    records = [replace(r, **turned) if n == 2 else r for n, r in enumerate(history.records)]
    history = measured(measured(replace(history, records=records), 1, guess + 0.3), 2, guess[::-1])
    shown = Page(browser, history, tmp_path)
    low, high = scipy.stats.ttest_rel(auc, guess).confidence_interval()
    expected = f"{written((auc - guess).mean())} ± {written((high - low) / 2)}"
    assert trust(shown) == (
        f"Overall AUC {written(auc.mean())}, centre gaussian {written(guess.mean())}: "
        f"maps beat a guess by {expected}"
    )
    assert student(auc - 0.2).split()[-1] != expected.split()[-1]
    shown.assert_sound()
    # Without a guess for each of the maps there is no difference of each.
    fewer = np.where(np.arange(IMAGES) == 2, np.nan, guess)
    history = measured(run(), 2, guess)
    missing = {"centre gaussian": [None if math.isnan(value) else value for value in fewer]}
    records = [replace(r, control_aucs=missing) if r.control_aucs else r for r in history.records]
    shown = Page(browser, replace(history, records=records), tmp_path)
    assert trust(shown) == (
        f"Overall AUC {written(auc.mean())}, centre gaussian {written(guess.mean())}: "
        f"maps beat a guess by {student(auc - guess.mean())} (± of the maps alone)"
    )


def test_several_maps_of_an_image_count_once_in_an_interval(browser: Any, tmp_path: Path) -> None:
    """With the same maps twice an interval is that of once."""
    once, twice = run(), run()
    double = [
        replace(
            record,
            **{name: value * 2 for name, value in vars(record).items() if isinstance(value, list)},
            first=2 * record.first,
        )
        for record in twice.records
    ]
    maps = np.concatenate([np.tile(once.maps[r.first : r.end], (2, 1, 1)) for r in once.records])
    twice = replace(twice, records=double, maps=maps)
    beat = []
    for history in (once, twice):
        shown = Page(browser, history, tmp_path)
        beat += [text for text in sentences(shown) if "beat a guess" in text]
        assert "8 images" in shown.js("return document.getElementById('verdict-note').innerText")
    assert beat[0] == beat[1]


@pytest.mark.parametrize("auc", [0.2, 0.0])
def test_maps_that_do_not_beat_a_guess_are_said_to(
    auc: float, browser: Any, tmp_path: Path
) -> None:
    values = [0.1 + auc + 0.01 * (-1) ** k for k in range(IMAGES)]
    shown = Page(browser, last(run(), insertion_auc=values), tmp_path)
    said = [text for text, bad in sentences(shown).items() if bad and "centre gaussian" in text]
    assert len(said) == 1
    assert ("not clearly better than a guess" if auc else "worse than a guess by 0.20") in said[0]


def test_nothing_is_said_that_the_numbers_do_not_carry(browser: Any, tmp_path: Path) -> None:
    history = run(records=1, images=1)
    none: dict[str, Any] = {
        name: [] for name in ("energy", "hits", "away", "peaks", "verdicts", "predicted")
    }
    history = last(history, **none, deletion_auc=[], insertion_auc=[], controls={}, step=0)
    shown = Page(browser, replace(history, masks={}), tmp_path)
    assert sentences(shown) == {
        "The data has no masks: whether the heat is on the objects is for you to see": False,
        "Not trained yet": False,
        "How faithful the maps are was not measured": False,
    }
    assert "±" not in shown.js("return document.body.innerText")
    shown.assert_sound()


def test_blank_maps_are_said_to_be(browser: Any, tmp_path: Path) -> None:
    history = last(run(), blank=[True] * IMAGES, energy=[None] * IMAGES, hits=[None] * IMAGES)
    shown = Page(browser, history, tmp_path)
    found = sentences(shown)
    assert found["All 8 maps are blank: they show nothing"]
    assert not [text for text in found if "beat" in text]
    shown = Page(browser, last(run(), blank=[True, *[False] * (IMAGES - 1)]), tmp_path)
    assert sentences(shown)["1 of 8 maps blank"]


def test_the_same_corner_in_many_images_comes_first(browser: Any, tmp_path: Path) -> None:
    corner = [[0.98, 0.97]] * 7 + [[0.35, 0.35]]
    away = [0.6] * 7 + [0.0]
    history = last(
        run(), peaks=corner, away=away, energy=[0.05] * 7 + [0.6], hits=[0.0] * 7 + [1.0]
    )
    shown = Page(browser, history, tmp_path)
    found = sentences(shown)
    assert found["The lower right corner is hottest in 7 of 8 images"]
    assert found["The maps show what the model uses: it is the model that looks elsewhere"] is False
    fell = [text for text, bad in found.items() if bad and text.startswith("Energy in mask fell")]
    assert len(fell) == 1
    assert "at epoch 2, from 0.62 by" in fell[0]
    listed = cases(shown)
    assert 7 not in listed
    assert set(listed[0]) == {
        "hottest in the lower right corner, as in 6 others",
        "right with 0.95, the heat off the object",
        "energy in mask 0.60 → 0.05 at epoch 2",
    }
    # On top: before the time and the images.
    above = shown.js(
        "return ['answers', 'cases-grid', 'player', 'grid'].map(id =>"
        " document.getElementById(id).getBoundingClientRect().top)"
    )
    assert above == sorted(above)
    # A sentence leads to what it speaks of, and a case opens.
    shown.js("document.querySelector('#answers li[data-bad=true] button').click()")
    assert shown.js("return document.activeElement.closest('#cases-grid') !== null")
    shown.click("#cases-grid figure:nth-child(2) .open")
    assert browser.find_element("id", "detail").is_displayed()
    assert shown.js("return document.querySelector('#grid [data-open=true]').dataset.index") == "1"
    shown.assert_sound()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_real_shortcut_is_found_unprompted(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    main = importlib.import_module("shortcut").main
    found = {}
    for tags in (0.95, 0.0):
        main(tags=tags, output=tmp_path / str(tags))
        (folder,) = (tmp_path / str(tags)).rglob("explanations")
        shown = Page(browser, History.load(folder), tmp_path)
        found[tags] = [text for text, bad in sentences(shown).items() if bad], cases(shown)
    said, listed = found[0.95]
    assert any(text.startswith("The lower right corner is hottest in") for text in said)
    assert len(listed) == 6
    assert not any("corner" in text for text in found[0.0][0])


def test_chance_and_the_middle_are_no_suspects(browser: Any, tmp_path: Path) -> None:
    """Three of eight in a corner may be chance; without masks the middle is where objects are."""
    few = last(run(), peaks=[[0.98, 0.97]] * 3 + [[0.35, 0.35]] * 5, away=[0.6] * 3 + [0.0] * 5)
    shown = Page(browser, few, tmp_path)
    assert not [text for text in sentences(shown) if "corner" in text]
    middle = last(run(masked=False), peaks=[[0.5, 0.5]] * 8, away=[None] * 8, energy=[None] * 8)
    shown = Page(browser, middle, tmp_path)
    assert not any(sentences(shown).values())


def test_what_is_newly_wrong_comes_first(browser: Any, tmp_path: Path) -> None:
    history = run()
    targets = list(history.records[-1].targets)
    wrong = ["right"] * 7 + ["missed"]
    shown = Page(browser, last(history, verdicts=wrong, predicted=targets), tmp_path)
    assert sentences(shown)["1 newly missed since epoch 1"]
    assert cases(shown) == {7: ["right at epoch 1, now missed"]}
    assert "7 of 8 right · 1 missed" in sentences(shown)


# ---- cards ------------------------------------------------------------------------------------------


def test_cards_are_filtered_and_sorted(browser: Any, tmp_path: Path) -> None:
    history = synthetic(explanations=16, classes=6)
    shown = Page(browser, history, tmp_path)
    record = history.records[-1]
    wrong = [k for k in range(16) if record.verdicts[k] == "wrong"]
    choose(shown, "#only-verdict", "not right")
    assert index(shown) == wrong
    text = shown.js("return document.getElementById('shown-count').innerText")
    assert text == f"{len(wrong)} of 16 shown"
    choose(shown, "#only-class", "5")
    assert index(shown) == [k for k in wrong if record.targets[k] == 5]
    choose(shown, "#only-verdict", "")
    choose(shown, "#only-class", "")
    none = math.inf
    orders = {
        "score": record.scores,
        "sure": [-score for score in record.scores],
        "auc": [none if overall(record, k) is None else overall(record, k) for k in range(16)],
        "changed": [none if each is None else -each for each in record.drift],
        "off": [none if each is None else each for each in record.energy],
    }
    for name, values in orders.items():
        choose(shown, "#sort", name)
        assert index(shown) == sorted(range(16), key=lambda k: values[k]), name  # which is stable
    # A filter stays from time to time.
    choose(shown, "#sort", "")
    choose(shown, "#only-verdict", "wrong")
    shown.click("#first")
    assert index(shown) == [k for k in range(16) if history.records[0].verdicts[k] == "wrong"]
    shown.assert_sound()


def test_no_line_of_a_card_parts_a_number_from_its_name(browser: Any, tmp_path: Path) -> None:
    for width in (360, 390, 1400):
        shown = Page(browser, synthetic(), tmp_path, width=width)
        lines = shown.js(
            "return [...document.querySelectorAll('figcaption .facts > span')]"
            ".map(s => s.getClientRects().length)"
        )
        assert set(lines) == {1}


# ---- two of anything --------------------------------------------------------------------------------


def test_two_times_stand_side_by_side(browser: Any, tmp_path: Path) -> None:
    history = synthetic(size=176, records=4)
    shown = Page(browser, history, tmp_path)
    canvas = "#grid figure[data-index='1'] canvas"
    now = shown.pixels(canvas)
    shown.click("#previous")
    then = shown.pixels(canvas)
    shown.click("#pin")
    shown.click("#next")
    half = shown.pixels(canvas)
    assert (half[:, :80] == then[:, :80]).all()
    assert (half[:, 96:] == now[:, 96:]).all()
    shown.js(
        "const s = document.getElementById('split'); s.value = 25; s.dispatchEvent(new Event('input'))"
    )
    quarter = shown.pixels(canvas)
    assert (quarter[:, :40] == then[:, :40]).all()
    assert (quarter[:, 50:] == now[:, 50:]).all()
    note = shown.js("return document.getElementById('against-note').innerText")
    assert history.records[2].title in note
    scores = [history.records[r].scores[1] for r in (3, 2)]
    assert f"score {written(scores[0])} ({written(scores[1])})" in shown.captions()[1]
    shown.click("input[value=beside]")
    both = shown.pixels(canvas)
    assert (both[:, :176] == then).all()
    assert (both[:, -176:] == now).all()
    shown.click("input[value=difference]")
    changed = shown.pixels(canvas).astype(int)
    maps = [history.maps[history.records[r].first + 1].astype(float) for r in (3, 2)]
    gap = np.kron(maps[0] - maps[1], np.ones((4, 4)))[:176, :176]
    warmer = changed[..., 0] - changed[..., 2]
    assert warmer[gap[:176, :176] > 120].mean() > 40
    assert warmer[gap[:176, :176] < -120].mean() < -40
    choose(shown, "#against", "")
    assert (shown.pixels(canvas) == now).all()
    shown.assert_sound()


def test_two_runs_are_on_one_slider(browser: Any, tmp_path: Path) -> None:
    one, two = run(), run(seed=1)
    # Another run has the images in another order, one of its own, and other steps.
    order = [3, 1, 2, 0, 4, 5, 6, 7]
    images = two.images[order].copy()
    images[1] = 255 - images[1]
    records = [
        replace(
            record, step=3 * record.step, images=[order.index(image) for image in record.images]
        )
        for record in two.records
    ]
    masks = {(order.index(image), target): mask for (image, target), mask in two.masks.items()}
    two = replace(two, images=images, records=records, masks=masks, maps=255 - two.maps)
    for name, history in (("a", one), ("b", two)):
        save(history, tmp_path / name / "explanations")
    path = write_comparison(
        [tmp_path / "a" / "explanations", tmp_path / "b" / "explanations"], tmp_path / "c.html"
    )
    shown = Page(browser, one, tmp_path)
    browser.get(path.as_uri())
    shown.settle()
    assert "beside b" in shown.js("return document.getElementById('run').innerText")
    summary = shown.js("return document.getElementById('summary').innerText")
    assert "b shares 7 images" in summary.replace("\xa0", " ")
    shown.click("input[value=beside]")
    canvases = shown.js(
        "return [...document.querySelectorAll('#grid figure')]"
        ".map(f => [+f.dataset.image, f.dataset.wide])"
    )
    assert {image for image, wide in canvases if wide == "false"} == {1}  # which only one has
    for r in (3, 1):
        record = one.records[r]
        while shown.js("return +document.body.dataset.record") > r:
            shown.click("#previous")
        assert shown.js("return document.body.dataset.against") == f"b, {two.records[r].title}"
        shown.click("input[value=map]")
        both = shown.pixels("#grid figure[data-index='2'] canvas")
        plain = one.maps[record.first + 2].astype(float)
        middle = both.shape[0] // 2
        for part, heat in ((both[:, :middle], 255 - plain), (both[:, -middle:], plain)):
            assert (part.mean() > 100) == (heat.mean() > 128)
    lines = shown.js(
        "return [...document.querySelectorAll('#curves [data-metric=overall_auc] .ref')]"
        ".map(l => l.dataset.name)"
    )
    assert lines == ["centre gaussian", "b"]
    shown.assert_sound()
    save(replace(one, images=255 - one.images), tmp_path / "d")
    with pytest.raises(ValueError, match="has no image of"):
        write_comparison([tmp_path / "a" / "explanations", tmp_path / "d"], path)


# ---- a number explained -----------------------------------------------------------------------------


def test_a_slider_shows_deletion_and_insertion(browser: Any, tmp_path: Path) -> None:
    history = synthetic(size=176, records=2)
    configuration = history.configuration | {"metrics": "Faithfulness(steps=8)"}
    history = replace(history, configuration=configuration)
    shown = Page(browser, history, tmp_path)
    shown.click("#grid figure[data-index='3'] .open")
    shown.click("#outlines")
    record, k = history.records[-1], 3
    deletion, insertion = record.deletion[k], record.insertion[k]
    assert deletion is not None
    assert insertion is not None
    picture = shown.js("return document.getElementById('share').max")
    assert picture == "8"
    heat = torch.from_numpy(history.maps[record.first + k].astype(np.float32))
    large = torch.nn.functional.interpolate(heat[None, None], (176, 176), mode="bilinear")[0]
    ranks = saliency_ranks(large)[0].numpy()
    plain = shown_image(shown, record.images[k])
    blur = BLUR(torch.from_numpy(plain).permute(2, 0, 1)[None].double())[0].permute(1, 2, 0).numpy()
    for step in (0, 3, 8):
        shown.js(
            "const s = document.getElementById('share'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('input'))",
            step,
        )
        shown.settle()
        texts = [
            shown.js(f"return document.getElementById('{name}-caption').innerText")
            for name in ("deleted", "inserted")
        ]
        assert texts == [
            f"blurred: score {written(deletion[step])}",
            f"shown alone: score {written(insertion[step])}",
        ]
        gone = (ranks < step * math.ceil(176 * 176 / 8))[..., None]
        for name, expected in (
            ("deleted", np.where(gone, blur, plain)),
            ("inserted", np.where(gone, plain, blur)),
        ):
            off = abs(shown.pixels(f"#{name}").astype(float) - expected).max(-1)
            assert (off > 3).mean() < 0.01  # pixels of nearly equal heat
    shown.click("#grid figure[data-index='1'] .open")  # which was never judged
    assert not browser.find_element("id", "hide").is_displayed()
    shown.assert_sound()


def shown_image(shown: Page, image: int) -> np.ndarray:
    """Return an image as the browser decodes it."""
    shown.click("input[value=picture]")
    pixels = shown.pixels(f"#grid figure[data-image='{image}'] canvas").astype(float)
    shown.click("input[value=overlay]")
    return pixels


def test_full_size_tells_the_value_under_the_pointer(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    history = synthetic(size=176)
    shown = Page(browser, history, tmp_path)
    shown.click("#grid figure[data-index='5'] .expand")
    assert browser.find_element("id", "large").is_displayed()
    canvas = browser.find_element("id", "large-canvas")
    ActionChains(browser).move_to_element_with_offset(canvas, 40, -60).perform()
    text = browser.find_element("id", "large-value").text
    value, x, y = map(float, re.findall(r"[\d.]+", text))
    scale = 176 / canvas.rect["width"]
    assert (x, y) == pytest.approx((88 + 40 * scale, 88 - 60 * scale), abs=1.01)
    heat = torch.from_numpy(history.maps[history.records[-1].first + 5].astype(np.float32))
    large = torch.nn.functional.interpolate(heat[None, None], (176, 176), mode="bilinear")[0, 0]
    assert value == pytest.approx(float(large[int(y), int(x)]) / 255, abs=0.0051)
    canvas.send_keys(Keys.ARROW_RIGHT)
    assert f"at {int(x) + 1}, {int(y)}" in browser.find_element("id", "large-value").text
    canvas.send_keys(Keys.ESCAPE)
    assert not browser.find_element("id", "large").is_displayed()
    shown.assert_shows(history, 4)  # the arrow moved the pointer, not the time
    shown.assert_sound()


# ---- charts -----------------------------------------------------------------------------------------


def test_axes_do_not_make_a_trend_of_noise(browser: Any, tmp_path: Path) -> None:
    history = run()
    flat = [
        replace(record, values={"overall_auc": 0.5 + 0.01 * r, "new_scalar": 0.3 + 0.01 * r})
        for r, record in enumerate(history.records)
    ]
    shown = Page(browser, replace(history, records=flat), tmp_path)
    drawn = shown.js(
        "return [...document.querySelectorAll('#curves .curve')].map(c => ["
        "c.dataset.metric, c.querySelector('h3').innerText,"
        "[...c.querySelectorAll('.tick')].map(t => t.textContent),"
        "Math.max(...[...c.querySelectorAll('circle')].map(p => p.cy.baseVal.value))"
        " - Math.min(...[...c.querySelectorAll('circle')].map(p => p.cy.baseVal.value))])"
    )
    assert [name for name, *_ in drawn] == ["overall_auc", "new_scalar"]  # that nobody knew of
    assert drawn[1][1] == "New scalar"
    for *_, ticks, rise in drawn:
        assert (ticks[0], ticks[-1]) == ("0", "1.0")
        assert rise < 8  # of 150
    shown.assert_sound()


def test_controls_are_named_off_the_curves_and_bands_are_intervals(
    browser: Any, tmp_path: Path
) -> None:
    history = run()
    shown = Page(browser, history, tmp_path)
    right, names, points, band = shown.js("""
        const c = document.querySelector("#curves [data-metric=overall_auc]");
        return [
            Math.max(...[...c.querySelectorAll("circle")].map(p => p.cx.baseVal.value)),
            [...c.querySelectorAll(".ref-text")].map(t => [t.textContent, t.getBBox().x]),
            [...c.querySelectorAll("circle")].sort((a, b) => a.dataset.record - b.dataset.record)
                .map(p => p.cy.baseVal.value),
            [...c.querySelector(".band").points].map(p => [p.x, p.y]),
        ];""")
    assert [name for name, _ in names] == ["centre gaussian"]
    assert all(x > right for _, x in names)
    values = [record.values["overall_auc"] for record in history.records]
    scale, start = np.polyfit(values, points, 1)
    upper, lower = np.array(band[:4])[:, 1], np.array(band[4:])[::-1, 1]
    for r, record in enumerate(history.records):
        auc = [overall(record, k) or 0.0 for k in range(IMAGES)]
        half = scipy.stats.t.ppf(0.975, IMAGES - 1) * scipy.stats.sem(auc)
        assert upper[r] == pytest.approx(start + scale * (values[r] + half), abs=0.2)
        assert lower[r] == pytest.approx(start + scale * (values[r] - half), abs=0.2)


def test_a_table_stands_behind_each_chart(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    history = synthetic()
    shown = Page(browser, history, tmp_path)
    summary = browser.find_element("css selector", "#curves [data-metric=overall_auc] summary")
    summary.send_keys("\n")  # by the keyboard
    WebDriverWait(browser, 20).until(
        lambda _: shown.js("return document.querySelector('#curves .rows') !== null")
    )
    rows = shown.js(
        "return [...document.querySelectorAll('#curves [data-metric=overall_auc] tr')]"
        ".map(r => [...r.children].map(c => c.textContent))"
    )
    assert rows[0] == [
        "Time",
        "Step",
        "Overall AUC",
        "95 % interval",
        "random map",
        "centre gaussian",
    ]
    assert rows[1][:4] == ["before training", "0", NONE, NONE]
    assert rows[3][1:3] == ["80", "0.30"]
    assert [row[4] for row in rows[1:]] == [NONE, "0.01", "0.01", "0.07", "0.07"]
    assert len(rows) == 6
    shown.assert_sound()


# ---- keys, colours, paper ---------------------------------------------------------------------------


def test_escape_closes_and_the_page_works_by_keyboard(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    history = synthetic()
    shown = Page(browser, history, tmp_path)
    shown.js("document.querySelector('#grid figure[data-index=\"2\"] .open').focus()")
    shown.press(Keys.ENTER)
    assert browser.find_element("id", "detail").is_displayed()
    shown.press(Keys.ESCAPE)
    assert not browser.find_element("id", "detail").is_displayed()
    assert shown.js("return document.activeElement.closest('figure').dataset.index") == "2"
    # Everything that can be clicked can be reached by Tab.
    seen = set()
    shown.js("document.activeElement.blur(); scrollTo(0, 0)")
    for _ in range(150):
        shown.press(Keys.TAB)
        seen.add(
            shown.js(
                "const a = document.activeElement; return a.id || a.closest('[data-index]')"
                "?.dataset.index + '/' + a.className || a.tagName"
            )
        )
    wanted = {"record", "play", "only-class", "sort", "against", "pin", "palette", "outlines"}
    assert wanted <= seen
    assert {f"{k}/{name}" for k in range(6) for name in ("open", "expand")} <= seen
    shown.assert_sound()


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour.strip("rgb()").split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_borders_of_controls_are_seen(scheme: str, browser: Any, tmp_path: Path) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        shown = Page(browser, synthetic(), tmp_path)
        found = shown.js(
            "return ['#pin', '#sort', '#only-class', '.segments'].map(s => {"
            "const n = document.querySelector(s), c = getComputedStyle(n);"
            "return [c.borderTopColor, getComputedStyle(document.body).backgroundColor]})"
        )
        for border, ground in found:
            high, low = sorted((luminance(border), luminance(ground)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_on_paper_there_are_no_controls_and_no_night(browser: Any, tmp_path: Path) -> None:
    shown = Page(browser, synthetic(), tmp_path)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": dark})
    try:
        assert (
            shown.js("return getComputedStyle(document.body).backgroundColor")
            == "rgb(255, 255, 255)"
        )
        for name in ("record", "play", "sort", "opacity"):
            assert not browser.find_element("id", name).is_displayed()
        for name in ("run", "grid", "curves"):
            assert browser.find_element("id", name).is_displayed()
        assert len(browser.execute_cdp_cmd("Page.printToPDF", {})["data"]) > 10_000
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_nothing_moves_for_who_wants_that(browser: Any, tmp_path: Path) -> None:
    features = [{"name": "prefers-reduced-motion", "value": "reduce"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        shown = Page(browser, synthetic(), tmp_path)
        shown.click("#grid .open")
        moving = shown.js(
            "return [...document.querySelectorAll('*')].map(n => getComputedStyle(n)).filter(c =>"
            "parseFloat(c.transitionDuration) || parseFloat(c.animationDuration)"
            " || c.scrollBehavior === 'smooth').length"
        )
        assert moving == 0
        assert shown.js("return document.body.dataset.playing") == "false"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of axe-core, from npm."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm")
    folder = tmp_path_factory.mktemp("axe")
    command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), "axe-core@4"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    except (subprocess.SubprocessError, OSError) as error:
        pytest.skip(f"npm has no axe-core: {error}")
    return (folder / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


@pytest.mark.sample(1)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_axe_finds_no_violation(
    scheme: str, width: int, axe: str, browser: Any, tmp_path: Path
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        corner = {"peaks": [[0.98, 0.97]] * 8, "away": [0.6] * 8, "energy": [0.05] * 8}
        history = last(run(), **corner, verdicts=["right"] * 6 + ["wrong"] * 2, predicted=[0] * 8)
        shown = Page(browser, history, tmp_path, width=width)
        for prepare in ("", "#grid .open", "#curves summary", "#pin", "#detail-large"):
            if prepare:
                shown.click(prepare)
            shown.js(axe)
            violations = browser.execute_async_script(
                "axe.run(document, {}).then(found => arguments[0](found.violations.map(v =>"
                "[v.id, v.nodes.map(n => n.html + ' ' + n.failureSummary)])))"
            )
            assert violations == [], prepare
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# ---- while the run goes on --------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The folder as a server has it."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def failed(history: History) -> list[FailureRecord]:
    """Return failures at the second and the third time, of which the first went in between."""
    first, second = (np.ascontiguousarray(picture[::-1]) for picture in history.images[:2])
    maps = [url_of(each) for each in history.maps[:3]]
    titles = [record.title for record in history.records]
    sample = {"loader": 0, "index": 5, "why": "highest loss", "loss": 2.31, "predicted": 2}
    gone = sample | {"id": "a", "labels": [1], "entered": titles[1]}
    gone |= {"targets": [1], "scores": [0.1], "maps": maps[:1]}
    here = sample | {"id": "b", "labels": [0], "entered": titles[2]}
    here |= {"targets": [0, 2], "scores": [0.05, 0.9], "maps": maps[1:]}
    left = [{"id": "a", "entered": titles[1], "left": titles[2]}]
    return [
        FailureRecord(40, 0, titles[1], [gone], images={"a": url_of(first)}),
        FailureRecord(80, 1, titles[2], [here], left, images={"b": url_of(second)}),
    ]


def test_the_worst_samples_have_a_section_of_their_own(browser: Any, tmp_path: Path) -> None:
    history = run(records=3)
    history = replace(history, failures=failed(history), class_names={0: "disc", 2: "cross"})
    shown = Page(browser, history, tmp_path)
    words = "return document.getElementById('failures').innerText"
    text = " ".join(shown.js(words).split())
    assert "of the validation at epoch 1 · step 80; no part of the numbers" in text
    assert "disc label score 0.05 loss 2.31 new highest loss" in text
    assert "cross said instead score 0.90 loss 2.31 new highest loss" in text
    assert "No longer among them: 1 that came at epoch 0 · step 40." in text
    # What is drawn is the overlay of every other picture of the package.
    shown.js(
        "const o = document.getElementById('opacity'); o.value = 1; o.dispatchEvent(new Event('input'))"
    )
    shown.settle()
    drawn = shown.pixels("#failures-grid figure[data-target='2'] canvas").astype(float)
    side = drawn.shape[0]
    picture = torch.from_numpy(history.images[1][::-1].copy()).permute(2, 0, 1)[None] / 255
    heat = torch.from_numpy(history.maps[2])[None] / 255
    picture = torch.nn.functional.interpolate(picture, (side, side), mode="nearest")
    heat = torch.nn.functional.interpolate(heat[None], (side, side), mode="bilinear")[0]
    expected = 255 * overlay(picture, heat)[0].permute(1, 2, 0).numpy()
    assert np.abs(drawn - expected).mean() < 2
    shown.click("#previous")
    text = " ".join(shown.js(words).split())
    assert "class 1 label score 0.10 loss 2.31 new highest loss" in text
    assert "No longer" not in text
    shown.click("#previous")
    assert "No failure was followed at this time." in shown.js(words)
    shown.assert_sound()
    without = Page(browser, run(records=3), tmp_path)
    assert not browser.find_element("id", "failures").is_displayed()
    without.assert_sound()


@pytest.mark.parametrize("how", ["file", "http"])
def test_a_page_that_is_open_gets_what_is_new(
    how: str, served: str, browser: Any, tmp_path: Path
) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    history = run(records=4, epochs=20)
    records = [replace(record, time=time.time()) for record in history.records]
    history = replace(history, records=records)
    save(replace(history, records=history.records[:2]), tmp_path)
    path = write_report(tmp_path)
    shown = Page.__new__(Page)
    shown.chrome = browser
    browser.get(f"{path.as_uri() if how == 'file' else f'{served}/report.html'}#every-1")
    shown.settle()
    live = "return document.getElementById('live').innerText"
    assert shown.js(live).startswith("Training: 1 of 20 epochs explained")
    wait = WebDriverWait(browser, 20)
    for record in history.records[2:]:
        add_to_report(tmp_path, record, history.maps[record.first : record.end])
    for failures in failed(history):
        add_failures_to_report(tmp_path, failures)
    wait.until(lambda _: shown.js("return document.body.dataset.records") == "4")
    shown.settle()
    assert shown.js("return document.body.dataset.record") == "3"  # it was at the newest
    failing = "return document.querySelectorAll('#failures-grid figure').length"
    wait.until(lambda _: shown.js(failing) == 2)
    assert shown.js(live).startswith("Training: 3 of 20 epochs explained. Looked for more at")
    assert (
        shown.js("return document.querySelectorAll('#curves [data-metric=drift] circle').length")
        == 4
    )
    end_report(tmp_path)
    wait.until(lambda _: shown.js("return document.body.dataset.live") == "ended")
    assert not browser.find_element("id", "live").is_displayed()
    assert shown.js("return document.body.dataset.error ?? null") is None
    assert browser.get_log("browser") == []


def test_a_page_tells_no_stranger_what_is_new(served: str, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    save(run(), tmp_path)
    write_report(tmp_path)
    for origin, heard in ((served, 1), (served.replace("127.0.0.1", "localhost"), 0)):
        (tmp_path / "frame.html").write_text(
            "<!doctype html><link rel=icon href=data:,><script>window.heard = 0;"
            "addEventListener('message', () => { heard++; })</script>"
            f'<iframe src="{served}/report.html?since=0" onload="window.loaded = 1"></iframe>'
        )
        browser.get(f"{origin}/frame.html")
        WebDriverWait(browser, 20).until(lambda _: browser.execute_script("return window.loaded"))
        assert browser.execute_script("return heard") == heard
    browser.get_log("browser")  # which says that it kept the message back


def test_a_page_that_cannot_see_its_file_says_so(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    history = replace(run(), finished=False)
    path = tmp_path / "blind.html"
    text = page(history).replace("frame-src 'self' file:", "frame-src 'none'")
    path.write_text(text, encoding="utf-8")
    browser.get(f"{path.as_uri()}#every-1")
    WebDriverWait(browser, 20).until(
        lambda _: browser.execute_script("return document.body.dataset.live") == "blind"
    )
    said = browser.execute_script("return document.getElementById('live').innerText")
    assert "does not let a page look at its own file: reload" in said
    browser.get("about:blank")
    browser.get_log("browser")  # the browser says so too


# ---- large runs, and notebooks ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_large_run_opens_quickly_and_says_what_it_left_out(browser: Any, tmp_path: Path) -> None:
    history = synthetic(records=100, explanations=64, size=224, map_size=112, pictures=64)
    random = np.random.default_rng(0)
    for record in history.records:  # as rugged as real ones
        part = history.maps[record.first : record.end]
        rough = random.normal(0, 30, (len(part), 14, 14)).repeat(8, 1).repeat(8, 2)
        part[:] = np.clip(part + rough, 0, 255)
    html = page(history)
    size = len(html.encode())
    assert size <= 25_000_000
    records = decoded(html)["records"]
    left = sum(record["sheet"] is None for record in records)
    assert records[0]["sheet"] is not None
    assert records[-1]["sheet"] is not None
    path = tmp_path / "large.html"
    path.write_text(html, encoding="utf-8")
    browser.get("about:blank")
    # Its own time, which does not hang on what else the machine does.
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    try:
        browser.get(path.as_uri())
        shown = Page.__new__(Page)
        shown.chrome = browser
        shown.settle()
        found = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        spent = {each["name"]: each["value"] for each in found}["TaskDuration"]
    finally:
        browser.execute_cdp_cmd("Performance.disable", {})
    drawn = shown.js("return performance.getEntriesByName('drawn')[0].startTime")
    print(
        f"{size / 1e6:.1f} MB, {left} times without maps, {spent:.2f} s, {drawn:.0f} ms by the clock"
    )
    assert 0.05 < spent < 2
    said = shown.js("return document.getElementById('coding').innerText")
    assert (f"no maps of {left} of the 100 times" in said) == (left > 0)


def test_a_page_that_has_grown_too_large_is_thinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = synthetic(records=12)
    save(history, tmp_path)
    whole = len(page(history))
    record = len(page(history)) - len(page(replace(history, records=history.records[:-1])))
    monkeypatch.setattr("lightning_aop.history.report._PAGE_BYTES", whole - 1)
    monkeypatch.setattr("lightning_aop.history.report._THINNED_BYTES", whole - 3 * record)
    short = tmp_path / "short"
    save(replace(history, records=history.records[:-1]), short)
    path = write_report(short)
    assert all(each["sheet"] for each in decoded(path.read_text())["records"])
    save(history, short)
    end = history.records[-1]
    add_to_report(short, end, history.maps[end.first : end.end])
    thinned = decoded(path.read_text())["records"]
    assert len(thinned) == 12
    kept = [r for r, each in enumerate(thinned) if each["sheet"]]
    assert kept[0] == 0
    assert kept[-1] == 11
    assert 6 < len(kept) < 12
    assert path.stat().st_size <= whole - 3 * record
    assert [each["values"] for each in thinned] == [
        each["values"] for each in decoded(page(history))["records"]
    ]


def test_a_notebook_shows_the_page(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    history = synthetic(records=2)
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html>{history._repr_html_()}", encoding="utf-8")
    browser.get(path.as_uri())
    browser.switch_to.frame(0)
    try:
        WebDriverWait(browser, 20).until(
            lambda _: browser.execute_script("return document.body.dataset.drawn") == "1"
        )
        count = "return document.querySelectorAll('#grid figure').length"
        assert browser.execute_script(count) == 6
    finally:
        browser.switch_to.default_content()
    assert browser.get_log("browser") == []


def test_the_title_names_experiment_model_data_and_date(browser: Any, tmp_path: Path) -> None:
    history = run(configuration={"model": "Net", "data": "Photos", "empty": ""})
    folder = tmp_path / "runs" / "version_3" / "explanations"
    save(history, folder)
    browser.get(write_report(folder).as_uri())
    head = browser.find_element("css selector", "header").text.replace("\xa0", " ")
    assert head.startswith("runs / version_3\n")
    assert "model Net · data Photos · 14 November 2023 · 8 probe images" in head
    assert browser.title == "runs / version_3 · Net"
