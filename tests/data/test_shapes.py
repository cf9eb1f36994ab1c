"""Tests of the generated picture set: its files, its masks, its determinism."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lightning_aop.data import shapes
from lightning_aop.data.shapes import CLASSES, write_shapes

SPLITS = {"train2017": 36, "val2017": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("set") / "shapes", train=36, val=8, size=64, seed=3)


def written(root: Path, split: str) -> Any:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# pycocotools has not followed NumPy 2 here.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("split", SPLITS)
def test_pycocotools_reads_the_set_and_its_masks_fit_the_pictures(root: Path, split: str) -> None:
    coco_api: Any = pytest.importorskip("pycocotools.coco")
    coco = coco_api.COCO(str(root / "annotations" / f"instances_{split}.json"))
    assert len(coco.imgs) == SPLITS[split]
    assert [c["name"] for c in coco.loadCats(range(1, 7))] == list(CLASSES)
    for image in coco.imgs.values():
        with Image.open(root / split / image["file_name"]) as opened:
            assert opened.mode == "RGB"
            assert opened.size == (image["width"], image["height"]) == (64, 64)
            pixels = np.asarray(opened, dtype=np.float64) / 255
        owned = coco.loadAnns(coco.getAnnIds(image["id"]))
        masks = [coco.annToMask(a).astype(bool) for a in owned]
        assert 1 <= len(masks) <= 3
        assert np.sum(masks, axis=0).max() == 1, "shapes overlap"
        index = image["id"] % 1_000_000 - 1
        ground = shapes._ground(np.random.default_rng([3, list(SPLITS).index(split), index]), 64)[0]
        changed = np.abs(pixels - ground).max(-1)
        for annotation, mask in zip(owned, masks, strict=True):
            (flat,) = annotation["segmentation"]
            canvas = Image.new("L", (640, 640))
            ImageDraw.Draw(canvas).polygon([10 * v - 0.5 for v in flat], fill=1)
            drawn = np.asarray(canvas).reshape(64, 10, 64, 10).mean((1, 3)) >= 0.5
            assert (drawn & mask).sum() / (drawn | mask).sum() > 0.9
            # The drawing changes nearly every pixel of the mask.
            assert (changed[mask] > 0.1).mean() > 0.9
            x, y, width, height = annotation["bbox"]
            rows, columns = np.nonzero(mask)
            edges = (x, y, x + width, y + height)
            seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(np.subtract(edges, seen)).max() < 1.5
            assert 0 <= min(edges) < max(edges) <= 64
            assert annotation["area"] == pytest.approx(mask.sum(), rel=0.1)
            assert annotation["iscrowd"] == 0
        # Far from every shape, past its shadow, the ground is untouched.
        near = np.any([shapes._blur(m.astype(float), 4.0) > 1e-3 for m in masks], axis=0)
        assert changed[~near].max() < 0.02


def test_every_class_shows_and_pictures_hold_one_to_three_shapes(root: Path) -> None:
    train = written(root, "train2017")
    assert {a["category_id"] for a in train["annotations"]} == set(range(1, 7))
    assert set(Counter(a["image_id"] for a in train["annotations"]).values()) == {1, 2, 3}
    pairs = Counter((a["image_id"], a["category_id"]) for a in train["annotations"])
    assert max(pairs.values()) >= 2, "no picture holds two shapes of one class"
    for key in ("images", "annotations"):
        ids = [row["id"] for split in SPLITS for row in written(root, split)[key]]
        assert len(set(ids)) == len(ids)


def test_shapes_stand_out_from_the_ground() -> None:
    for index in range(40):
        picture, instances = shapes._picture(11, 0, index, 64)
        for _, points in instances:
            inside = shapes._coverage(points, 64) > 0.99
            around = shapes._blur(inside.astype(float), 2.5)
            ring = (around > 0.02) & (around < 0.2)
            assert np.abs(picture[inside].mean(0) - picture[ring].mean(0)).max() > 0.15


def test_same_arguments_give_the_same_bytes_and_others_do_not(root: Path, tmp_path: Path) -> None:
    again = write_shapes(str(tmp_path / "again"), train=36, val=8, size=64, seed=3)
    assert digests(again) == digests(root)
    other = digests(write_shapes(tmp_path / "other", train=36, val=8, size=64, seed=4))
    assert not set(other.values()) & set(digests(root).values())
    pictures = [v for k, v in digests(root).items() if k.endswith(".png")]
    assert len(set(pictures)) == sum(SPLITS.values()), "train and val share a picture"
    # A picture hangs on its own number alone, so a smaller set is a part of a larger one.
    part = digests(write_shapes(tmp_path / "part", train=5, val=2, size=64, seed=3))
    assert {k: v for k, v in part.items() if k.endswith(".png")}.items() <= digests(root).items()


def test_global_random_state_is_untouched(tmp_path: Path) -> None:
    np.random.seed(5)
    expected = np.random.random(3).tolist()
    np.random.seed(5)
    write_shapes(tmp_path, train=2, val=0, size=32)
    assert np.random.random(3).tolist() == expected
    assert written(tmp_path, "val2017")["images"] == []


def test_complete_set_is_kept_and_an_interrupted_one_redone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shapes(tmp_path, train=4, val=2, size=32)
    whole = digests(tmp_path)
    draw = shapes._picture

    def fail(seed: int, split: int, index: int, size: int) -> Any:
        if (split, index) == (0, 2):
            raise KeyboardInterrupt
        return draw(seed, split, index, size)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "_picture", fail)
        write_shapes(tmp_path, train=4, val=2, size=32)
        with pytest.raises(KeyboardInterrupt):
            write_shapes(tmp_path, train=4, val=2, size=32, seed=1)
    assert not list((tmp_path / "annotations").iterdir())
    write_shapes(tmp_path, train=4, val=2, size=32)
    assert digests(tmp_path) == whole
    (tmp_path / "train2017" / "000000000003.png").unlink()
    write_shapes(tmp_path, train=4, val=2, size=32)
    assert digests(tmp_path) == whole


def test_foreign_annotations_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    path.write_text('{"info": {"description": "COCO 2017 Dataset"}}')
    with pytest.raises(FileExistsError, match="new folder"):
        write_shapes(tmp_path, train=1, val=1)
    assert "COCO 2017" in path.read_text()
    assert not (tmp_path / "train2017").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": 31}, "size=31.*at least 32"),
        ({"train": -1}, "train=-1.*at least 0"),
        ({"val": -2}, "val=-2.*at least 0"),
        ({"seed": -3}, "seed=-3.*at least 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict[str, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        write_shapes(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()
