"""From bytes to inputs."""

import torch

from nobackprop.data.pixels import Pixels


def test_pixels_are_zero_to_one() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    assert Pixels()(pixels).flatten().tolist() == [0.0, torch.tensor(0.2).item(), 1.0]
    assert Pixels()(pixels, torch.float64).dtype == torch.float64


def test_normalized_images_have_mean_zero_and_deviation_one_per_channel() -> None:
    images = torch.randint(256, (1500, 2, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 1] //= 4
    x = Pixels.normalized(images)(images, torch.float64)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(2).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(2).double())


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    images = torch.full((2, 1, 2, 2), 7, dtype=torch.uint8)
    assert Pixels.normalized(images)(images).abs().max() < 1
