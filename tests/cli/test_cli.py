import json
import os
import re
import sys
from dataclasses import asdict
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
import torchvision
from PIL import Image
from torch import Tensor

from lightning_aop import GradCAM
from lightning_aop.cli.main import main
from lightning_aop.cli.options import photos_first
from lightning_aop.cli.output import figure_of, write_figure
from lightning_aop.cli.photos import Recipe
from lightning_aop.coco import MultilabelClassifier
from lightning_aop.data.images import Preprocess
from lightning_aop.metrics import auc, deletion_curve
from lightning_aop.scores import sigmoid


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "cat photo.jpg"
    Image.fromarray(skimage.data.chelsea()).save(path)
    return path


def explain(*arguments: Any) -> int:
    return main(["explain", *(str(a) for a in arguments), "--model=squeezenet1_1"])


def test_photos_become_one_picture(
    weights: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out.png"
    arguments = ["--weights", weights, "--method=fast_sigcam", "--size=96", "-o", out]
    assert explain(photo, photo, "--target-class", "tabby", "7", *arguments) == 0
    with Image.open(out) as picture:
        assert picture.size[0] > 400
        assert np.asarray(picture).std() > 10
    printed = capsys.readouterr()
    assert printed.out.count("cat photo.jpg: tabby 0.") == 2
    assert printed.out.count("cat photo.jpg: cock 0.") == 2
    assert "overall" in printed.out
    assert "model evaluations" in printed.err


@pytest.mark.parametrize("method", ["gradcam", "wgradcam", "gradcam++"])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_methods_and_fits(
    method: str, fit: str, weights: Path, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    options = ["--method", method, "--fit", fit, "--size=64", "-o", out]
    assert explain(photo, "--weights", weights, *options) == 0
    assert out.exists()


def test_a_bad_photo_is_named_and_the_others_are_explained(
    weights: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photo.read_bytes()[:300])
    out = tmp_path / "out.png"
    options = ["--weights", weights, "--method=gradcam", "--size=64", "-o", out]
    assert explain(tmp_path / "none.jpg", broken, photo, *options) == 1
    errors = capsys.readouterr().err
    assert "none.jpg: the file is missing" in errors
    assert "broken.jpg: it can't be read" in errors
    assert out.exists()


def test_a_scan_of_12_bits_is_explained_with_its_range(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.dot(skimage.data.chelsea(), [0.3, 0.6, 0.1])
    out, drawn = tmp_path / "out.png", []
    options = ["--weights", weights, "--method=gradcam", "--size=64", "-o", out]
    Image.fromarray((values * 16).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "flat.png")
    assert explain(tmp_path / "deep.png", *options) == 1
    assert "--range 0 4095" in capsys.readouterr().err
    for name, more in (("deep", ["--range", "0", "4080"]), ("flat", [])):
        assert explain(tmp_path / f"{name}.png", *options, *more) == 0
        drawn.append(np.asarray(Image.open(out), dtype=float))
    assert abs(drawn[0] - drawn[1]).mean() < 1


def test_weights_of_another_number_of_classes(photo: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.pth"
    model = torchvision.models.squeezenet1_1(weights=None, num_classes=3)
    torch.save({"state_dict": model.state_dict()}, path)
    out = tmp_path / "out.png"
    options = ["--weights", path, "--method=gradcam", "--size=64", "-o", out]
    assert explain(photo, "--target-class=class 2", *options) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-class=1000"], r"the model has classes 0\.\.999"),
        (["--target-class=-1"], r"the model has classes 0\.\.999"),
        (["--target-class=terrier"], r"could be .*; give the index"),
        (["--target-class=²"], "no class of the model has this name"),
        (["--device=meta"], "--device meta is not available on this machine"),
        (["--target-class=zzz"], "no class of the model has this name"),
        (["--target-class=tabbi"], "has this name; did you mean .*tabby"),
        (["--method=gradcan"], "--method gradcan: .*did you mean gradcam"),
        (["--size=16"], "--size 16: too small"),
        (["--weights=nowhere.pth"], "nowhere.pth: no such file"),
        (["--weights=."], r"weights \.: it is a folder; name the file in it"),
        (
            ["--model=alexnet"],
            r"are no weights of alexnet.*they fit squeezenet1_1: name .* \(--model; of fit",
        ),
        (["--model=resnet999"], "is no classifier of torchvision"),
        (["--model=squezenet1_1"], "torchvision.*did you mean squeezenet1_1 or"),
        (["--classes=none.txt"], "classes none.txt: no such file"),
        (["--range", "5", "4"], "--range 5 4: must be two numbers, the lower first"),
        (["--mean", "1", "2"], r"--mean 1.0 2.0: must be one number or three"),
        (["--target-class=n00000000"], "no class of the model has this name"),
        (
            ["--device=cuda:77"],
            r"--device cuda:77 is not available on this machine \(.*: use --device cpu",
        ),
    ],
)
def test_what_a_user_can_mend_is_said(
    arguments: list[str],
    message: str,
    weights: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = [str(photo), "--model=squeezenet1_1", f"--weights={weights}"]
    assert main(["explain", *common, f"-o={tmp_path / 'x.png'}", *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_weights_of_a_training_that_diverged_are_told_as_such(
    photo: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(weights, weights_only=True)
    torch.save(
        {name: tensor * float("nan") for name, tensor in state.items()}, tmp_path / "nan.pth"
    )
    common = [str(photo), "--model=squeezenet1_1", f"--weights={tmp_path / 'nan.pth'}"]
    for method in ("gradcam", "igos"):
        out = f"-o={tmp_path / 'x.png'}"
        assert main(["explain", *common, f"--method={method}", "--size=64", out]) == 1
        assert "check the model's weights for NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "start"),
    [
        ("pdf", b"%PDF"),
        ("jpg", b"\xff\xd8"),
        ("png", b"\x89PNG"),
        ("webp", b"RIFF"),
        ("svg", b"<?xml"),
    ],
)
def test_the_suffix_decides_the_format(
    suffix: str, start: bytes, weights: Path, photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"out.{suffix}"
    assert explain(photo, f"--weights={weights}", "--method=gradcam", "--size=64", "-o", out) == 0
    assert out.read_bytes().startswith(start)


def test_a_size_that_a_vision_transformer_refuses_is_said(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torchvision.models.vit_b_32(num_classes=2).state_dict(), tmp_path / "vit.pth")
    words = [
        "--model=vit_b_32",
        f"--weights={tmp_path / 'vit.pth'}",
        "--method=gradient",
        "--size=96",
    ]
    assert main(["explain", str(photo), *words, f"-o={tmp_path / 'x.png'}"]) == 1
    errors = capsys.readouterr().err
    assert re.search(r"--size 96: too small or otherwise unfit .*Expected 224 but got 96", errors)


def test_a_reader_that_has_gone_costs_no_picture(
    weights: Path,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        words = ["--weights", weights, "--method=gradcam", "--size=96", "-o", tmp_path / "x.png"]
        assert explain(photo, *words) == 1
        monkeypatch.undo()
    assert (tmp_path / "x.png").exists()
    assert "Error" not in capfd.readouterr().err


@pytest.mark.parametrize("words", ["explain", "cross-deletion --target-class 1 2"])
def test_a_photo_is_never_overwritten(
    words: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *more = words.split()
    before = photo.read_bytes()
    there = tmp_path / "link.png"
    there.symlink_to(photo)
    for given in (photo, photo.parent):
        assert main([command, str(given), "--model=resnet18", *more, f"-o={there}"]) == 1
        assert "is one of the photos, and would be overwritten" in capsys.readouterr().err
    assert photo.read_bytes() == before


def test_where_nothing_can_be_written_is_refused_before_the_work(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for out, message in {
        tmp_path: "is a folder; name a file in it",
        tmp_path / "out.tiff3": r"must end in .png, .jpg, .jpeg, .webp, .pdf or .svg",
        tmp_path / "file" / "out.png": "its folder can't be made",
    }.items():
        assert explain(photo, "--weights=none.pth", "-o", out) == 1  # which is not looked for
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_an_output_that_only_seems_writable_is_refused_before_the_work(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(photo, "--weights=none.pth", "-o", "/proc/x.png") == 1
    assert "nothing can be written there; name another file" in capsys.readouterr().err
    assert explain(photo, "--weights=none.pth", "-o", tmp_path / "x.png") == 1
    assert not list(tmp_path.iterdir())


def test_a_photo_behind_the_classes_is_no_class(
    weights: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--weights={weights}", "--method=gradcam", "--size=64", "-o", tmp_path / "out.png"]
    assert explain(*words, "--json", "--target-class", "tabby", "7", photo) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["class"], second["class"]) == ("tabby", "cock")
    assert first["photo"] == str(photo)
    assert first["overall_auc"] == pytest.approx(first["insertion_auc"] - first["deletion_auc"])


def test_only_what_ends_like_an_image_comes_first() -> None:
    words = [
        "--target-class",
        "281",
        "tiger cat",
        "a.JPG",
        "-o",
        "out.png",
        "--methods",
        "cam",
        "b.png",
    ]
    first = ["a.JPG", "b.png"]
    assert photos_first(words) == first + [word for word in words if word not in first]
    assert photos_first(["a.jpg", "--target-class=5"]) == ["a.jpg", "--target-class=5"]


def values_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def common(weights: Path, tmp_path: Path) -> list[Any]:
    return [f"--weights={weights}", "--method=gradcam", "--size=64", "-o", tmp_path / "out.png"]


def test_the_text_of_an_svg_is_text(weights: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.svg"
    assert explain(photo, *common(weights, tmp_path), "--target-class=281", "-o", out) == 0
    assert re.search(r"<text[^>]*>tabby 0\.\d\d", out.read_text())
    assert re.search(r"<text[^>]*>saliency<", out.read_text())


@pytest.mark.parametrize("command", ["explain", "cross-deletion"])
def test_dollars_in_names_begin_no_formula(
    command: str, weights: Path, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("\n".join(f"$class_{k}_$" for k in range(1000)))
    words = [*common(weights, tmp_path), "--classes", tmp_path / "names.txt", "-o"]
    words += [tmp_path / "out.svg", "--target-class", "7", "8", "--model=squeezenet1_1"]
    assert main([command, str(photo), *map(str, words)]) == 0
    drawn = (tmp_path / "out.svg").read_text()
    assert all(re.search(rf"<text[^>]*>\$class_{k}_\$ 0", drawn) for k in (7, 8))
    figure = figure_of(torch.rand(1, 3, 8, 8), torch.rand(1, 8, 8), ["a"], "$x_$")
    write_figure(figure, tmp_path / "title.svg")


def test_a_figure_names_the_maps_that_show_nothing(tmp_path: Path) -> None:
    maps = torch.rand(3, 8, 8)
    maps[1], maps[2, 0, 0] = 0, torch.nan
    write_figure(figure_of(torch.rand(3, 3, 8, 8), maps, list("abc"), "t"), tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    assert [text.count(f">{name}<") for name in ("blank map", "NaN map", "saliency")] == [1, 1, 1]


def test_folders_patterns_and_stdin_are_photos(
    weights: Path,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.JPG", "a.jpg"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "notes.txt").write_text("no photo")
    words = ["--json", *common(weights, tmp_path)]
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(photo.read_bytes())))
    assert explain(folder, f"{tmp_path}/*/a.j*g", "-", *words) == 0
    found = values_of(capsys)
    names = [str(folder / "a.jpg"), str(folder / "b.JPG"), str(folder / "a.jpg"), "-"]
    assert [value["photo"] for value in found] == names
    assert len({value["score"] for value in found}) == 1
    assert explain(tmp_path / "*.none", *words) == 1
    assert "no file has such a name" in capsys.readouterr().err
    (tmp_path / "bare").mkdir()
    assert explain(tmp_path / "bare", *words) == 1
    assert "the folder holds no images" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="names there are always Unicode")
@pytest.mark.parametrize("command", ["explain", "compare", "sanity-check", "cross-deletion"])
def test_a_name_that_is_no_utf8_costs_no_work(
    command: str, weights: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    name = os.path.join(os.fsencode(tmp_path / "photos"), b"caf\xe9.jpg")
    Path(os.fsdecode(name)).write_bytes(photo.read_bytes())
    words = [command, tmp_path / "photos", "--model=squeezenet1_1", f"--weights={weights}"]
    words += ["--size=64", "--methods" if command == "compare" else "--method", "gradcam"]
    words += {"sanity-check": ["--layers=classifier.1"]}.get(command, ["--target-class", "7", "8"])
    out = tmp_path / ("out.png" if command in ("explain", "cross-deletion") else "out")
    printed = BytesIO()
    monkeypatch.setattr("sys.stdout", TextIOWrapper(printed, encoding="utf-8", errors="strict"))
    assert main([str(word) for word in (*words, "-o", out)]) == 0
    sys.stdout.flush()
    assert b"wrote " in printed.getvalue()
    shown = printed.getvalue() if out.is_file() else (out / "results.csv").read_bytes()
    assert rb"caf\udce9.jpg" in shown


def test_of_a_long_strip_the_middle_is_read_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).integers(0, 255, (5, 60_000, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "strip.png")
    largest, resize = 0, torch.nn.functional.interpolate

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal largest
        found: torch.Tensor = resize(*arguments, **options)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr("torchvision.transforms.v2.functional._geometry.interpolate", watched)
    recipe = Recipe(torch.nn.Identity(), 64, 72, (0.0,) * 3, (1.0,) * 3, ["a"], "softmax")
    image = recipe.read(tmp_path / "strip.png", "crop")
    assert 0 < largest < 3 * 72 * 72 * 10
    middle = Image.fromarray(values[:, 29_980:30_020])
    resized = torchvision.transforms.v2.functional.resize(middle, [72])
    cropped = torchvision.transforms.v2.functional.center_crop(resized, [64])
    wanted = torch.from_numpy(np.array(cropped)).permute(2, 0, 1)[None].float() / 255
    torch.testing.assert_close(image, wanted, atol=2 / 255, rtol=0)


def test_missing_photos_are_said_before_the_network_is_made(
    photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(photo.with_name("cat foto.jpg"), "--weights=none.pth") == 1
    assert "the file is missing; did you mean cat photo.jpg?" in capsys.readouterr().err


def test_a_mean_in_bytes_is_recognised(
    weights: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [photo, "--json", *common(weights, tmp_path)]
    assert explain(*words) == 0
    in_bytes = ["--mean", 123.675, 116.28, 103.53, "--std", 58.395, 57.12, 57.375]
    assert explain(*words, *in_bytes) == 0
    assert explain(*words, "--mean", 0.5, "--std", 0.5) == 0
    ours, same, other = (value["score"] for value in values_of(capsys))
    assert same == pytest.approx(ours, rel=1e-4)
    assert other != pytest.approx(ours, rel=1e-2)


def test_classes_have_the_names_of_a_file_and_wnids(
    weights: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"thing {i}" for i in range(1000)))
    words = [photo, "--json", *common(weights, tmp_path), "--classes", names]
    assert explain(*words, "--target-class", "thing 7", "n02123045") == 0
    found = [(value["class"], value["class_index"]) for value in values_of(capsys)]
    assert found == [("thing 7", 7), ("thing 281", 281)]
    names.write_text("cat\ndog")
    assert explain(*words) == 1
    assert "holds 2 names, where squeezenet1_1 has 1000 classes" in capsys.readouterr().err


@pytest.fixture
def trained(photo: Path, tmp_path: Path) -> tuple[MultilabelClassifier, Path]:
    """Return a classifier of two classes, and a checkpoint of it as `fit` writes it."""
    torch.manual_seed(0)
    ours = MultilabelClassifier("squeezenet1_1", None, num_classes=2).eval()
    ours.classes = ["ape", "bee"]
    checkpoint: dict[str, Any] = {"state_dict": ours.state_dict()}
    ours.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    return ours, tmp_path / "last.ckpt"


def squashed(photo: Path) -> Tensor:
    """Return the photo as `--size=64 --fit=squash` without a normalisation reads it."""
    with Image.open(photo) as opened:
        image = torchvision.transforms.v2.functional.resize(opened, [64, 64])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def test_a_trained_multilabel_classifier_is_explained_with_its_sigmoid(
    trained: tuple[MultilabelClassifier, Path],
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, checkpoint = trained
    plain = ["--mean", 0, "--std", 1, "--fit=squash", "--target-class", "ape", "bee"]
    words = [photo, "--json", *common(checkpoint, tmp_path), *plain]
    assert explain(*words) == 0
    printed = capsys.readouterr()
    assert "scores are sigmoid, each class on its own, since the model is multilabel" in printed.err
    found = [json.loads(line) for line in printed.out.splitlines()]
    batch = squashed(photo)
    with torch.no_grad():
        wanted = ours(batch).sigmoid()[0].tolist()
    assert [value["score"] for value in found] == pytest.approx(wanted, abs=1e-3)
    maps = GradCAM().explain(ours, batch, torch.tensor([0]))
    curve = deletion_curve(ours, batch, maps, torch.tensor([0]), steps=28, score=sigmoid)
    assert found[0]["deletion_auc"] == pytest.approx(float(auc(curve)), abs=1e-3)
    assert {value["score_function"] for value in found} == {"sigmoid"}
    # Whoever wants the other says so.
    assert explain(*words, "--score=softmax") == 0
    assert sum(value["score"] for value in values_of(capsys)) == pytest.approx(1)


def test_a_trained_classifier_is_given_photos_as_in_its_training(
    trained: tuple[MultilabelClassifier, Path],
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, checkpoint = trained
    made = asdict(Preprocess(64, "squash", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    torch.save(torch.load(checkpoint) | {"preprocess": made}, checkpoint)
    words = [photo, "--json", "--model=squeezenet1_1", "--weights", checkpoint, "--method=random"]
    words += ["-o", tmp_path / "out.png", "--target-class", "ape", "bee"]
    assert explain(*words) == 0
    with torch.no_grad():
        wanted = ours(squashed(photo)).sigmoid()[0].tolist()
    assert [value["score"] for value in values_of(capsys)] == pytest.approx(wanted, abs=1e-3)


def test_one_class_has_no_softmax(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = torchvision.models.squeezenet1_1(weights=None, num_classes=1)
    torch.save(network.state_dict(), tmp_path / "one.pth")
    words = [photo, "--json", *common(tmp_path / "one.pth", tmp_path)]
    assert explain(*words) == 0
    (value,) = values_of(capsys)
    assert (value["score_function"], value["score"]) == ("sigmoid", pytest.approx(0.5, abs=0.4))
    assert explain(*words, "--score=softmax") == 1
    assert "--score softmax: the model has one class" in capsys.readouterr().err


@pytest.mark.sample(2)
@pytest.mark.parametrize("command", ["compare", "sanity-check", "cross-deletion"])
def test_every_command_takes_the_score_of_the_weights(
    command: str,
    trained: tuple[MultilabelClassifier, Path],
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, checkpoint = trained
    method = ["--methods", "gradcam"] if command == "compare" else ["--method", "gradcam"]
    classes = ["ape", "bee"] if command == "cross-deletion" else ["ape"]
    out = tmp_path / ("x.svg" if command == "cross-deletion" else "x")
    words = [command, photo, "--model=squeezenet1_1", "--weights", checkpoint, *method, "-o", out]
    words += ["--size=64", "--fit=squash", "--mean", 0, "--std", 1, "--target-class", *classes]
    assert main([str(word) for word in words]) == 0
    batch = squashed(photo)
    with torch.no_grad():
        score = float(ours(batch).sigmoid()[0, 0])
    if command == "cross-deletion":
        maps = GradCAM().explain(ours, batch, torch.tensor([0]))
        curve = deletion_curve(ours, batch, maps, torch.tensor([0]), steps=112, score=sigmoid)
        printed = capsys.readouterr().out
        assert f"ape {score:.2f}, mean score over the deletion {float(curve.mean()):.3f}" in printed
        assert ">sigmoid score<" in out.read_text()
    else:
        assert f"ape {score:.2f}" in (out / "results.csv").read_text()


def test_the_bar_does_not_end_full_after_a_failure(
    weights: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(tmp_path / "none.jpg", photo, *common(weights, tmp_path)) == 1
    errors = capsys.readouterr().err
    assert errors.rstrip().splitlines()[-1].count("1 map left")
    assert "0 maps left" not in errors


def test_classifiers_of_hugging_face_and_timm_come_from_folders(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers, timm = pytest.importorskip("transformers"), pytest.importorskip("timm")
    sizes = {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 16}
    config = transformers.ResNetConfig(**sizes, layer_type="basic", id2label={0: "cat", 1: "dog"})
    ours = transformers.ResNetForImageClassification(config).eval()
    ours.save_pretrained(tmp_path / "hf")
    processor = transformers.ViTImageProcessor(
        size={"height": 48, "width": 48}, image_mean=[0.5] * 3
    )
    processor.save_pretrained(tmp_path / "hf")
    words = ["--method=gradcam", "--json", "--target-class", "dog", "-o", tmp_path / "x.png"]
    squash = ["--fit", "squash"]
    assert main(["explain", *map(str, [photo, "--model", tmp_path / "hf", *words, *squash])]) == 0
    (value,) = values_of(capsys)
    with Image.open(photo) as opened:
        image = torchvision.transforms.v2.functional.resize(opened, [48, 48])
        std = processor.image_std
        pixels = (np.asarray(image) / 255 - 0.5) / std
    batch = torch.tensor(pixels).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        expected = float(ours(batch).logits.softmax(1)[0, 1])
    assert value["score"] == pytest.approx(expected, abs=1e-3)
    assert (value["class"], value["class_index"]) == ("dog", 1)

    network = timm.create_model("resnet10t", num_classes=2)
    timm.models.save_for_hf(
        network, tmp_path / "timm", model_config={"label_names": ["cat", "dog"]}
    )
    words = ["--model", tmp_path / "timm", "--size=64", *words]
    assert main(["explain", *map(str, [photo, *words])]) == 0
    assert values_of(capsys)[0]["class"] == "dog"
    assert main(["explain", str(photo), "--model", str(photo.parent)]) == 1
    assert "has no config.json" in capsys.readouterr().err


def test_an_address_and_a_link_to_nothing_are_no_photos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "https://example.org/cat.jpg"]) == 1
    assert "it is an address, and nothing is downloaded" in capsys.readouterr().err
    link = tmp_path / "cat.jpg"
    link.symlink_to(tmp_path / "gone.jpg")
    assert main(["explain", str(link)]) == 1
    said = capsys.readouterr().err
    assert f"{link}: the file is missing" in said
    assert "did you mean" not in said
