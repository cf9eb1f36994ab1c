import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lightning_aop.ops import Constant, GaussianBlur, blend, min_max, resize, total_variation


@pytest.mark.parametrize(("kernel", "sigma"), [(51, 50.0), (31, 30.0), (11, 5.0), (3, 0.7)])
def test_blur_agrees_with_torchvision(kernel: int, sigma: float) -> None:
    images = torch.randn(2, 3, 70, 57)
    expected = v2.functional.gaussian_blur(images, [kernel, kernel], [sigma, sigma])
    torch.testing.assert_close(GaussianBlur(kernel, sigma)(images), expected, atol=1e-5, rtol=0)


def test_blur_with_zero_padding_is_a_padded_convolution() -> None:
    images = torch.randn(2, 3, 20, 15)
    offsets = torch.arange(-5, 6).double()
    line = torch.exp(-offsets.square() / 50)
    kernel = (line[:, None] * line / line.sum() ** 2).float().expand(3, 1, 11, 11)
    expected = torch.nn.functional.conv2d(images, kernel, padding=5, groups=3)
    torch.testing.assert_close(GaussianBlur(11, 5.0, "zeros")(images), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 26)])
def test_blur_reflects_again_and_again_in_images_smaller_than_the_kernel(
    size: tuple[int, int],
) -> None:
    images = torch.randn(1, 1, *size)
    padded = torch.from_numpy(__import__("numpy").pad(images[0, 0].numpy(), 25, mode="reflect"))[
        None, None
    ]
    expected = v2.functional.gaussian_blur(
        torch.nn.functional.pad(padded, (25,) * 4), [51, 51], [50.0, 50.0]
    )[..., 50 : 50 + size[0], 50 : 50 + size[1]]
    torch.testing.assert_close(GaussianBlur()(images), expected, atol=1e-5, rtol=0)


def test_blur_commutes_with_normalisation_and_ignores_autocast() -> None:
    images = torch.rand(2, 3, 60, 60)
    blur = GaussianBlur()
    torch.testing.assert_close(blur((images - 0.4) / 0.2), (blur(images) - 0.4) / 0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blur(images), GaussianBlur()(images))


def test_blur_settings_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kernel must be a positive odd number of pixels, got 50"):
        GaussianBlur(50)
    with pytest.raises(ValueError, match="sigma must be above 0 pixels, got -1"):
        GaussianBlur(51, -1)


def test_min_max_keeps_zero_and_flattens_constants() -> None:
    maps = torch.stack([torch.zeros(3, 3), torch.full((3, 3), 7.0), torch.arange(9.0).view(3, 3)])
    scaled = min_max(maps)
    assert not scaled[:2].any()
    torch.testing.assert_close(scaled[2], torch.arange(9.0).view(3, 3) / 8)


def test_total_variation_is_the_sum_over_neighbours() -> None:
    mask = torch.rand(1, 4, 5)
    rows = [float(mask[0, i + 1, j] - mask[0, i, j]) ** 2 for i in range(3) for j in range(5)]
    columns = [float(mask[0, i, j + 1] - mask[0, i, j]) ** 2 for i in range(4) for j in range(4)]
    expected = sum(rows) / len(rows) + sum(columns) / len(columns)
    torch.testing.assert_close(total_variation(mask), torch.tensor([expected]))


def test_blend_takes_each_picture_where_the_mask_says() -> None:
    x, b = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert torch.equal(blend(x, b, torch.ones(2, 4, 4)), x)
    assert torch.equal(blend(x, b, torch.zeros(2, 4, 4)), b)
    keep = torch.rand(2, 4, 4)
    torch.testing.assert_close(blend(x, b, keep), x * keep[:, None] + b * (1 - keep[:, None]))


def test_resize_enlarges_by_hand_computed_values() -> None:
    maps = torch.tensor([[[0.0, 1.0]]])
    aligned: Tensor = resize(maps, (1, 5), align_corners=True)
    torch.testing.assert_close(aligned[0, 0], torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    centred = resize(maps, (1, 4))
    torch.testing.assert_close(centred[0, 0], torch.tensor([0, 0.25, 0.75, 1]))
    assert resize(maps, (1, 2)) is maps


@pytest.mark.parametrize("size", [(7, 5), (7, 15), (17, 15), (20, 5), (7, 30), (40, 5), (40, 30)])
@pytest.mark.parametrize("turned", [False, True])
def test_resize_averages_what_it_shrinks_as_pillow_does(
    size: tuple[int, int], turned: bool
) -> None:
    maps = torch.rand(5, 20, 15)
    if turned:
        maps, size = maps.mT.contiguous(), size[::-1]
    expected = [
        np.asarray(Image.fromarray(one.numpy()).resize(size[::-1], Image.Resampling.BILINEAR))
        for one in maps
    ]
    torch.testing.assert_close(
        resize(maps, size), torch.from_numpy(np.stack(expected)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("size", [(40, 15), (20, 30), (33, 41)])
def test_resize_with_aligned_corners_is_linear_between_the_corners(size: tuple[int, int]) -> None:
    maps = torch.rand(2, 20, 15)
    rows, columns = (np.linspace(0, n - 1, m) for n, m in zip((20, 15), size, strict=True))
    for one, found in zip(maps.numpy(), resize(maps, size, True), strict=True):
        tall = np.stack([np.interp(rows, range(20), one[:, j]) for j in range(15)], axis=1)
        expected = np.stack([np.interp(columns, range(15), row) for row in tall])
        torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-5, rtol=0)


def test_min_max_stretches_any_range() -> None:
    maps = torch.rand(3, 4, 6)
    for low, span in ((3.0, 0.25), (-5.0, 2.0), (-0.5, 1.0)):
        found = min_max(low + span * maps)
        for one, before in zip(found, maps, strict=True):
            expected = (before - before.min()) / (before.max() - before.min())
            torch.testing.assert_close(one, expected, atol=1e-5, rtol=0)


def test_the_smallest_blur_changes_nothing() -> None:
    images = torch.rand(1, 3, 5, 4)
    torch.testing.assert_close(GaussianBlur(1, 0.1)(images), images)
    for kernel in (0, -1):
        with pytest.raises(ValueError, match="kernel must be a positive odd number"):
            GaussianBlur(kernel)
    with pytest.raises(ValueError, match="sigma must be above 0"):
        GaussianBlur(3, 0.0)


def test_baselines_are_values() -> None:
    assert not Constant()(torch.rand(1, 3, 2, 2)).any()
    for baseline in (Constant(), GaussianBlur()):
        assert hash(baseline) == hash(type(baseline)())


def test_constant() -> None:
    assert torch.equal(Constant(0.5)(torch.rand(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 0.5))
