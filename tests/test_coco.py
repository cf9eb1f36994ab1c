import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_aop.coco import CocoMultilabel
from lightning_aop.shapes import CLASSES, write_shapes

coco = pytest.importorskip("pycocotools.coco")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=8, val=6, size=48)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_labels_and_masks_are_those_of_a_direct_loop(root: Path) -> None:
    data = CocoMultilabel.from_root(root, "train")
    api = coco.COCO(str(root / "annotations" / "instances_train2017.json"))
    assert data.classes == list(CLASSES)
    assert len(data) == 8
    for index, image_id in enumerate(sorted(api.imgs)):
        image, labels = data[index]
        with Image.open(root / "train2017" / api.imgs[image_id]["file_name"]) as stored:
            expected = np.asarray(stored.convert("RGB")) / 255
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-6)
        masks = np.zeros((len(CLASSES), 48, 48), dtype=bool)
        for annotation in api.loadAnns(api.getAnnIds(image_id)):
            masks[annotation["category_id"] - 1] |= api.annToMask(annotation).astype(bool)
        np.testing.assert_array_equal(data.masks(index), masks)
        np.testing.assert_array_equal(labels.numpy(), masks.any(axis=(1, 2)).astype(float))


def test_reading_is_silent(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Warnings are errors here, so pycocotools' own would raise.
    CocoMultilabel.from_root(root, "val").masks(0)
    assert capsys.readouterr() == ("", "")


def test_without_pycocotools_the_extra_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-aop\[coco\]"'):
        CocoMultilabel.from_root(root)


def broken(root: Path, folder: Path, change: Any) -> tuple[Path, Path]:
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    change(content)
    file = folder / "instances.json"
    file.write_text(json.dumps(content))
    return root / "val2017", file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["annotations"][0].update(category_id=99),
            "has category_id 99, which the file",
        ),
        (lambda c: c["annotations"][0].update(image_id=-1), "has image_id -1, which the file does"),
        (lambda c: c["images"][0].update(file_name="../x.png"), "inside .*val2017: write it relat"),
        (lambda c: c["images"][0].update(file_name="/etc/x.png"), "which must name a file inside"),
        (lambda c: c.pop("categories"), "'?categories'?"),
    ],
)
def test_broken_annotations_are_named(
    change: Any, message: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        CocoMultilabel(*broken(root, tmp_path, change))


def test_missing_and_unreadable_files_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder: give the one that holds"):
        CocoMultilabel(tmp_path / "no", root / "annotations" / "instances_val2017.json")
    with pytest.raises(FileNotFoundError, match="is no file: give the annotations"):
        CocoMultilabel(root / "val2017", tmp_path / "no.json")
    cut = tmp_path / "cut.json"
    cut.write_text('{"images": [')
    with pytest.raises(ValueError, match=r"is no valid JSON .* copy or export it again"):
        CocoMultilabel(root / "val2017", cut)
    images, file = broken(root, tmp_path, lambda c: c["images"][0].update(file_name="absent.png"))
    with pytest.raises(OSError, match=r"absent.png, image \d+ of .*can't be read.*restore"):
        CocoMultilabel(images, file)[0]


def test_boxes_without_masks_label_but_do_not_mask(root: Path, tmp_path: Path) -> None:
    data = CocoMultilabel(
        *broken(root, tmp_path, lambda c: c["annotations"][0].update(segmentation=[]))
    )
    assert data[0][1].any()
    with pytest.raises(ValueError, match=r"annotation \d+ of image \d+ has no segmentation"):
        data.masks(0)


def test_an_image_without_annotations_is_negative(root: Path, tmp_path: Path) -> None:
    data = CocoMultilabel(*broken(root, tmp_path, lambda c: c.update(annotations=[])))
    assert len(data) == 6
    assert not data[0][1].any()
    assert not data.masks(0).any()
