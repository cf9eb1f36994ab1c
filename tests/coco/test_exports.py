"""What annotation tools export, each with a habit of its own, against the plain file."""

import gzip
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from lightning_aop.cli.main import main
from lightning_aop.coco import CocoClassification, CocoMultilabel, ImageError, MultilabelClassifier

pytest.importorskip("pycocotools")
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*sampler"),
]

SQUARE = [10, 5, 30, 5, 30, 15, 10, 15]


def plain(count: int = 1) -> dict[str, Any]:
    """Return photos of 60 x 40, each with a cat in a square of 20 x 10."""
    return {
        "images": [
            {"id": i, "file_name": f"é{i}.png", "width": 60, "height": 40} for i in range(1, count + 1)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "bbox": [10, 5, 20, 10], "iscrowd": 0,
             "segmentation": [SQUARE]} for i in range(1, count + 1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }  # fmt: skip


def export(
    root: Path, content: Any, write: Callable[[Path, str], object] | None = None
) -> tuple[Path, Path]:
    """Write photos and annotations, and return the folder and the file."""
    folder, file = root / "images", root / "export.json"
    folder.mkdir(exist_ok=True)
    for i, _ in enumerate(content["images"], 1):
        noise = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"é{i}.png")
    (write or (lambda path, text: path.write_text(text)))(file, json.dumps(content))
    return folder, file


def first(**changes: Any) -> Callable[[Any], None]:
    return lambda content: content["images"][0].update(changes)


def cat(**changes: Any) -> Callable[[Any], None]:
    return lambda content: content["annotations"][0].update(changes)


def floats(content: Any) -> None:
    for entry in [*content["images"], *content["annotations"], *content["categories"]]:
        entry.update({k: float(v) for k, v in entry.items() if isinstance(v, int)})


def by_address(content: Any) -> None:
    del content["images"][0]["file_name"]
    content["images"][0]["coco_url"] = "https://x.org/images/%C3%A91.png?size=full"


# Down the columns: 10 columns, and in each of 20 the rows from 5 to 14.
CODE = {"size": [40, 60], "counts": [405, *[10, 30] * 19, 10, 25 + 30 * 40]}


HABITS: dict[str, Callable[[Any], object]] = {
    "numbers as floats": floats,
    "an address": by_address,
    "Windows": first(file_name="images\\é1.png"),
    "accents in two parts": first(file_name=unicodedata.normalize("NFD", "é1.png")),
    "another case": first(file_name="É1.PNG"),
    "a server's name": first(file_name="/data/upload/1/é1.png"),
    "another machine's name": first(file_name="C:\\Users\\me\\export\\é1.png"),
    "a tool's own folder": first(file_name="../../media/upload/é1.png"),
    "no size": first(width=None, height=None),
    "sizes as text": first(width="60", height="40.0"),
    "sizes of 0": first(width=0, height=0),
    "an address as the name": first(file_name="https://x.org/d/%C3%A91.png?key=1"),
    "a path and no name": lambda c: c["images"][0].update(
        path="/datasets/1/" + c["images"][0].pop("file_name")
    ),
    "blanks around": first(file_name=" é1.png "),
    "escaped letters": first(file_name="%C3%A91.png"),
    "no suffix": first(file_name="é1"),
    "an image twice": lambda c: c["images"].append(dict(c["images"][0])),
    "an image twice, on two days": lambda c: c["images"].append(
        c["images"][0] | {"date_captured": "2020-02-02", "license": 3}
    ),
    "corners in pairs": cat(segmentation=[[[10, 5], [30, 5], [30, 15], [10, 15]]]),
    "one polygon's pairs": cat(segmentation=[[10, 5], [30, 5], [30, 15], [10, 15]]),
    "corners by x and y": cat(
        segmentation=[[{"x": x, "y": y} for x, y in ((10, 5), (30, 5), (30, 15), (10, 15))]]
    ),
    "corners as text": cat(segmentation=[[str(v) for v in SQUARE]]),
    "codes in a list": cat(segmentation=[CODE]),
    "a nameless twin": lambda c: c["categories"].append({"id": 3, "name": "cat"}),
    "Roboflow's root": lambda c: c["categories"].insert(
        0, {"id": 0, "name": "dog", "supercategory": "none"}
    ),
}


@pytest.mark.parametrize("habit", HABITS)
def test_habits_change_nothing(habit: str, tmp_path: Path) -> None:
    content = plain()
    HABITS[habit](content)
    data = CocoMultilabel(*export(tmp_path, content))
    assert sorted(data.classes) == ["cat", "dog"]
    column = data.classes.index("cat")
    image, labels = data[0]
    assert image.shape == (3, 40, 60)
    assert labels.nonzero().tolist() == [[column]]
    expected = np.zeros((40, 60), dtype=bool)
    expected[5:15, 10:30] = True
    np.testing.assert_array_equal(data.masks(0, [column])[0], expected)


def packed(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode()))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    files = export(tmp_path, plain(), lambda path, text: path.write_bytes(text.encode(encoding)))
    assert CocoMultilabel(*files).classes == ["cat", "dog"]


def test_packed_files(tmp_path: Path) -> None:
    folder, file = export(tmp_path, plain(), packed)
    assert CocoMultilabel(folder, file).classes == ["cat", "dog"]
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"export.json is no valid JSON .*cut short"):
        CocoMultilabel(folder, file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<annotation/>", "is XML, as of Pascal VOC or CVAT: let the tool export COCO's format"),
        (b"PK\3\4" + bytes(99), "is a ZIP archive, to be unpacked first"),
        (b'{"version": "5", "shapes": [], "imagePath": "a.jpg"}', "is labelme's file of one image"),
        (b'{"a.jpg1": {"regions": []}}', "no list 'images' .*let the tool export COCO's format"),
        ('{"images": "\xe8"}'.encode("latin-1"), "is not in UTF-8 .*: save it as UTF-8"),
    ],
)
def test_other_formats_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "export.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"export.json {message}|export.json has {message}"):
        CocoMultilabel(tmp_path, tmp_path / "export.json")


def test_two_spellings_are_not_guessed(tmp_path: Path) -> None:
    content = plain()
    first(file_name="CAT.png")(content)
    folder, file = export(tmp_path, content)
    for name in ("cat.png", "Cat.png"):
        Image.new("RGB", (60, 40)).save(folder / name)
    with pytest.raises(ImageError, match=r"CAT\.png.*the file is missing"):
        CocoMultilabel(folder, file)[0]


def test_one_name_of_two_kinds_is_refused(tmp_path: Path) -> None:
    content = plain(2)
    content["categories"] = [
        {"id": 1, "name": "other", "supercategory": "animal"},
        {"id": 2, "name": "other", "supercategory": "vehicle"},
    ]
    assert CocoMultilabel(*export(tmp_path, content)).classes == ["other"]
    content["annotations"][1]["category_id"] = 2
    with pytest.raises(
        ValueError, match=r"name 'other', one of 'animal' and one of 'vehicle': rename"
    ):
        CocoMultilabel(*export(tmp_path, content))


def test_links_are_followed_where_asked(tmp_path: Path) -> None:
    folder, file = export(tmp_path, plain())
    (folder / "é1.png").rename(tmp_path / "away.png")
    (folder / "é1.png").symlink_to(tmp_path / "away.png")
    with pytest.raises(ImageError, match=r"a link out of .*links=True \(--data.links true\)"):
        CocoMultilabel(folder, file)[0]
    assert CocoMultilabel(folder, file, links=True)[0][0].std() > 0.1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("sizes", ["as shown", "none"])
def test_pictures_lie_as_they_were_shown(orientation: int, sizes: str, tmp_path: Path) -> None:
    content = plain()
    shown = (60, 40) if orientation < 5 else (40, 60)
    first(**(dict.fromkeys(("width", "height")) if sizes == "none" else
             dict(zip(("width", "height"), shown, strict=True))))(content)  # fmt: skip
    folder, file = export(tmp_path, content)
    path = folder / "é1.png"
    with Image.open(path) as opened:
        stored = np.asarray(opened)
        exif = opened.getexif()
        exif[0x0112] = orientation
        opened.save(path, exif=exif)
    turns: dict[int, Callable[[Any], Any]] = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90,
    }  # fmt: skip
    data = CocoMultilabel(folder, file)
    np.testing.assert_array_equal(np.asarray(data.image(0)), turns[orientation](stored))
    assert data.masks(0).shape[1:] == shown[::-1]
    if orientation < 5 or sizes == "none":
        # A tool that draws on the pixels as they are stored.
        raw = CocoMultilabel(folder, file, exif=False)
        np.testing.assert_array_equal(np.asarray(raw.image(0)), stored)


def test_a_code_tells_the_size_that_was_drawn_on(tmp_path: Path) -> None:
    content = plain()
    first(width=None, height=None)(content)
    cat(segmentation=CODE)(content)
    folder, file = export(tmp_path, content)
    with Image.open(folder / "é1.png") as opened:
        exif = opened.getexif()
        exif[0x0112] = 6
        opened.save(folder / "é1.png", exif=exif)
    assert CocoMultilabel(folder, file).image(0).size == (60, 40)


def test_boxes_instead_of_masks(tmp_path: Path) -> None:
    content = plain()
    triangle = [[10, 5, 30, 5, 30, 25]]
    cat(segmentation=triangle, bbox=[12, 8, 4, 6])(content)
    data = CocoMultilabel(*export(tmp_path, content))
    rows, columns = data.masks(0, [0], boxes=True)[0].nonzero()
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (12, 15, 8, 13)
    assert len(rows) == 4 * 6
    cat(bbox=None)(content)
    data = CocoMultilabel(*export(tmp_path, content))
    inside, (box,) = data.masks(0, [0])[0], data.masks(0, [0], boxes=True)
    rows, columns = inside.nonzero()
    expected = np.zeros_like(box)
    expected[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    np.testing.assert_array_equal(box, expected)
    assert inside.sum() < box.sum()


def trained(data: CocoClassification, root: Path) -> Path:
    """Train a small network for an epoch, and return its checkpoint."""
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=root, logger=False, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(MultilabelClassifier("squeezenet1_1", None), datamodule=data)
    assert trainer.callback_metrics["val/loss"] > 0
    trainer.save_checkpoint(root / "head.ckpt")
    return root / "head.ckpt"


def test_one_file_is_split_in_two(tmp_path: Path) -> None:
    folder, file = export(tmp_path, plain(10))
    data = CocoClassification(annotations=file, images=folder, size=32, num_workers=0)
    data.setup("fit")
    train, val = data.dataset("train"), data.dataset("val")
    assert (len(train), len(val)) == (8, 2)
    assert sorted(train.ids + val.ids) == list(range(1, 11))
    for i in range(2):
        assert val.image(i).size == (60, 40)
        assert val.masks(i).any()
    every = CocoClassification(annotations=file, images=folder, val_share=1)
    assert len(every.dataset("val")) == len(every.dataset("train")) == 10
    for wrong in (
        {},
        {"root": tmp_path, "annotations": file},
        {"root": tmp_path, "images": folder},
    ):
        with pytest.raises(ValueError, match=r"--data.annotations FILE --data.images DIR"):
            CocoClassification(**wrong)
    with pytest.raises(ValueError, match="val_share must lie above 0 and not above 1, got 0"):
        CocoClassification(annotations=file, val_share=0)


@pytest.mark.filterwarnings("ignore")
def test_pairs_without_a_mask_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = plain(7)
    broken: list[Any] = [
        [], [[1, 1, 2, 2]], [[5, 5, 5, 5, 5, 5]], [CODE], [SQUARE], None, [SQUARE, [1, 1, 3]],
    ]  # fmt: skip
    for entry, segmentation in zip(content["annotations"], broken, strict=True):
        entry["segmentation"] = segmentation
    # Beside masks a box stands for none; here nothing does.
    del content["annotations"][0]["bbox"], content["annotations"][5]["bbox"]
    folder, file = export(tmp_path, content)
    options: dict[str, Any] = {"annotations": file, "images": folder, "size": 64, "val_share": 1}
    checkpoint = trained(CocoClassification(num_workers=0, **options), tmp_path)

    def play(*words: str) -> Any:
        status = main(
            ["pointing-game", *(f"--data.{k}={v}" for k, v in options.items()),
             "--data.num_workers=0", f"--ckpt_path={checkpoint}", "--method=[centre]",
             "--model.backbone=squeezenet1_1", "--rules.score_threshold=0",
             f"--output={tmp_path / 'game'}", "--trainer.logger=false", "--trainer.accelerator=cpu",
             f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false", *words]
        )  # fmt: skip
        (result,) = json.loads((tmp_path / "game" / "results.json").read_text())
        return status, result["pairs"], result["skipped"]

    assert play() == (0, 2, 5)
    assert "5 (image, class) pairs were left out" in capsys.readouterr().out
    # Of the two that have no box, no segmentation tells one either.
    assert play("--masks=box") == (0, 5, 2)
    content["annotations"][4]["segmentation"] = {"size": [3, 3], "counts": [9]}
    file.write_text(json.dumps(content))
    assert main(["pointing-game"]) != 0
    assert play("--data.on_error=skip") == (0, 1, 6)


def test_a_single_category_is_trained(tmp_path: Path) -> None:
    content = plain(5)
    del content["categories"][1]
    folder, file = export(tmp_path, content)
    trained(CocoClassification(annotations=file, images=folder, size=64, num_workers=0), tmp_path)
    saved = torch.load(tmp_path / "head.ckpt", weights_only=True)
    assert saved["classes"] == ["cat"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no data are named: give a folder, --data.root DIR, or one file"),
        (["--data.root=no"], "--data.root no: no such folder; give one in COCO's layout"),
        (["--data.annotations=no.json"], "--data.annotations no.json: no such file"),
    ],
)
def test_data_are_looked_for_before_weights(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # ResNet50's weights would be downloaded, and there is no network of the name.
    assert main(["fit", "--model.backbone=no_such_network", *words]) != 0
    assert message in capsys.readouterr().err


def test_no_option_loads_a_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "validate", "test", "predict", "pointing-game"):
        with pytest.raises(SystemExit):
            main([command, f"--data.root={tmp_path}", "--weights_only=false"])
        assert "--weights_only" in capsys.readouterr().err
