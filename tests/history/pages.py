"""A run to show, what a page of it holds, and the page in a browser."""

import base64
import io
import json
import math
from decimal import ROUND_HALF_UP, Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lightning_aop.history.report import page
from lightning_aop.history.store import History, HistoryWriter, Record

NONE = "\u2013"  # how the page writes that there is no number
NASTY = "<script>alert(1)</script>"
VERDICTS = ("right", "right", "wrong")
QUOTES = "a \"b\" 'c' </script><script>alert(2)</script> <!-- <script> \u2028 & &lt;"


def bumps(count: int, height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Return smooth maps with a peak each, as those of a network are."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    cy, cx, r = random.random((3, count, 1, 1))
    spread = (0.08 + 0.3 * r) ** 2
    maps = np.exp(-((y / height - cy) ** 2 + (x / width - cx) ** 2) / spread)
    return np.round(maps * 255).astype(np.uint8)


def photos(count: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return pictures with about the detail of photos."""
    random = np.random.default_rng(1)
    rough = random.integers(0, 256, (count, 12, 12, 3), np.uint8)
    large = [
        np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC))
        for p in rough
    ]
    fine = random.normal(0, 3, (count, height, width, 3))
    return np.clip(np.stack(large) + fine, 0, 255).astype(np.uint8)


def ellipses(count: int, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return masks of one to three ellipses, the first of which goes beyond the picture's edge."""
    random = np.random.default_rng(2)
    y, x = np.mgrid[:height, :width]
    masks = np.zeros((count, height, width), bool)
    for n in range(count):
        for place in range(n % 3 + 1):
            cy, cx, ry, rx = random.uniform((0.3, 0.3, 0.12, 0.12), (0.7, 0.7, 0.3, 0.3))
            cx -= 0.4 * (place == 0)
            masks[n] |= ((y / height - cy) / ry) ** 2 + ((x / width - cx) / rx) ** 2 <= 1
    return masks


def synthetic(
    records: int = 5,
    explanations: int = 6,
    size: int = 96,
    map_size: int = 48,
    pictures: int = 4,
    classes: int = 7,
) -> History:
    maps = bumps(records * explanations, map_size, map_size)
    # Not all are annotated, and not all are judged; controls are measured now and then.
    pairs = list({(k % pictures, k % classes): None for k in range(explanations)})[:-1]
    masks = dict(zip(pairs, ellipses(len(pairs), size, size), strict=True))
    controls = {
        1: {
            "random map": {"overall_auc": 0.01, "deletion_auc": 0.3},
            "centre gaussian": {"overall_auc": 0.15},
        },
        3: {"random map": {"overall_auc": 0.07, "deletion_auc": 0.3}},
    }
    made = []
    for r in range(records):
        blank = [(r == 0 and k % 3 == 0) or (k == 4 and r == 2) for k in range(explanations)]
        first = r * explanations
        for k, nothing in enumerate(blank):
            if nothing:
                maps[first + k] = 0
        made.append(
            Record(
                step=r * 40,
                epoch=r,
                title="before training" if r == 0 else f"epoch {r} · step {r * 40}",
                values={
                    "deletion_auc": 0.31 / (r + 1),
                    "insertion_auc": 0.2 + 0.6 * (1 - math.exp(-r / 2)),
                    "overall_auc": math.nan if r == 0 else 0.1 + r / 10,
                    "pointing_game": r / (records + 1),
                    "drift": math.nan if r == 0 else 0.5 / r,
                    "blank_maps": float(sum(blank)),
                    "seconds": 12.345 + r,
                },
                images=[k % pictures for k in range(explanations)],
                targets=[k % classes for k in range(explanations)],
                scores=[
                    (k + 1) / (explanations + 1) * (r + 1) / records for k in range(explanations)
                ],
                blank=blank,
                drift=[None if r == 0 else 0.051 * k / r for k in range(explanations)],
                deletion_auc=[
                    None if k == 1 else 0.6 / (k + r + 1)
                    for k in range(explanations if r != 3 else 0)
                ],
                insertion_auc=[
                    None if k == 1 else 0.9 - 0.5 / (k + r / 2 + 1)
                    for k in range(explanations if r != 3 else 0)
                ],
                controls=controls.get(r, {}),
                control_aucs={
                    name: [0.01 * k if k % 4 else None for k in range(explanations)]
                    for name in controls.get(r, {})
                },
                predicted=[(k + (k % 3 == 2)) % classes for k in range(explanations)],
                verdicts=[VERDICTS[k % 3 if k != 1 or r < 3 else 1] for k in range(explanations)],
                predicted_scores=[0.6 + 0.01 * k for k in range(explanations)],
                deletion=[
                    None if k == 1 else [0.9 * 0.7**n + 0.01 * k for n in range(9)]
                    for k in range(explanations)
                ],
                insertion=[
                    None if k == 1 else [1 - 0.9 * 0.6**n - 0.01 * k for n in range(9)]
                    for k in range(explanations)
                ],
                energy=[
                    None if nothing else 0.1 + 0.05 * (k % 9) for k, nothing in enumerate(blank)
                ],
                hits=[None if nothing else float(k % 2) for k, nothing in enumerate(blank)],
                peaks=[None if nothing else [0.5, 0.4] for nothing in blank],
                away=[None if nothing else 0.2 * (k % 2) for k, nothing in enumerate(blank)],
                time=1.7e9 + 60 * r,
                first=first,
            )
        )
    return History(
        configuration={"method": "SIGCAM(iterations=20)", "every_n_epochs": "1", "note": QUOTES},
        class_names={
            0: NASTY,
            1: "circle",
            2: "a crescent with a rather long class name",
            3: "star",
        },
        images=photos(pictures, size, size),
        masks=masks,
        maps=maps,
        records=made,
    )


def overall(record: Record, k: int) -> float | None:
    """Return what the page has to say of one explanation's AUCs."""
    if not record.insertion_auc or not record.deletion_auc:
        return None
    insertion, deletion = record.insertion_auc[k], record.deletion_auc[k]
    return None if insertion is None or deletion is None else insertion - deletion


class Scripts(HTMLParser):
    """The scripts of a page, and the names of all its elements and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.links: list[str] = []
        self._open: dict[str, str | None] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "script":
            self._open = dict(attrs)
            self.scripts.append((self._open, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.scripts[-1] = (self._open, self.scripts[-1][1] + data)


def decoded(html: str) -> dict[str, Any]:
    """Return what the page is about, with its records."""
    scripts = Scripts(html).scripts
    kinds = [attributes.get("type") for attributes, _ in scripts]
    assert kinds == [None] + ["application/json"] * (len(scripts) - 1)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = [
        (attributes.get("class"), json.loads(text, parse_constant=refuse))
        for attributes, text in scripts[1:]
    ]
    data: dict[str, Any] = found[0][1]
    parts = {"record": "records", "other": "others", "end": "ends", "failures": "failures"}
    return data | {name: [each for kind, each in found if kind == k] for k, name in parts.items()}


def image(url: str) -> npt.NDArray[np.uint8]:
    content = base64.b64decode(url.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)))


def maps_of(data: dict[str, Any], r: int) -> npt.NDArray[np.uint8]:
    """Cut a record's maps out of its sheet, the long way round."""
    height, width = data["records"][0]["map_size"]
    record = data["records"][r]
    sheet = image(record["sheet"])
    places = [divmod(k, record["columns"]) for k in range(len(record["images"]))]
    return np.stack(
        [sheet[y * height : (y + 1) * height, x * width : (x + 1) * width] for y, x in places]
    )


def save(history: History, folder: Path) -> None:
    """Store a history as the monitor does, record after record."""
    pictures = torch.from_numpy(history.images).permute(0, 3, 1, 2)
    writer = HistoryWriter(
        folder,
        pictures,
        configuration=history.configuration,
        class_names=history.class_names,
        epochs=history.epochs,
        masks={pair: torch.from_numpy(mask) for pair, mask in history.masks.items()},
    )
    for record in history.records:
        maps = np.ascontiguousarray(history.maps[record.first : record.end])
        writer.add(record, torch.from_numpy(maps))


def written(value: float) -> str:
    """Return a number as the page writes it: with two decimals, and a minus sign."""
    text = str(Decimal(value).quantize(Decimal("0.01"), ROUND_HALF_UP))
    return text.replace("-", "\u2212") if float(text) else text.replace("-", "")


class Page:
    """A page that is open in the browser."""

    def __init__(self, chrome: Any, history: History, folder: Path, width: int = 1400) -> None:
        self.chrome = chrome
        path = folder / "report.html"
        path.write_text(page(history), encoding="utf-8")
        self.data = decoded(path.read_text(encoding="utf-8"))
        self.narrow(width)
        chrome.get(path.as_uri())
        self.settle()

    def narrow(self, width: int, height: int = 1000) -> None:
        """Set the width of the page; a window itself can't be as narrow as a telephone's."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.chrome.execute_script(script, *arguments)

    def settle(self) -> None:
        """Wait until what is shown has been drawn."""
        from selenium.webdriver.support.ui import WebDriverWait

        ready = (
            "const d = document.body.dataset;"
            "return !!d.drawn && ['filmed', 'cased', 'hidden', 'failed'].every(name => d[name] !== '')"
        )
        WebDriverWait(self.chrome, 20).until(lambda _: self.js(ready))

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.chrome).send_keys(*keys).perform()
        self.settle()

    def click(self, selector: str) -> None:
        # Not under the bar that stays at the top.
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.chrome.find_element("css selector", selector).click()
        self.settle()

    def captions(self) -> list[str]:
        script = "return [...document.querySelectorAll('#grid figcaption')].map(c => c.innerText)"
        return [" ".join(caption.split()) for caption in self.js(script)]

    def pixels(self, selector: str) -> npt.NDArray[np.uint8]:
        script = """
            const shown = document.querySelector(arguments[0]), {width: w, height: h} = shown;
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [w, h];
            const context = canvas.getContext("2d", {willReadFrequently: true});
            context.drawImage(shown, 0, 0);
            return [w, h, [...context.getImageData(0, 0, w, h).data]];"""
        width, height, values = self.js(script, selector)
        return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]

    def assert_shows(self, history: History, r: int) -> None:
        """Read back what the page says of one record."""
        record = history.records[r]
        assert self.js("return document.body.dataset.record") == str(r)
        assert self.js("return document.getElementById('title').textContent") == record.title
        expected = []
        for k, target in enumerate(record.targets):
            text = history.class_names.get(target, f"class {target}")
            verdict, predicted = record.verdicts[k], record.predicted[k]
            if verdict is not None:
                text += " ✓ right" if verdict == "right" else f" ✗ {verdict}"
            if verdict == "wrong" and predicted != target:
                name = history.class_names.get(predicted, f"class {predicted}")
                text += f" said {name} {written(record.predicted_scores[k])}"
            auc, energy = overall(record, k), record.energy[k]
            values = [("score", record.scores[k]), ("AUC", auc), ("on object", energy)]
            text += "".join(f" {label} {written(v)}" for label, v in values if v is not None)
            drift = record.drift[k]
            expected.append(f"{text} drift {NONE if drift is None else written(drift)}")
        assert self.captions() == expected
        labels = self.js(
            "return [...document.querySelectorAll('#grid figure')]"
            ".map(f => f.querySelector('.blank')?.textContent ?? null)"
        )
        assert labels == ["blank" if blank else None for blank in record.blank]
        count = self.js("return document.getElementById('blank-count').textContent")
        assert count == f"{sum(record.blank)} of {len(record.blank)} maps blank"
        shown = self.js(
            "return Object.fromEntries([...document.querySelectorAll('.curves .curve')]"
            ".map(c => [c.dataset.metric, c.dataset.value]))"
        )
        assert {name: float(value) for name, value in shown.items() if value} == {
            name: value for name, value in record.values.items() if not math.isnan(value)
        }

    def assert_sound(self) -> None:
        """Ask for errors, alerts, requests and overflow."""
        assert self.chrome.get_log("browser") == []
        assert self.js("return document.body.dataset.error ?? null") is None
        assert (
            self.js(
                "return performance.getEntriesByType('resource').map(e => e.name)"
                ".filter(n => !n.startsWith('data:'))"
            )
            == []
        )
        width, inner = self.js("return [document.documentElement.scrollWidth, innerWidth]")
        assert width <= inner
