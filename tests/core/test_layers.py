"""Each layer's three operations against autograd, in float64, and the shapes it accepts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nobackprop.core.layers import Conv, Dense, Layer, Tokens
from nobackprop.core.maps import Shape

CASES = [
    pytest.param(Dense(5), (7,), id="dense"),
    pytest.param(Dense(5), (2, 3, 4), id="dense_on_images"),
    pytest.param(Conv(4, 3), (2, 6, 5), id="conv"),
    pytest.param(Conv(4, 1), (2, 3, 3), id="conv_1x1"),
    pytest.param(Conv(4, 3, stride=2), (2, 7, 9), id="conv_stride_2_exact"),
    pytest.param(Conv(4, 3, stride=2), (2, 8, 9), id="conv_stride_2_one_row_left_over"),
    pytest.param(Conv(4, 5, stride=4), (3, 11, 12), id="conv_stride_4_rows_left_over"),
    pytest.param(Conv(4, 2, stride=3), (2, 7, 7), id="conv_stride_above_kernel"),
    pytest.param(Conv(4, 3, padding=1), (2, 5, 4), id="conv_padded"),
    pytest.param(Conv(4, 3, stride=2, padding=1), (2, 6, 5), id="conv_stride_2_padded"),
    pytest.param(Conv(4, 4, stride=3, padding=2), (1, 8, 7), id="conv_stride_3_padded"),
    pytest.param(Conv(4, 5, padding=2), (2, 3, 3), id="conv_kernel_above_image"),
    pytest.param(Conv(4, 3, padding=1, dilation=2), (2, 7, 6), id="conv_dilated"),
    pytest.param(Conv(6, 3, stride=2, groups=2), (4, 7, 6), id="conv_grouped"),
    pytest.param(Conv(4, 3, groups=4), (4, 5, 5), id="conv_depthwise"),
    pytest.param(Tokens(5), (4, 3), id="tokens"),
]


def _tensors(layer: Layer, in_shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, biases, inputs, and an error at the layer's output."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        layer.weight_shape(in_shape),
        layer.weight_shape(in_shape)[:1],
        (3, *in_shape),
        (3, *layer.out_shape(in_shape)),
    )
    W, b, h, d = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return W, b, h, d


def _torch_forward(layer: Layer, W: Tensor, b: Tensor | None, h: Tensor) -> Tensor:
    if isinstance(layer, Dense):
        return F.linear(h.flatten(1), W, b)
    if isinstance(layer, Tokens):
        return F.linear(h, W, b)
    assert isinstance(layer, Conv)
    return F.conv2d(h, W, b, layer.stride, layer.padding, layer.dilation, layer.groups)


@pytest.mark.parametrize(("layer", "in_shape"), CASES)
def test_forward(layer: Layer, in_shape: Shape) -> None:
    W, b, h, d = _tensors(layer, in_shape)
    torch.testing.assert_close(layer.forward(W, b, h), _torch_forward(layer, W, b, h))
    torch.testing.assert_close(layer.forward(W, None, h), _torch_forward(layer, W, None, h))
    assert layer.forward(W, b, h).shape == d.shape


@pytest.mark.parametrize(("layer", "in_shape"), CASES)
def test_feedback_is_the_gradient_of_the_input(layer: Layer, in_shape: Shape) -> None:
    W, b, h, d = _tensors(layer, in_shape)
    h.requires_grad_()
    (expected,) = torch.autograd.grad(_torch_forward(layer, W, b, h), h, d)
    torch.testing.assert_close(layer.feedback(W, d, like=h.detach()), expected)


@pytest.mark.parametrize(("layer", "in_shape"), CASES)
def test_hebbian_is_the_gradient_of_the_weights_averaged_over_samples(layer: Layer, in_shape: Shape) -> None:
    W, b, h, d = _tensors(layer, in_shape)
    z = _torch_forward(layer, W.requires_grad_(), b.requires_grad_(), h)
    expected = torch.autograd.grad((z * d).flatten(1).sum(1).mean(), (W, b))
    dW, db = layer.hebbian(h, d)
    torch.testing.assert_close(dW, expected[0])
    torch.testing.assert_close(db, expected[1])


@pytest.mark.parametrize(
    ("layer", "in_shape", "weight_shape", "out_shape"),
    [
        (Dense(5), (7,), (5, 7), (5,)),
        (Dense(5), (2, 3, 4), (5, 24), (5,)),
        (Conv(4, 3), (2, 6, 5), (4, 2, 3, 3), (4, 4, 3)),
        (Conv(4, 3, 2, 1), (2, 6, 5), (4, 2, 3, 3), (4, 3, 3)),
        (Conv(4, 5, 4), (3, 11, 12), (4, 3, 5, 5), (4, 2, 2)),
    ],
    ids=str,
)
def test_shapes(layer: Layer, in_shape: Shape, weight_shape: Shape, out_shape: Shape) -> None:
    assert layer.weight_shape(in_shape) == weight_shape
    assert layer.out_shape(in_shape) == out_shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Dense(0), r"Dense\(units=0\): units must be 1 or more", id="no_units"),
        pytest.param(lambda: Conv(0, 3), "channels must be 1 or more", id="no_channels"),
        pytest.param(lambda: Conv(4, 0), "kernel must be 1 or more", id="no_kernel"),
        pytest.param(lambda: Conv(4, 3, 0), "stride must be 1 or more", id="no_stride"),
        pytest.param(lambda: Conv(4, 3, 1, -1), "padding must be 0 or more", id="negative_padding"),
        pytest.param(
            lambda: Conv(4, 5).out_shape((2, 8, 4)), "does not fit a feature map of 8x4.*smaller kernel", id="too_large"
        ),
        pytest.param(
            lambda: Conv(4, 3).out_shape((12,)), r"needs images \(C, H, W\), got shape \(12,\)", id="no_image"
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
