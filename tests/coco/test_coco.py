import contextlib
import copy
import json
import multiprocessing
import pickle
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from lightning_aop.coco import CocoMultilabel, ImageError, Preprocess
from lightning_aop.coco.dataset import _runs
from lightning_aop.data.shapes import CLASSES, write_shapes

api = pytest.importorskip("pycocotools.coco")
codes = pytest.importorskip("pycocotools.mask")

# pycocotools has not followed NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
few = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=8, val=6, size=48)


def run_lengths(mask: Any) -> list[int]:
    """Return the runs of a mask, down its columns, background first."""
    runs, now = [0], False
    for value in mask.T.ravel().tolist():
        if value != now:
            runs.append(0)
            now = value
        runs[-1] += 1
    return runs


def listed(code: str) -> list[int] | None:
    runs = _runs(code)
    return None if runs is None else runs.tolist()


def compressed(mask: Any) -> str:
    return str(codes.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"], "ascii")


@st.composite
def masks(draw: Any, height: int, width: int) -> Any:
    """Masks of blobs or of noise, empty and full ones among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0, 0.02, 0.5, 0.98, 1]))
    coarse = draw(st.integers(1, 5))
    cells = rng.random((-(-height // coarse), -(-width // coarse))) < share
    return np.kron(cells, np.ones((coarse, coarse), dtype=bool))[:height, :width]


@st.composite
def segmentations(draw: Any, height: int, width: int) -> Any:
    kind = draw(st.sampled_from(["polygons", "counts", "compressed"]))
    if kind == "polygons":
        # A little outside of the picture too, as in COCO.
        x, y = st.floats(-2, width + 2), st.floats(-2, height + 2)
        corners = st.lists(st.tuples(x, y).map(list), min_size=3, max_size=7)
        polygon = corners.map(lambda points: [round(v, 2) for point in points for v in point])
        return draw(st.lists(polygon, min_size=1, max_size=3))
    mask = draw(masks(height, width))
    counts = run_lengths(mask) if kind == "counts" else compressed(mask)
    return {"size": [height, width], "counts": counts}


@st.composite
def instances(draw: Any) -> dict[str, Any]:
    """Whole valid files: ids in any order and with gaps, images with and without annotations."""
    ids = st.integers(0, 10**12)
    categories = draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    side = st.integers(1, 24)
    images = [
        {"id": i, "file_name": f"{i}.png", "width": draw(side), "height": draw(side)}
        for i in draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    ]
    annotations = []
    for image in images:
        for _ in range(draw(st.integers(0, 3))):
            annotation = {
                "id": 7 * len(annotations) + 1,
                "image_id": image["id"],
                "category_id": draw(st.sampled_from(categories)),
                "segmentation": draw(segmentations(image["height"], image["width"])),
                "iscrowd": draw(st.sampled_from([0, 0, 1])),
            }
            annotations.append(annotation)
    return {
        "images": images,
        "annotations": draw(st.permutations(annotations)),
        "categories": [{"id": c, "name": f"class {c}"} for c in categories],
    }


def write(folder: Path, content: Any) -> tuple[Path, Path]:
    """Write the pictures, black, and the annotations."""
    pictures, file = folder / "pictures", folder / "instances.json"
    pictures.mkdir()
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(pictures / image["file_name"])
    file.write_text(json.dumps(content))
    return pictures, file


def direct_loop(file: Path, crowds: bool = True) -> Iterator[tuple[int, Any, Any]]:
    """Yield the id, the labels and the masks of each image, as a user of pycocotools gets them."""
    index = api.COCO(str(file))
    categories = sorted(index.cats)
    for image in sorted(index.imgs):
        size = index.imgs[image]["height"], index.imgs[image]["width"]
        expected = np.zeros((len(categories), *size), dtype=bool)
        labels = np.zeros(len(categories), dtype=bool)
        for annotation in index.loadAnns(index.getAnnIds(image)):
            if crowds or not annotation["iscrowd"]:
                column = categories.index(annotation["category_id"])
                labels[column] = True
                expected[column] |= index.annToMask(annotation).astype(bool)
        yield image, labels, expected


@few
@given(instances(), st.booleans(), st.booleans())
def test_labels_and_masks_are_those_of_a_direct_loop(
    content: Any, keep_empty: bool, crowds: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pictures, file = write(Path(folder), content)
        data = CocoMultilabel(pictures, file, keep_empty=keep_empty, crowds=crowds)
        expected = [e for e in direct_loop(file, crowds) if keep_empty or e[1].any()]
        names = {c["id"]: c["name"] for c in content["categories"]}
        assert data.classes == [names[c] for c in sorted(names)]
        assert data.ids == [image for image, _, _ in expected]
        assert data.labels.shape == (len(expected), len(names))
        for index, (image, labels, where) in enumerate(expected):
            assert data.files[index] == f"{image}.png"
            np.testing.assert_array_equal(data.labels[index], labels)
            np.testing.assert_array_equal(data[index][1], labels.astype(float))
            np.testing.assert_array_equal(data.masks(index), where)
            np.testing.assert_array_equal(data.input_masks(index), where)
            some = list(range(len(names)))[::-2]
            np.testing.assert_array_equal(data.masks(index, some), where[some])


@pytest.mark.wide
def test_the_real_validation_set_is_that_of_a_direct_loop(real_data: Path) -> None:
    data = CocoMultilabel.from_root(real_data / "coco", "val2017")
    expected = list(direct_loop(data.file))
    assert len(data) == len(expected) > 50
    for index, (image, labels, where) in enumerate(expected):
        assert data.ids[index] == image
        np.testing.assert_array_equal(data.labels[index], labels)
        np.testing.assert_array_equal(data.masks(index), where)
        assert data.image(index).size == where.shape[:0:-1]


def test_pictures_are_those_of_the_files(root: Path) -> None:
    data = CocoMultilabel.from_root(root)
    assert data.classes == list(CLASSES)
    assert len(data) == 8
    for index, name in enumerate(sorted(p.name for p in (root / "train2017").iterdir())):
        with Image.open(root / "train2017" / name) as stored:
            expected = np.asarray(stored.convert("RGB")) / 255
        np.testing.assert_allclose(data[index][0].permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_reading_is_silent(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # Warnings are errors here, so pycocotools' own would raise.
        patch.setattr("warnings.filters", [("error", None, Warning, None, 0)])
        CocoMultilabel.from_root(root, "val2017").masks(0)
    assert capsys.readouterr() == ("", "")


def test_without_pycocotools_the_extra_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-aop\[coco\]"'):
        CocoMultilabel.from_root(root)


@pytest.mark.parametrize("pictures", ["S", "images/S"])
@pytest.mark.parametrize(
    "annotations",
    ["annotations/instances_S.json", "annotations/S.json", "S/_annotations.coco.json"],
)
def test_the_common_layouts_are_found(
    root: Path, tmp_path: Path, pictures: str, annotations: str
) -> None:
    file = tmp_path / annotations
    for folder in (tmp_path / pictures, file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations" / "instances_val2017.json").rename(file)
    try:
        # Beside images/S, a folder S that holds only the annotations is not that of the pictures.
        data = CocoMultilabel.from_root(tmp_path, "S")
    finally:
        file.rename(root / "annotations" / "instances_val2017.json")
    assert (data.file, len(data)) == (file, 6)
    if not (pictures == "images/S" and annotations.startswith("S/")):
        assert data.folder == tmp_path / pictures


@pytest.mark.parametrize("split", ["../val2017", "/val2017", "C:\\x", "..\\x", ""])
def test_a_split_leads_not_out_of_the_root(root: Path, split: str) -> None:
    with pytest.raises(ValueError, match=r"split .* inside"):
        CocoMultilabel.from_root(root / "annotations", split)


# Whatever is read while this is a list is noted in it. An audit hook can't be taken out again.
opened: list[str] | None = None


def note(event: str, arguments: Any) -> None:
    if event == "open" and opened is not None:
        opened.append(str(arguments[0]))


sys.addaudithook(note)


@contextlib.contextmanager
def watched(memory: int = 1 << 30) -> Iterator[list[str]]:
    """Yield the files that are opened; more memory than this is not to be had."""
    global opened
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    opened = names = []
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    try:
        yield names
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        opened = None


JUNK: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 65535, 65536, 10**9, 2**31, 2**63, 10**30, -(10**400)),
    *(float("nan"), float("inf"), -float("inf"), 1e308),
    *("", ".", "x", "1", "x\0y", "../../secret.png", "../secret.png", "/etc/passwd", "C:\\x"),
    *("..\\secret.png", "\\\\host\\x", "a/../../secret.png", "link.png", "away/secret.png"),
    *("\ud800", "x" * 5000, "~~~~", "00000000000000", "oooooooooooooooooooooooo0", "éé", "P" * 99),
    *(
        [],
        {},
        [[]],
        [None],
        [[None] * 6],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [[1, 2, 3, 4, 5, 6, 7]],
    ),
    *([["a", "b", 1, 2, 3, 4]], [[0, 0, float("nan"), 1, 1, 1]], [[0, 0, float("inf"), 1, 1, 1]]),
    *(
        [[0, 0, 1e9, 0, 0, 1e9]],
        [[0, 0, 10**400, 0, 0, 9]],
        [[0, 0, 99, 99] * 50_000],
        [[True] * 6],
    ),
    *({"counts": [1]}, {"size": [1, 1]}, {"size": None, "counts": [1]}, {"size": 3, "counts": "1"}),
    *({"size": [10**6, 10**6], "counts": [0, 10**12]}, {"size": [2**32, 2**32], "counts": "0"}),
    *([-1, 10], [2**32], [2**63, -(2**63)], [1.0], [0] * 1000, [1] * 1000, [10**400], ["1"], [[1]]),
]


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each entry of nested lists and dictionaries."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


@st.composite
def broken_instances(draw: Any) -> tuple[Any, str]:
    """Return a valid file's content, and the text of one broken in one or two places."""
    content = draw(instances())
    changed = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 2))):
        found = list(places(changed))
        if not found:
            break
        # Every key as often as every other, of which polygons have fewer than corners.
        keys = sorted({str(key) for _, key in found if isinstance(key, str)} | {"in a list"})
        kind = draw(st.sampled_from(keys))
        chosen = [p for p in found if (p[1] if isinstance(p[1], str) else "in a list") == kind]
        node, key = draw(st.sampled_from(chosen or found))
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "double", "nest"]))
        if how == "replace":
            node[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
        elif how == "drop":
            del node[key]
        elif how == "double" and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        else:
            node[key] = draw(st.sampled_from([[node[key]], {"id": node[key]}]))
    text = json.dumps(changed)
    if draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(text)))
        text = text[:cut] + draw(st.sampled_from(["", "\0", "]", "}", "[" * 100_000]))
    return content, text


def survives(name: Path, act: Callable[[], Any], *expected: str) -> Any:
    """Return what it gives, or None after an error that helps."""
    try:
        return act()
    except (ValueError, FileNotFoundError, ImageError) as error:
        message = str(error)
    assert [word for word in (str(name), *expected) if word not in message] == []
    return None


@pytest.mark.wide
@settings(few, max_examples=400)
@given(broken_instances(), st.sampled_from(["raise", "skip"]))
def test_broken_files_are_survived(case: tuple[Any, str], on_error: Any) -> None:
    content, text = case
    with tempfile.TemporaryDirectory() as name:
        pictures, file = write(Path(name), content)
        file.write_text(text)
        secret = Path(name) / "secret.png"
        Image.new("RGB", (8, 8)).save(secret)
        (pictures / "link.png").symlink_to(secret)
        (pictures / "away").symlink_to(secret.parent)
        with watched() as names:
            data = survives(file, lambda: CocoMultilabel(pictures, file, on_error=on_error))
            for index in range(len(data or [])):
                image = str(data.ids[index])
                item = survives(file, lambda i=index: data[i], image)
                assert item is not None or on_error == "raise"
                found = survives(file, lambda i=index: data.masks(i), image)
                if item is not None and found is not None and not (item[1] < 0).any():
                    assert found.shape == (len(data.classes), *item[0].shape[1:])
        assert str(file) in names
        assert not [n for n in names if Path(n).resolve() == secret.resolve()]
        assert "/etc/passwd" not in names


def broken(root: Path, folder: Path, change: Any) -> tuple[Path, Path]:
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    change(content)
    file = folder / "instances.json"
    file.write_text(json.dumps(content))
    return root / "val2017", file


def image(**values: Any) -> Any:
    return lambda c: c["images"][0].update(values)


def annotation(**values: Any) -> Any:
    return lambda c: c["annotations"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (annotation(category_id=99), "annotation .* has category_id 99, which the file"),
        (annotation(image_id=-1), "has image_id -1, which the file does"),
        (annotation(image_id=[1]), r"has image_id \[1\], which the file does"),
        (annotation(id=None), "'annotations' has the id None, where ids are whole numbers"),
        (lambda c: c["annotations"][0].pop("image_id"), "has image_id None, which the file"),
        (image(file_name="../x.png"), "image .* inside .*val2017: write it relat"),
        (image(file_name="/etc/x.png"), "which must name a file inside"),
        (image(file_name="a\\..\\..\\x"), "which must name a file inside"),
        (image(file_name="C:x.png"), "which must name a file inside"),
        (image(file_name="x\0.png"), "which must name a file inside"),
        (image(file_name=""), "which must name a file inside"),
        (image(file_name=7), "file_name 7, which must name a file inside"),
        (image(width=0), r"image \d+ has width and height \[0, 48\], .*whole numbers"),
        (image(height=True), r"\[48, True\], .*whole numbers"),
        (image(width=48.5), r"\[48.5, 48\], .*whole numbers"),
        (image(width=1 << 16, height=None), r"\[65536\], .*whole numbers"),
        (image(width=10_000, height=10_000), r"more than 89478485 pixels: .*MAX_IMAGE_PIXELS"),
        (lambda c: c.pop("categories"), "has no list 'categories' of objects"),
        (lambda c: c.update(images={"1": {}}), "has no list 'images' of objects"),
        (
            lambda c: c["images"].append(c["images"][0] | {"width": 9}),
            r"'images' has the id \d+ twice",
        ),
        (lambda c: c["categories"].append({"id": "x"}), "'categories' has the id 'x', where"),
        (lambda c: c["categories"].append({"id": True}), "'categories' has the id True, where"),
        (lambda c: c["categories"].append({"id": [1]}), r"'categories' has the id \[1\], where"),
    ],
)
def test_broken_annotations_are_named(
    change: Any, message: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*{message}"):
        CocoMultilabel(*broken(root, tmp_path, change))


@pytest.mark.parametrize("text", ['{"images": [', "", "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_broken_json_is_named(text: str, root: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_text(text)
    with pytest.raises(ValueError, match=r"cut.json is no valid JSON .* copy or export it again"):
        CocoMultilabel(root / "val2017", cut)


def test_missing_files_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder: give the one that holds"):
        CocoMultilabel(tmp_path / "no", root / "annotations" / "instances_val2017.json")
    with pytest.raises(FileNotFoundError, match="is no file: give the annotations"):
        CocoMultilabel(root / "val2017", tmp_path / "no.json")


def test_the_encoding_is_detected(root: Path, tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        images, file = broken(root, tmp_path, lambda c: c["categories"][0].update(name="Hündchen"))
        file.write_text(json.dumps(json.loads(file.read_text()), ensure_ascii=False), encoding)
        assert CocoMultilabel(images, file).classes[0] == "Hündchen"


def test_ids_of_annotations_may_repeat_as_in_merged_files(root: Path, tmp_path: Path) -> None:
    whole = CocoMultilabel.from_root(root, "val2017")

    def repeat(content: Any) -> None:
        for entry in content["annotations"]:
            entry["id"] = 1

    data = CocoMultilabel(*broken(root, tmp_path, repeat))
    assert torch.equal(data.labels, whole.labels)
    for index in range(len(data)):
        np.testing.assert_array_equal(data.masks(index), whole.masks(index))


FULL = {"size": [48, 48], "counts": [0, 48 * 48]}


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, 9, 9]], "a polygon must list x and y of at least 3 corners"),
        ([[0, 0, 9, 9, 9, 0, 1]], "x and y"),
        ([[], [0, 0]], "x and y"),
        ([0, 0, 9, 9, 9], "x and y"),
        ([[0, 0, 9, 9, 9, 0], None], "x and y"),
        ([[0, 0, 9, 9, 9, None]], "has the coordinate None"),
        ([[0, 0, 9, 9, 9, "a"]], "has the coordinate 'a'"),
        ([[0, 0, 9, 9, 9, True]], "has the coordinate True"),
        ([[0, 0, 9, 9, 9, float("nan")]], "leaves the image of 48 x 48 pixels by far"),
        ([[0, 0, 9, 9, 9, float("-inf")]], "by far"),
        ([[0, 0, 9, 9, 9, 10**400]], "by far"),
        ([[0, 0, 9, 9, 9, -97]], "by far"),
        # pycocotools would take more than 4 GB for it.
        ([[-90, 0, 190, 0] * 100_000], "its outline is 56000000 pixels long"),
        ([[-90, 0, 190, 0] * 5_000] * 4, "its outline is 11200000 pixels long"),
        ("abc", "must have size and counts"),
        ({"counts": "0"}, "must have size and counts"),
        (FULL | {"size": [48, 47]}, r"its size is \[48, 47\], where the image has \[48, 48\]"),
        (FULL | {"size": None}, "its size is None"),
        (FULL | {"size": 48}, "its size is 48"),
        (FULL | {"counts": [0, 48 * 48 + 1]}, "its runs cover 2305 pixels, .* 2304"),
        (FULL | {"counts": []}, "its runs cover 0 pixels"),
        (FULL | {"counts": [-1, 48 * 48 + 1]}, "no run lengths"),
        (FULL | {"counts": [0, 2304.5]}, "no run lengths"),
        (FULL | {"counts": [False, 2304]}, "no run lengths"),
        (FULL | {"counts": [2**32 + 48 * 48]}, "no run lengths"),
        (FULL | {"counts": None}, "no run lengths"),
        (FULL | {"counts": "garbage"}, "."),
        (FULL | {"counts": "\0"}, "no run lengths"),
        (FULL | {"counts": "0P"}, "no run lengths"),
        (FULL | {"counts": "o" * 10_000 + "0"}, "no run lengths"),
    ],
)
def test_broken_segmentations_are_named(
    segmentation: Any, message: str, root: Path, tmp_path: Path
) -> None:
    data = CocoMultilabel(*broken(root, tmp_path, annotation(segmentation=segmentation)))
    where = rf"instances.json: annotation \d+ of image {data.ids[0]} has a broken segmentation: "
    with (
        watched(2 << 30),
        pytest.raises(ValueError, match=f"{where}.*{message}.*; correct it, or take"),
    ):
        data.masks(0)
    assert data[0][1].any()


def test_boxes_without_masks_label_but_do_not_mask(root: Path, tmp_path: Path) -> None:
    def strip(content: Any) -> None:
        for entry in content["annotations"]:
            entry["segmentation"] = []

    data = CocoMultilabel(*broken(root, tmp_path, strip))
    assert data[0][1].any()
    with pytest.raises(ValueError, match=r"annotation \d+ of image \d+ has no segmentation, only"):
        data.masks(0)


def test_a_box_stands_for_a_mask_beside_masks(root: Path, tmp_path: Path) -> None:
    changes = {"segmentation": [], "bbox": [4, 5.0, 10, 20]}
    data = CocoMultilabel(*broken(root, tmp_path, annotation(**changes)))
    content = json.loads(data.file.read_text())
    first = content["annotations"][0]
    mask = data.masks(0, [data._column[first["category_id"]]])[0]
    assert mask[5:25, 4:14].all()
    others = [a for a in content["annotations"][1:] if a["image_id"] == first["image_id"]]
    if first["category_id"] not in [a["category_id"] for a in others]:
        assert mask.sum() == 200
    for box in (None, [1, 2, 3], [1, 2, 3, "a"], [0, 0, float("nan"), 1], [0, 0, 10**400, 1]):
        data = CocoMultilabel(*broken(root, tmp_path, annotation(segmentation=[], bbox=box)))
        with pytest.raises(ValueError, match="has no segmentation, and no box"):
            data.masks(0)


def whole_as_floats(content: Any) -> None:
    for entry in content["images"]:
        entry.update(width=float(entry["width"]), height=float(entry["height"]))


def ids_as_text(content: Any) -> None:
    for entry in content["annotations"]:
        entry.update(image_id=str(entry["image_id"]), category_id=str(entry["category_id"]))


def no_ids(content: Any) -> None:
    for entry in content["annotations"]:
        del entry["id"]


def flat_polygons(content: Any) -> None:
    for entry in content["annotations"]:
        entry["segmentation"] = entry["segmentation"][0]


def lines_beside(content: Any) -> None:
    for entry in content["annotations"]:
        entry["segmentation"] += [[1, 1, 40, 40], [3, 3], []]


def with_folder(content: Any) -> None:
    for entry in content["images"]:
        entry["file_name"] = f"val2017/{entry['file_name']}"


def from_windows(content: Any) -> None:
    for entry in content["images"]:
        entry["file_name"] = f"val2017\\{entry['file_name']}"


def addresses(content: Any) -> None:
    for entry in content["images"]:
        entry["coco_url"] = f"http://images.cocodataset.org/val2017/{entry.pop('file_name')}"


@pytest.mark.parametrize(
    "habit",
    [
        whole_as_floats,
        ids_as_text,
        no_ids,
        flat_polygons,
        lines_beside,
        with_folder,
        from_windows,
        addresses,
    ],
)
def test_habits_of_labelling_tools_change_nothing(habit: Any, root: Path, tmp_path: Path) -> None:
    expected = CocoMultilabel.from_root(root, "val2017")
    data = CocoMultilabel(*broken(root, tmp_path, habit))
    assert data.files == expected.files
    assert torch.equal(data.labels, expected.labels)
    for index in range(len(expected)):
        assert torch.equal(data[index][0], expected[index][0])
        np.testing.assert_array_equal(data.masks(index), expected.masks(index))


def test_run_lengths_may_be_floats(root: Path, tmp_path: Path) -> None:
    code = {"size": [48, 48], "counts": [480.0, 96.0, 1728.0]}
    data = CocoMultilabel(*broken(root, tmp_path, annotation(segmentation=code)))
    assert data.masks(0).any(axis=0)[:, 10:12].all()


def test_an_image_without_annotations_is_negative(root: Path, tmp_path: Path) -> None:
    files = broken(root, tmp_path, lambda c: c.update(annotations=[]))
    data = CocoMultilabel(*files)
    assert len(data) == 6
    assert not data[0][1].any()
    assert not data.masks(0).any()
    empty = CocoMultilabel(*files, keep_empty=False)
    assert (len(empty), empty.labels.shape) == (0, (0, len(CLASSES)))


def test_sizes_may_be_left_out(root: Path, tmp_path: Path) -> None:
    whole = CocoMultilabel.from_root(root, "val2017")
    data = CocoMultilabel(*broken(root, tmp_path, lambda c: c["images"][0].pop("width")))
    np.testing.assert_array_equal(data.masks(0), whole.masks(0))


@few
@given(st.data())
def test_compressed_runs_are_those_of_pycocotools(data: st.DataObject) -> None:
    mask = data.draw(masks(*data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))))
    assert listed(compressed(mask)) == run_lengths(mask)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3000, 2500)])
def test_compressed_runs_of_large_and_small_masks(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    one = np.zeros(size, dtype=bool)
    one[size[0] // 2, size[1] // 2] = True
    halves = np.arange(size[0])[:, None] + np.zeros(size) < size[0] / 2
    for mask in (np.zeros(size, bool), np.ones(size, bool), one, halves, rng.random(size) < 1e-4):
        assert listed(compressed(mask)) == run_lengths(mask)


@few
@given(st.text() | st.text(st.characters(min_codepoint=48, max_codepoint=111)))
@example("0" * 10)
def test_any_text_is_runs_or_none(text: str) -> None:
    runs = listed(text)
    assert runs is None or all(type(run) is int for run in runs)


def test_the_dataset_travels_small(root: Path, tmp_path: Path) -> None:
    def inflate(content: Any) -> None:
        for entry in content["annotations"]:
            entry["note"] = "x" * 100_000

    data = CocoMultilabel(*broken(root, tmp_path, inflate))
    packed = pickle.dumps(data)
    assert len(packed) < 10_000
    again = pickle.loads(packed)
    assert torch.equal(again[1][0], data[1][0])
    assert torch.equal(again[1][1], data[1][1])
    np.testing.assert_array_equal(again.masks(1), data.masks(1))
    assert again.masks(1).any()


class Masks(torch.utils.data.Dataset[Any]):
    """Asks for masks in a worker."""

    def __init__(self, data: CocoMultilabel) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return *self.data[index], self.data.input_masks(index)


@pytest.mark.slow
def test_spawned_workers_read_pictures_and_masks(root: Path) -> None:
    data = CocoMultilabel.from_root(root, "val2017", Preprocess(32))
    workers = multiprocessing.get_context("spawn")
    loader = DataLoader(Masks(data), 3, num_workers=1, multiprocessing_context=workers)
    for batch, (images, labels, where) in enumerate(loader):
        for row in range(3):
            expected = Masks(data)[3 * batch + row]
            assert torch.equal(images[row], expected[0])
            assert torch.equal(labels[row], expected[1])
            assert torch.equal(where[row], expected[2])
    assert batch == 1


@pytest.mark.usefixtures("unchecked")
def test_a_wrong_on_error_is_named(root: Path) -> None:
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        CocoMultilabel.from_root(root, on_error="ignore")
