import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_aop import RandomPatchBlur
from lightning_aop.ops import Constant, GaussianBlur


def cells_of(changed: Tensor, cells: int) -> Tensor:
    """Return which cells differ from the image: all of a cell, or nothing of it."""
    height, width = changed.shape
    parts = changed.view(cells, height // cells, cells, width // cells).transpose(1, 2).flatten(2)
    assert bool((parts.all(dim=2) == parts.any(dim=2)).all())
    return parts.all(dim=2)


def test_whole_cells_are_the_blur_and_all_else_is_the_image() -> None:
    images, blur = torch.rand(6, 3, 32, 48), GaussianBlur()
    found = RandomPatchBlur(p=1, most=1)(images)
    hidden = (found != images).all(dim=1)
    assert torch.equal(found, torch.where(hidden[:, None], blur(images), images))
    grids = [cells_of(each, 8) for each in hidden]
    assert len({int(grid.sum()) for grid in grids}) > 3
    assert not torch.equal(grids[0], grids[1])


def test_shares_are_even_up_to_the_largest_and_some_images_stay() -> None:
    torch.manual_seed(0)
    images = torch.ones(4000, 1, 8, 8)
    found = RandomPatchBlur(p=0.7, most=0.4, cells=8, baseline=Constant(0.0))(images)
    shares = (found == 0).flatten(1).float().mean(dim=1)
    changed = shares[shares > 0]
    assert len(changed) / 4000 == pytest.approx(0.7 * (1 - 0.5 / 25.6), abs=0.03)
    assert changed.amax() <= 26 / 64
    assert float(changed.mean()) == pytest.approx(0.2, abs=0.01)
    each_cell = (found[shares > 0] == 0).float().mean(dim=0)[0]
    assert each_cell.amin() > 0.15
    assert each_cell.amax() < 0.25


def test_an_image_alone_its_dtype_and_the_random_stream() -> None:
    image = (torch.rand(3, 20, 30) * 255).byte()
    transform = RandomPatchBlur(p=1, most=1)
    torch.manual_seed(4)
    found = transform(image)
    after = torch.rand(1)
    assert found.dtype == torch.uint8
    assert found.shape == image.shape
    changed = (found != image).any(dim=0)
    assert changed.any()
    near = (found.float() - GaussianBlur()(image[None].float())[0]).abs().amax(dim=0)
    assert near[changed].amax() <= 0.5 + 1e-3
    torch.manual_seed(4)
    assert torch.equal(pickle.loads(pickle.dumps(transform))(image), found)
    # As much is drawn whether an image is changed or not.
    torch.manual_seed(4)
    same = RandomPatchBlur(p=0)(image)
    assert torch.equal(same, image)
    assert torch.equal(torch.rand(1), after)
    half = transform(torch.rand(3, 8, 8, dtype=torch.float16))
    assert half.dtype == torch.float16


def test_it_goes_among_other_transforms() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    parts = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), RandomPatchBlur(p=1, most=0.9)]
    found = v2.Compose([*parts, v2.Normalize([0.5] * 3, [0.5] * 3)])(photo)
    assert found.shape == (3, 40, 40)
    assert "most=0.9" in repr(parts[-1])


def test_labels_go_along_and_a_subclass_stays_one() -> None:
    image = tv_tensors.Image(torch.rand(3, 16, 16))
    mask = tv_tensors.Mask(torch.ones(16, 16))
    torch.manual_seed(3)
    alone = RandomPatchBlur(p=1, most=1)(image)
    torch.manual_seed(3)
    transform = v2.Compose([RandomPatchBlur(p=1, most=1), v2.Normalize([0.5] * 3, [0.5] * 3)])
    found, beside, label = transform(image, mask, 4)
    assert torch.equal(found, (alone - 0.5) / 0.5)
    assert not torch.equal(alone, image)
    assert torch.equal(beside, mask)
    assert label == 4
    for p in (0, 1):
        assert type(RandomPatchBlur(p=p, most=1)(image)) is tv_tensors.Image
        assert type(RandomPatchBlur(p=p, most=1)(torch.rand(3, 16, 16))) is Tensor

    class Named(Tensor):
        taken: str

    named = torch.rand(3, 16, 16).as_subclass(Named)
    named.taken = "at noon"
    changed = RandomPatchBlur(p=1, most=1)(named)
    assert changed.taken == "at noon"


def test_settings_out_of_range_are_refused(unchecked: None) -> None:
    with pytest.raises(TypeError, match=r"takes tensors, got Image: put it after ToTensor"):
        RandomPatchBlur()(Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 1.5"):
        RandomPatchBlur(p=1.5)
    with pytest.raises(ValueError, match="most must lie in"):
        RandomPatchBlur(most=-0.1)
    with pytest.raises(ValueError, match="cells must be above 0"):
        RandomPatchBlur(cells=0)
    with pytest.raises(ValueError, match=r"takes \[C, H, W\] or \[B, C, H, W\], got \[8, 8\]"):
        RandomPatchBlur()(torch.rand(8, 8))
