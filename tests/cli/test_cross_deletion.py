"""Figure 1: what blurring one class away does to another's score."""

import re
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import torchvision
from PIL import Image

from lightning_aop import GradCAM
from lightning_aop.cli.main import main
from lightning_aop.metrics import deletion_curve


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "cat.png"
    Image.fromarray(skimage.data.chelsea()).resize((64, 64)).save(path)
    return path


def cross(weights: Path, photo: Path, out: Path, *arguments: str) -> int:
    common = ["--model=squeezenet1_1", f"--weights={weights}", "--size=64", "--fit=squash"]
    common += ["--mean", "0", "0", "0", "--std", "1", "1", "1"]
    return main(["cross-deletion", str(photo), *common, f"-o={out}", *arguments])


def test_both_classes_are_watched_while_the_first_is_removed(
    weights: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "figure.png"
    arguments = ["--target-class", "281", "967", "--method=gradcam", "--steps=7"]
    assert cross(weights, photo, out, *arguments) == 0
    with Image.open(out) as picture:
        assert np.asarray(picture.convert("L")).std() > 10
    model = torchvision.models.squeezenet1_1(weights=None).eval()
    model.load_state_dict(torch.load(weights))
    with Image.open(photo) as opened:
        image = torch.from_numpy(np.array(opened)).permute(2, 0, 1)[None].float() / 255
    maps = GradCAM().explain(model, image, torch.tensor([281]))
    found = re.findall(
        r"(\w+) 0\.\d+, mean score over the deletion (\d\.\d+)", capsys.readouterr().out
    )
    for (name, told), (wanted, index) in zip(
        found, (("tabby", 281), ("espresso", 967)), strict=True
    ):
        curve = deletion_curve(model, image, maps, torch.tensor([index]), steps=7)
        assert name == wanted
        assert float(told) == pytest.approx(float(curve.mean()), abs=6e-4)


def test_a_damaged_photo_is_named_and_the_others_are_drawn(
    weights: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a_damaged.png").write_bytes(photo.read_bytes()[:300])
    (tmp_path / "photos" / "cat.png").write_bytes(photo.read_bytes())
    arguments = ["--target-class", "281", "967", "--method=gradcam", "--steps=7"]
    assert cross(weights, tmp_path / "photos", tmp_path / "x.png", *arguments) == 1
    printed = capsys.readouterr()
    assert "damaged.png: it can't be read" in printed.err
    assert printed.out.count("cat.png: ") == 2
    assert (tmp_path / "x.png").exists()
    (tmp_path / "photos" / "cat.png").unlink()
    assert cross(weights, tmp_path / "photos", tmp_path / "none.png", *arguments) == 1
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name two classes: --target-class REMOVED WATCHED"),
        (["--target-class", "1"], "name two classes"),
        (["--target-class", "1", "2", "--steps=0"], "--steps 0: must be 1 or more"),
        (["--target-class", "1", "2", "-o=x.txt"], "must end in .png, .pdf or .svg"),
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
    assert cross(weights, photo, tmp_path / "x.png", *arguments) == 1
    assert message in capsys.readouterr().err
