"""What annotation tools' own libraries export, through the commands; run with `make test-others`.

Each library is told of the same photos and polygons in its own way, and writes them in COCO's format.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lightning_aop.cli.main import main
from lightning_aop.coco import CocoMultilabel

pytestmark = [
    pytest.mark.others,
    # What the libraries say of each other.
    pytest.mark.filterwarnings("default"),
]

WIDTH, HEIGHT = 80, 60
CLASSES = ["cat", "dog"]


@dataclass(frozen=True)
class Photo:
    """A photo with one object."""

    path: Path
    label: str
    polygon: list[tuple[float, float]]

    def mask(self) -> Any:
        """Return where the object is."""
        drawn = Image.new("1", (WIDTH, HEIGHT))
        ImageDraw.Draw(drawn).polygon(self.polygon, fill=1)
        return np.asarray(drawn)


def photos(folder: Path) -> list[Photo]:
    """Write ten photos of noise with a bright or a dark object each."""
    folder.mkdir()
    made = []
    for i in range(10):
        noise = np.random.default_rng(i).integers(60, 190, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        image, x = Image.fromarray(noise), 4 + 4 * i
        polygon = [(x, 10.0), (x + 30.0, 14.0), (x + 24.0, 44.0), (x + 4.0, 40.0)]
        ImageDraw.Draw(image).polygon(polygon, fill=("white", "black")[i % 2])
        path = folder / f"photo {i}é.png"
        image.save(path)
        made.append(Photo(path, CLASSES[i % 2], polygon))
    return made


def labelme2coco(made: list[Photo], root: Path) -> tuple[Path, Path]:
    tool = pytest.importorskip("labelme2coco")
    for photo in made:
        shape = {
            "label": photo.label, "points": photo.polygon, "group_id": None, "shape_type": "polygon",
            "flags": {},
        }  # fmt: skip
        about = {
            "version": "5.5.0", "flags": {}, "shapes": [shape], "imagePath": photo.path.name,
            "imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH,
        }  # fmt: skip
        photo.path.with_suffix(".json").write_text(json.dumps(about))
    tool.convert(str(made[0].path.parent), str(root / "export"))
    return root / "export" / "dataset.json", made[0].path.parent


def label_studio(made: list[Photo], root: Path) -> tuple[Path, Path]:
    converter = pytest.importorskip("label_studio_sdk.converter")
    config = """<View><Image name="image" value="$image"/>
      <PolygonLabels name="label" toName="image"><Label value="cat"/><Label value="dog"/></PolygonLabels>
    </View>"""
    tasks = []
    for number, photo in enumerate(made):
        points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in photo.polygon]
        result = {
            "id": f"r{number}", "type": "polygonlabels", "from_name": "label", "to_name": "image",
            "original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0,
            "value": {"points": points, "polygonlabels": [photo.label], "closed": True},
        }  # fmt: skip
        tasks.append(
            {"id": number, "data": {"image": f"/data/upload/1/{photo.path.name}"},
             "annotations": [{"id": number, "completed_by": 1, "result": [result]}]}
        )  # fmt: skip
    (root / "tasks.json").write_text(json.dumps(tasks))
    # As from a server: the photos are where the user has them.
    tool = converter.Converter(config, None, download_resources=False)
    out = root / "export"
    tool.convert_to_coco(str(root / "tasks.json"), str(out), str(out / "images"), is_dir=False)
    return out / "result.json", made[0].path.parent


def fiftyone(made: list[Photo], root: Path) -> tuple[Path, Path]:
    os.environ["FIFTYONE_DO_NOT_TRACK"] = "1"
    tool = pytest.importorskip("fiftyone")
    coco = pytest.importorskip("fiftyone.utils.coco")
    exporter = coco.COCODetectionDatasetExporter(str(root / "export"), classes=CLASSES)
    with exporter:
        for photo in made:
            mask = photo.mask()
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
            box = [left / WIDTH, top / HEIGHT, (right - left) / WIDTH, (bottom - top) / HEIGHT]
            found = tool.Detection(
                label=photo.label, bounding_box=box, mask=mask[top:bottom, left:right]
            )
            about = tool.ImageMetadata.build_for(str(photo.path))
            exporter.export_sample(str(photo.path), tool.Detections(detections=[found]), about)
    return root / "export" / "labels.json", root / "export" / "data"


def supervision(made: list[Photo], root: Path) -> tuple[Path, Path]:
    tool = pytest.importorskip("supervision")
    annotations = {}
    for photo in made:
        mask = photo.mask()[None]
        annotations[str(photo.path)] = tool.Detections(
            xyxy=tool.mask_to_xyxy(mask).astype(float), mask=mask,
            class_id=np.array([CLASSES.index(photo.label)]),
        )  # fmt: skip
    data = tool.DetectionDataset(CLASSES, [str(p.path) for p in made], annotations)
    data.as_coco(str(root / "images"), str(root / "labels.json"))
    return root / "labels.json", root / "images"


TOOLS = [labelme2coco, label_studio, fiftyone, supervision]


@pytest.mark.parametrize("tool", TOOLS)
def test_exports_go_through_the_commands(
    tool: Callable[[list[Photo], Path], tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = photos(tmp_path / "photos")
    file, folder = tool(made, tmp_path)
    monkeypatch.chdir(tmp_path)
    data = CocoMultilabel(folder, file)
    assert data.classes == CLASSES
    assert len(data) == len(made)
    for index, name in enumerate(data.files):
        (photo,) = (p for p in made if p.path.stem in name)
        column = CLASSES.index(photo.label)
        assert data[index][1].nonzero().tolist() == [[column]]
        mask, wanted = data.masks(index, [column])[0], photo.mask()
        assert (mask & wanted).sum() / (mask | wanted).sum() > 0.9

    options = [
        f"--data.annotations={file}", f"--data.images={folder}", "--data.size=64",
        "--data.num_workers=0", "--model.backbone=squeezenet1_1", "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    assert main(["fit", *options, "--model.weights=null", "--trainer.max_epochs=1"]) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    game = ["--method=[centre]", "--rules.score_threshold=0", "--data.val_share=1"]
    assert main(["pointing-game", *options, f"--ckpt_path={checkpoint}", *game]) == 0
    (result,) = json.loads((tmp_path / "pointing_game" / "results.json").read_text())
    assert (result["pairs"], result["skipped"]) == (len(made), 0)
    # By hand: is the middle of the photo on the object, of each class?
    hits = [np.mean([p.mask()[HEIGHT // 2, WIDTH // 2] for p in made if p.label == label])
            for label in CLASSES]  # fmt: skip
    assert result["accuracy"]["0"] == pytest.approx(np.mean(hits), abs=0.11)

    network = ["--model", "squeezenet1_1", "--weights", str(checkpoint), "--size", "64"]
    photo = str(folder / data.files[0])
    for command in ("explain", "compare"):
        out = tmp_path / f"{command}.png"
        method = ["--method", "gradcam"] if command == "explain" else ["--methods", "gradcam"]
        assert main([command, photo, *network, *method, "-o", str(out)]) == 0
        assert out.stat().st_size > 1000
