"""The metrics agree with scikit-image and refuse what they cannot compare."""

import math

import pytest
import torch

from patchkit.errors import InvalidOption
from patchkit.metrics import outside, psnr, ssim


def _pair(shape, noise, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(shape, generator=g)
    return a, (a + noise * torch.randn(shape, generator=g)).clamp(0, 1)


@pytest.mark.parametrize("shape", [(2, 3, 16, 23), (3, 3, 64, 64), (1, 3, 11, 11)])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_agrees_with_scikit_image(shape, noise):
    skimage = pytest.importorskip("skimage.metrics")
    a, b = _pair(shape, noise)
    x, y = a.double().numpy(), b.double().numpy()
    assert psnr(a, b) == pytest.approx(skimage.peak_signal_noise_ratio(x, y, data_range=1.0), abs=1e-4)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    wanted = [skimage.structural_similarity(f, g, channel_axis=0, **options) for f, g in zip(x, y, strict=True)]
    assert ssim(a, b) == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)


def test_equal_videos():
    a, _ = _pair((2, 3, 16, 16), 0.0)
    assert psnr(a, a) == math.inf
    assert ssim(a, a) == pytest.approx(1.0)


def test_more_noise_is_worse_and_order_does_not_matter():
    a, near = _pair((2, 3, 32, 32), 0.02)
    _, far = _pair((2, 3, 32, 32), 0.2)
    assert psnr(a, near) > psnr(a, far)
    assert ssim(a, near) > ssim(a, far)
    assert ssim(a, far) == pytest.approx(ssim(far, a))


def test_refuses_what_it_cannot_compare():
    a = torch.zeros(1, 3, 16, 16)
    with pytest.raises(InvalidOption, match="differ in shape"):
        psnr(a, a[..., :8])
    with pytest.raises(InvalidOption, match="window"):
        ssim(a[..., :8], a[..., :8])
    with pytest.raises(InvalidOption, match="floating"):
        ssim(a.to(torch.uint8), a.to(torch.uint8))


def test_outside_a_mask():
    """Changes inside the mask do not count; 0.1 everywhere outside is 20 dB."""
    a = torch.full((2, 3, 8, 8), 0.5)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    b = torch.where(mask.unsqueeze(1), torch.rand(2, 3, 8, 8), a)
    assert outside(a, b, mask) == {"psnr": math.inf, "mae": 0.0, "share": 0.5}
    assert outside(a, b + 0.1, mask) == pytest.approx({"psnr": 20.0, "mae": 0.1, "share": 0.5}, rel=1e-5)
    each = mask.expand(2, 8, 8).clone()
    each[1] = False
    assert outside(a, b, each)["share"] == 0.75
    assert outside(a, b, each)["psnr"] < 40
    nothing = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert outside(a, b, nothing)["psnr"] == pytest.approx(psnr(a, b))


def test_masks_that_do_not_fit():
    a = torch.zeros(2, 3, 8, 8)
    with pytest.raises(InvalidOption, match="does not fit"):
        outside(a, a, torch.zeros(3, 8, 8))
    with pytest.raises(InvalidOption, match="covers everything"):
        outside(a, a, torch.ones(1, 8, 8))
