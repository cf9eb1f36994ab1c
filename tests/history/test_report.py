"""The page of a run: what it says, what can't break out of it, and how it works in a browser."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pytest
from pages import (
    NASTY,
    NONE,
    Page,
    Scripts,
    bumps,
    decoded,
    image,
    maps_of,
    overall,
    photos,
    save,
    synthetic,
)
from PIL import Image

from lightning_aop.cli.main import main
from lightning_aop.history.report import add_to_report, page, write_report
from lightning_aop.history.store import History, Record


def test_page_holds_the_same_numbers() -> None:
    history = synthetic()
    data = decoded(page(history))
    assert data["configuration"] == history.configuration
    assert {int(k): v for k, v in data["class_names"].items()} == history.class_names
    assert len(data["records"]) == len(history.records)
    for r, record in enumerate(history.records):
        got = data["records"][r]
        for name in (
            *("step", "epoch", "title", "images", "targets", "scores", "blank", "drift"),
            *("deletion_auc", "insertion_auc", "controls", "predicted", "verdicts", "peaks"),
            *("predicted_scores", "deletion", "insertion", "energy", "hits", "away", "time"),
            "control_aucs",
        ):
            assert got[name] == getattr(record, name)
        assert got["values"] == {
            name: None if math.isnan(value) else value for name, value in record.values.items()
        }
        stop = record.first + len(record.images)
        assert (maps_of(data, r) == history.maps[record.first : stop]).all()
    for url, picture in zip(data["images"], history.images, strict=True):
        assert url.startswith("data:image/jpeg;base64,")
        assert abs(image(url).astype(float) - picture).mean() < 4
    assert not any(record["lossy"] for record in data["records"])
    masks = {(picture, target): image(url) for picture, target, url, _ in data["masks"]}
    areas = [area for *_, area in data["masks"]]
    assert areas == [mask.mean() for mask in history.masks.values()]
    assert masks.keys() == history.masks.keys()
    assert all((mask == history.masks[pair]).all() for pair, mask in masks.items())


def test_maps_keep_their_places_where_records_differ_in_length() -> None:
    whole = synthetic(records=3, explanations=6)
    records, first = [], 0
    for record, count in zip(whole.records, (6, 0, 3), strict=True):
        kept = {
            each.name: getattr(record, each.name)[:count]
            for each in fields(Record)
            if isinstance(getattr(record, each.name), list)
        }
        records.append(replace(record, **kept, first=first))
        first += count
    history = History(whole.configuration, {}, whole.images, {}, bumps(9, 30, 44, seed=5), records)
    data = decoded(page(history))
    assert (maps_of(data, 0) == history.maps[:6]).all()
    assert data["records"][1]["images"] == []
    assert (maps_of(data, 2) == history.maps[6:]).all()


def test_nothing_breaks_out_of_the_data() -> None:
    html = page(synthetic(), title=f"{{{{data}}}} {NASTY}")
    template = page(History({}, {}, photos(1, 8, 8)[:0], {}, bumps(1, 8, 8)[:0], []))
    assert template.count("<script") == 2
    assert html.count("<script") == 2 + 5
    assert html.count("</script") == 2 + 5
    assert "alert(1)</script>" not in html
    assert html.count("<!--") == template.count("<!--")
    assert "\u2028" not in html
    assert decoded(html)["title"] == f"{{{{data}}}} {NASTY}"


def test_page_asks_the_network_for_nothing() -> None:
    html = page(synthetic())
    assert Scripts(html).links == ["data:,"]
    assert "default-src 'none'" in html
    assert "innerHTML" not in html
    assert "@import" not in html
    assert "url(" not in html


@pytest.mark.parametrize("records", [0, 1])
def test_run_that_has_hardly_begun_has_a_page(records: int) -> None:
    history = synthetic(records=records)
    data = decoded(page(history))
    assert len(data["records"]) == records


@pytest.mark.wide
@pytest.mark.parametrize("noise", [0, 12])
def test_page_stays_small(noise: int) -> None:
    history = synthetic(records=50, explanations=16, size=224, map_size=112, pictures=16)
    if noise:
        random = np.random.default_rng(0)
        noisy = history.maps + random.normal(0, noise, history.maps.shape)
        history.maps[:] = np.clip(noisy, 0, 255)
    html = page(history)
    assert len(html.encode()) < 6_000_000
    data = decoded(html)
    record = history.records[-1]
    difference = maps_of(data, -1).astype(float) - history.maps[record.first : record.first + 16]
    assert abs(difference).mean() < 8 if noise else (difference == 0).all()
    assert any(record["lossy"] for record in data["records"]) == bool(noise)


@pytest.mark.wide
def test_many_large_images_are_shown_smaller(tmp_path: Path) -> None:
    history = synthetic(records=1, explanations=8, pictures=8, size=1024, map_size=14)
    random = np.random.default_rng(0)
    history.images[:] = random.integers(0, 256, history.images.shape, np.uint8)
    data = decoded(page(history))
    assert data["image_size"] == [1024, 1024]
    assert data["picture_size"] == [512, 512]
    for url, picture in zip(data["images"], history.images, strict=True):
        small = picture.reshape(512, 2, 512, 2, 3).mean((1, 3))
        assert abs(image(url) - small).mean() < 16
    for number, target, url, _ in data["masks"]:
        small = history.masks[number, target].reshape(512, 2, 512, 2).mean((1, 3))
        assert abs(image(url) - small).mean() < 0.01


def test_report_is_written_beside_the_explanations(tmp_path: Path) -> None:
    history = synthetic()
    save(history, tmp_path)
    path = write_report(str(tmp_path))
    assert path == tmp_path / "report.html"
    assert not list(tmp_path.glob(".*"))
    data = decoded(path.read_text(encoding="utf-8"))
    assert data["title"].endswith(tmp_path.name)
    expected = decoded(page(history))
    del data["title"], expected["title"]
    assert data == expected


def test_a_page_grows_record_by_record(tmp_path: Path) -> None:
    """It is then what it would be, written at once; a line that is half there is no harm."""
    history = synthetic()
    save(replace(history, records=history.records[:1]), tmp_path)
    path = write_report(tmp_path)
    for record in history.records[1:]:
        add_to_report(tmp_path, record, history.maps[record.first : record.end])
    grown = decoded(path.read_text(encoding="utf-8"))
    assert grown["records"] == decoded(page(history))["records"]
    with pytest.raises(FileNotFoundError):
        add_to_report(tmp_path / "elsewhere", history.records[0], history.maps[:6])


def test_the_command_makes_page_and_animation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for version in ("version_0", "version_1"):
        save(synthetic(records=2), tmp_path / version / "explanations")
    assert main(["report", str(tmp_path)]) == 0
    made = [Path(line) for line in capsys.readouterr().out.splitlines()]
    made = [path for path in made if path.suffix != ".mp4"]  # where there is an encoder
    assert [path.name for path in made] == ["report.html", "evolution.gif"] * 2
    assert all(path.stat().st_size > 1000 for path in made)
    assert made[2].parent == tmp_path / "version_1" / "explanations"
    (made[0].parent / "maps.npy").write_bytes(b"broken")
    assert main(["report", str(tmp_path)]) == 1
    assert "version_0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["EMPTY"], "holds no explanations"),
        (["EMPTY/missing"], "no such folder"),
        ([__file__], "it is a file; name the folder of a run"),
        (["EMPTY", "--seconds", "0"], "--seconds 0.0: must be above 0"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", words[0].replace("EMPTY", str(tmp_path)), *words[1:]]) == 1
    assert message in capsys.readouterr().err


# ---- in a browser -----------------------------------------------------------------------------


def blend(
    picture: npt.NDArray[np.uint8],
    heat: npt.NDArray[np.uint8],
    opacity: float,
    height: int,
    width: int,
) -> npt.NDArray[np.float64]:
    """Lay a map over a picture, by Pillow's bilinear enlargement and matplotlib's colours."""
    large = Image.fromarray(heat.astype(np.float32)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    value = np.asarray(large, float) / 255
    colour = matplotlib.colormaps["inferno"](value)[..., :3] * 255
    p = picture.astype(float)
    luma = (p * [0.299, 0.587, 0.114]).sum(-1, keepdims=True)
    dim = 0.75 * (0.2 * p + 0.8 * luma)
    ground = (1 - opacity) * p + opacity * dim
    alpha = (opacity * value**0.75)[..., None]
    result: npt.NDArray[np.float64] = (1 - alpha) * ground + alpha * colour
    return result


def test_keyboard_moves_through_the_run(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    history = synthetic()
    shown = Page(browser, history, tmp_path)
    shown.assert_shows(history, 4)  # the latest first
    shown.press(Keys.ARROW_LEFT)
    shown.assert_shows(history, 3)
    shown.press(Keys.HOME)
    shown.assert_shows(history, 0)
    shown.press(Keys.ARROW_LEFT)
    shown.assert_shows(history, 0)
    shown.press(Keys.END)
    shown.assert_shows(history, 4)
    shown.js("document.getElementById('record').focus()")
    for keys, r in (
        ([Keys.ARROW_LEFT, Keys.ARROW_LEFT], 2),
        ([Keys.ARROW_RIGHT], 3),
        ([Keys.HOME], 0),
    ):
        shown.press(*keys)
        shown.assert_shows(history, r)
    assert shown.js("return document.getElementById('record').ariaValueText") == "before training"
    shown.assert_sound()


def test_a_line_that_is_half_written_is_left_out(browser: Any, tmp_path: Path) -> None:
    history = synthetic()
    path = tmp_path / "half.html"
    path.write_text(page(history)[:-200], encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.execute_script("return document.body.dataset.records") == "4"
    assert not browser.get_log("browser")


def test_space_plays_to_the_end(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    history = synthetic(records=3)
    shown = Page(browser, history, tmp_path)
    shown.press(" ")
    assert shown.js("return document.body.dataset.playing") == "true"
    WebDriverWait(browser, 20).until(
        lambda _: shown.js("return document.body.dataset.playing") == "false"
    )
    shown.settle()
    shown.assert_shows(history, 2)
    shown.press(" ", " ")
    shown.assert_shows(history, 0)
    assert shown.js("return document.body.dataset.playing") == "false"
    shown.assert_sound()


def test_pixels_are_the_blend(browser: Any, tmp_path: Path) -> None:
    history = synthetic(size=176)
    shown = Page(browser, history, tmp_path)
    picture = image(shown.data["images"][1])
    heat = history.maps[history.records[4].first + 1]
    canvas = "#grid figure[data-index='1'] canvas"
    shown.click("#outlines")

    def differs(opacity: float) -> None:
        got = shown.pixels(canvas)
        difference = abs(got - blend(picture, heat, opacity, *got.shape[:2]))
        assert difference.max() < 9
        assert difference.mean() < 1.5

    differs(0.85)
    shown.js(
        "const o = document.getElementById('opacity'); o.value = 0.4;"
        "o.dispatchEvent(new Event('input'));"
    )
    shown.settle()
    differs(0.4)
    shown.click("input[value=picture]")
    assert abs(shown.pixels(canvas).astype(int) - picture).max() <= 2
    shown.click("input[value=map]")
    large = Image.fromarray(heat.astype(np.float32)).resize((176, 176), Image.Resampling.BILINEAR)
    colours = matplotlib.colormaps["inferno"](np.asarray(large) / 255)[..., :3] * 255
    assert abs(shown.pixels(canvas) - colours).max() < 9
    shown.assert_sound()


def test_blank_map_has_none_of_the_colours(browser: Any, tmp_path: Path) -> None:
    history = synthetic()
    shown = Page(browser, history, tmp_path)
    shown.click("#outlines")
    shown.click("#first")
    for mode in ("overlay", "map"):
        shown.click(f"input[value={mode}]")
        pixels = shown.pixels("#grid figure[data-blank=true] canvas").astype(int)
        assert (pixels.max(-1) == pixels.min(-1)).all()
        assert pixels.std() > 0  # striped, not an even field that could be a value
    shown.assert_sound()


def test_a_picture_opens_its_history(browser: Any, tmp_path: Path) -> None:
    history = synthetic()
    del history.records[2].targets[1:], history.records[2].images[1:]  # explained less at that time
    del history.records[2].scores[1:], history.records[2].blank[1:], history.records[2].drift[1:]
    shown = Page(browser, history, tmp_path)
    assert not browser.find_element("id", "detail").is_displayed()
    shown.click("#grid figure[data-index='3'] button")
    frames = shown.js(
        "return [...document.querySelectorAll('#film figure')]"
        ".map(f => [f.dataset.missing ?? f.dataset.score, f.dataset.image ?? null])"
    )
    expected = [
        ["true", None] if r == 2 else [str(record.scores[3]), "3"]
        for r, record in enumerate(history.records)
    ]
    assert [(a if a == "true" else float(a), b) for a, b in frames] == [
        (a if a == "true" else float(str(a)), b) for a, b in expected
    ]
    assert browser.find_element("id", "detail-title").text == "star"
    charts = (
        "return [...document.querySelectorAll('#detail-charts .curve')]"
        ".map(c => [c.dataset.metric, c.querySelectorAll('circle').length, +c.dataset.value])"
    )
    auc = overall(history.records[4], 3)
    assert shown.js(charts) == [
        ["score", 4, history.records[4].scores[3]],
        ["auc", 3, auc],
        ["energy", 3, history.records[4].energy[3]],
    ]
    shown.click("#film figure[data-record='1'] button")
    shown.assert_shows(history, 1)
    assert (
        shown.pixels("#film figure[data-record='1'] canvas")
        == shown.pixels("#grid figure[data-index='3'] canvas")
    ).all()
    shown.click("input[value=map]")
    assert (
        shown.pixels("#film figure[data-record='1'] canvas")
        == shown.pixels("#grid figure[data-index='3'] canvas")
    ).all()
    shown.click("#grid figure[data-index='1'] button")  # which was never judged
    assert [name for name, *_ in shown.js(charts)] == ["score", "energy"]
    shown.click("#detail-close")
    assert not browser.find_element("id", "detail").is_displayed()
    shown.assert_sound()


def test_the_last_of_many_hasty_steps_is_shown(browser: Any, tmp_path: Path) -> None:
    history = synthetic(records=12, size=176)
    shown = Page(browser, history, tmp_path)
    shown.click("#outlines")
    shown.js("for (let i = 0; i < 9; i++) document.getElementById('previous').click()")
    shown.settle()
    shown.assert_shows(history, 2)
    heat = history.maps[history.records[2].first + 1]
    got = shown.pixels("#grid figure[data-index='1'] canvas")
    expected = blend(image(shown.data["images"][1]), heat, 0.85, 176, 176)
    assert abs(got - expected).max() < 9
    shown.assert_sound()


def test_curves_go_to_the_record(browser: Any, tmp_path: Path) -> None:
    history = synthetic()
    shown = Page(browser, history, tmp_path)
    curve = "#curves [data-metric=overall_auc]"
    shown.click(f"{curve} circle[data-record='1']")
    shown.assert_shows(history, 1)
    texts = shown.js(
        f"return [...document.querySelectorAll('{curve} text')].map(t => t.textContent)"
    )
    assert {"random map", "centre gaussian", "0", "0.5", "1.0", "160", "step"} <= set(texts)
    # NaN is a gap, not a point.
    points = shown.js(f"return document.querySelectorAll('{curve} circle').length")
    assert points == 4
    shown.assert_sound()


def test_controls_hold_from_when_they_were_measured(browser: Any, tmp_path: Path) -> None:
    history = synthetic()
    shown = Page(browser, history, tmp_path)
    lines, points, names = shown.js("""
        const curve = document.querySelector("#curves [data-metric=overall_auc]");
        const along = (path) => Array.from({length: 2001}, (_, i) => {
            const {x, y} = path.getPointAtLength(path.getTotalLength() * i / 2000);
            return [x, y];
        });
        const drawn = [...curve.querySelectorAll("path")]
            .filter(p => getComputedStyle(p).strokeDasharray !== "none")
            .filter(p => getComputedStyle(p).fill === "none");
        return [
            Object.fromEntries(drawn.map(p => [p.dataset.name, along(p)])),
            Object.fromEntries([...curve.querySelectorAll("circle")]
                .map(c => [c.dataset.record, [c.cx.baseVal.value, c.cy.baseVal.value]])),
            [...curve.querySelectorAll(".ref-text")].map(t => [t.textContent, t.getBBox().y]),
        ];""")
    (x1, y1), (x3, _), (x4, y4) = (points[r] for r in "134")

    def height(value: float) -> float:
        """By the points of the curve itself, which are 0.2 at record 1 and 0.5 at record 4."""
        return float(y1 + (value - 0.2) / (0.5 - 0.2) * (y4 - y1))

    steps = {
        "random map": [(x1, x3, 0.01), (x3, math.inf, 0.07)],
        "centre gaussian": [(x1, math.inf, 0.15)],
    }
    assert lines.keys() == steps.keys()
    for name, held in steps.items():
        x, y = np.array(lines[name]).T
        assert x.min() == pytest.approx(x1, abs=0.01)
        assert x.max() >= x4 - 0.01
        for start, stop, value in held:
            level = y[(x > start + 0.02) & (x < stop - 0.02)]
            assert len(level) > 100
            assert level == pytest.approx(height(value), abs=0.02)
    # Each is named; the higher one's name stands higher.
    assert [name for name, _ in sorted(names, key=lambda each: each[1])] == [
        "centre gaussian",
        "random map",
    ]
    drawn = shown.js(
        "return Object.fromEntries([...document.querySelectorAll('#curves .curve')]"
        ".map(c => [c.dataset.metric, [...c.querySelectorAll('.ref')].map(l => l.dataset.name)]))"
    )
    assert drawn.pop("overall_auc") == ["random map", "centre gaussian"]
    assert drawn.pop("deletion_auc") == ["random map"]
    assert not any(drawn.values())
    shown.assert_sound()


@pytest.mark.sample(1)
@pytest.mark.parametrize("size", [96, 224])
def test_outline_is_the_inner_border_of_the_mask(browser: Any, tmp_path: Path, size: int) -> None:
    history = synthetic(records=2, size=size)
    shown = Page(browser, history, tmp_path)
    zoom = 2 if size == 96 else 1
    mask = history.masks[2, 2].repeat(zoom, 0).repeat(zoom, 1)
    # The outline is 2 wide on a canvas of 192 or 224, and a halo of 1 surrounds it.
    line, halo = np.zeros_like(mask), np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        line[y, x] = not mask[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].all()
    for y, x in np.argwhere(~line):
        halo[y, x] = line[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].any()
    assert (mask & ~line)[:, 0].any()  # no line along the picture's edge
    for mode in ("overlay", "map", "picture"):
        shown.click(f"input[value={mode}]")
        with_line, other_with = (shown.pixels(f"#grid [data-index='{k}'] canvas") for k in (2, 5))
        shown.click("#outlines")
        without, other = (shown.pixels(f"#grid [data-index='{k}'] canvas") for k in (2, 5))
        shown.click("#outlines")
        assert (with_line[line] == (77, 242, 255)).all()
        assert abs(with_line[halo] - 0.25 * without[halo]).max() < 2
        assert (with_line == without)[~line & ~halo].all()
        assert (other_with == other).all()  # which has no mask
    shown.assert_sound()


def test_without_masks_there_is_no_choice_of_outlines(browser: Any, tmp_path: Path) -> None:
    history = synthetic(records=2)
    shown = Page(browser, history, tmp_path)
    assert browser.find_element("id", "outlines").is_displayed()
    shown = Page(browser, replace(history, masks={}), tmp_path)
    assert not browser.find_element("id", "outlines").is_displayed()
    shown.assert_sound()


def trends(shown: Page) -> dict[str, dict[str, Any]]:
    """Return what stands in the rows of the classes: texts, and by column (text, x, y, on curve)."""
    found: dict[str, dict[str, Any]] = shown.js("""
        return Object.fromEntries([...document.querySelectorAll(".classes tbody tr")].map(row => [
            row.dataset.class,
            {
                texts: [...row.querySelector("th").children].map(c => c.textContent),
                ...Object.fromEntries([...row.querySelectorAll("td")].map(cell => {
                    const point = cell.querySelector("circle"), path = cell.querySelector(".path");
                    const [x, y] = [point.cx.baseVal.value, point.cy.baseVal.value];
                    const seen = getComputedStyle(point).visibility === "visible";
                    const on = seen && path.isPointInStroke(new DOMPoint(x, y));
                    const text = cell.querySelector("b").textContent;
                    return [cell.dataset.label, [text, x, seen ? y : null, on]];
                })),
            },
        ]));""")
    return found


def test_trends_are_means_of_the_classes(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    history = synthetic(explanations=16, classes=6)
    shown = Page(browser, history, tmp_path)
    scales: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("score", "AUC", "on object", "drift")
    }
    across: dict[int, set[float]] = {}
    empty = 0
    for r in (4, 3, 2, 1, 0):
        record, rows = history.records[r], trends(shown)
        assert set(rows) == {str(target) for target in record.targets}
        for target, row in rows.items():
            places = [k for k, found in enumerate(record.targets) if found == int(target)]
            plain = [k for k in places if not record.blank[k]]
            expected = {
                "score": [record.scores[k] for k in places],
                "AUC": [overall(record, k) for k in plain],
                "on object": [record.energy[k] for k in plain],
                "drift": [record.drift[k] for k in plain],
            }
            name = history.class_names.get(int(target), f"class {target}")
            assert row["texts"] == [name, f"{len(places)} explanations"]
            for column, values in expected.items():
                text, x, y, on = row[column]
                known = [value for value in values if value is not None]
                if not known:
                    assert (text, y) == (NONE, None)
                    empty += 1
                    continue
                mean = math.fsum(known) / len(known)
                assert float(text) == pytest.approx(mean, abs=0.0051)
                assert on
                scales[column].append((mean, y))
                across.setdefault(r, set()).add(x)
        shown.press(Keys.ARROW_LEFT)
    assert empty
    for found in scales.values():  # one scale for all classes, higher is more
        values, heights = np.array(found).T
        slope, start = np.polyfit(values, heights, 1)
        assert slope < 0
        assert abs(start + slope * values - heights).max() < 0.01
    assert all(len(xs) == 1 for xs in across.values())
    assert sorted(across, key=lambda r: min(across[r])) == [0, 1, 2, 3, 4]
    shown.click(".classes tr:nth-child(3) circle")
    shown.assert_shows(history, 0)
    shown.assert_sound()


def test_many_classes_are_folded_and_stay_narrow(browser: Any, tmp_path: Path) -> None:
    history = synthetic(records=2, explanations=82, size=32, map_size=14, pictures=82, classes=80)
    shown = Page(browser, history, tmp_path, width=360)
    rows = "return [...document.querySelectorAll('.classes tbody tr')].filter(r => r.offsetHeight)"
    listed = f"{rows}.map(r => r.dataset.class)"
    # Those of two explanations, then the others by name, numbers in names as numbers.
    first = ["0", "1", "2", "4", "5", "6", "7", "8", "9", "10", "11", "12"]
    assert shown.js(listed) == first
    shown.click("#classes-more")
    rest = [*map(str, range(13, 80)), "3"]
    assert shown.js(listed) == first + rest
    assert shown.js(
        f"{rows}.every(r => [...r.querySelectorAll('*')]"
        ".every(n => n.getBoundingClientRect().right <= 360))"
    )
    shown.assert_sound()
    shown.click("#classes-more")
    assert shown.js(listed) == first


def test_records_may_know_neither_aucs_nor_controls(browser: Any, tmp_path: Path) -> None:
    history = synthetic()
    plain = [
        replace(record, deletion_auc=[], insertion_auc=[], deletion=[], insertion=[], controls={})
        for record in history.records
    ]
    shown = Page(browser, replace(history, records=plain), tmp_path)
    texts = shown.js("return document.getElementById('probe').innerText")
    assert "AUC" not in texts
    assert shown.js("return document.querySelectorAll('.ref').length") == 0
    heads = shown.js(
        "return [...document.querySelectorAll('.classes td')].map(c => c.dataset.label)"
    )
    assert set(heads) == {"score", "on object", "drift"}
    path = tmp_path / "less.html"
    text = page(history)
    for name in ("deletion_auc", "insertion_auc", "deletion", "insertion"):
        text = text.replace(f'"{name}":[', '"unknown":[')
    path.write_text(text.replace('"controls":', '"unknown":'), encoding="utf-8")
    browser.get(path.as_uri())
    shown.settle()
    assert shown.js("return document.getElementById('probe').innerText") == texts
    shown.assert_sound()


def test_strings_are_text(browser: Any, tmp_path: Path) -> None:
    history = synthetic()
    shown = Page(browser, history, tmp_path)
    assert any(NASTY in caption for caption in shown.captions())
    values = shown.js("return [...document.querySelectorAll('dd')].map(d => d.textContent)")
    assert values == list(history.configuration.values())
    names = shown.js(
        "return [...document.querySelectorAll('.classes .name')].map(n => n.innerText)"
    )
    assert names[0] == NASTY
    assert shown.js("return document.querySelectorAll('script').length") == 2 + 5
    shown.assert_sound()


@pytest.mark.parametrize("records", [0, 1, 5])
def test_narrow_page_does_not_overflow(browser: Any, tmp_path: Path, records: int) -> None:
    history = synthetic(records=records)
    shown = Page(browser, history, tmp_path, width=360)
    if records:
        shown.click("#grid figure button")
    else:
        assert browser.find_element("id", "nothing").is_displayed()
    shown.assert_sound()


def test_many_explanations_are_paged(browser: Any, tmp_path: Path) -> None:
    history = synthetic(records=2, explanations=70, size=32, map_size=14)
    shown = Page(browser, history, tmp_path)
    indices = "return [...document.querySelectorAll('#grid figure')].map(f => +f.dataset.index)"
    assert shown.js(indices) == list(range(32))
    shown.click("#page-next")
    shown.click("#page-next")
    assert shown.js(indices) == list(range(64, 70))
    shown.click("#page-previous")
    assert shown.js(indices) == list(range(32, 64))
    shown.assert_sound()
