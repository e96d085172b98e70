"""Networks: the shapes of the papers' nets, the forward pass against torch.nn, and descriptions."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nobackprop.core.initializers import Normal, initial_weights
from nobackprop.core.layers import Conv, Dense
from nobackprop.core.network import Network, allconv, mlp
from nobackprop.mistakes import Unknown
from nobackprop.rules.bp import BP


def _sequential(net: Network, w: dict[str, Tensor]) -> nn.Sequential:
    """The same net out of torch's own modules, in float64, for tanh nets of one or more layers."""
    modules: list[nn.Module] = []
    for l, layer in enumerate(net.layers, 1):
        inputs = net.shapes[l - 1]
        if isinstance(layer, Dense):
            module = nn.Linear(w[f"W{l}"].shape[1], layer.units, bias=net.bias)
            modules.append(nn.Flatten())
        else:
            assert isinstance(layer, Conv)
            module = nn.Conv2d(inputs[0], layer.channels, layer.kernel, layer.stride, layer.padding, bias=net.bias)
        module.load_state_dict({"weight": w[f"W{l}"]} | ({"bias": w[f"b{l}"]} if net.bias else {}))
        modules += [module, nn.Tanh()]
    return nn.Sequential(*modules[:-1]).double()


def _weights(net: Network) -> dict[str, Tensor]:
    w = initial_weights(net, BP(), Normal(0.4), Normal(0.4), seed=0)
    generator = torch.Generator().manual_seed(1)
    return {k: t + torch.randn(t.shape, generator=generator) for k, t in w.items()}


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(mlp((1, 4, 4), 3, hidden=[8, 5], activation="tanh"), id="mlp"),
        pytest.param(mlp((1, 4, 4), 3, hidden=[8, 5], activation="tanh", bias=False), id="mlp_without_biases"),
        pytest.param(mlp((1, 4, 4), 3, hidden=[], activation="tanh"), id="linear"),
        pytest.param(allconv((2, 9, 8), 3, filters=[[4, 3, 2], [5, 2, 1]], activation="tanh"), id="conv"),
        pytest.param(
            allconv((2, 6, 7), 3, filters=[[4, 3, 1, 1], [5, 3, 2, 1]], activation="tanh", bias=False),
            id="padded_conv_without_biases",
        ),
    ],
)
def test_logits_equal_those_of_torchs_modules(net: Network) -> None:
    w = {k: t.double() for k, t in _weights(net).items()}
    x = torch.randn(5, *net.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(net.logits(w, x), _sequential(net, w)(x))


def test_forward_keeps_every_pre_activation_and_activation() -> None:
    net = allconv((2, 6, 6), 3, filters=[[4, 3, 2]], activation="relu")
    w = _weights(net)
    x = torch.randn(5, *net.in_shape, generator=torch.Generator().manual_seed(2))
    z, h = net.forward(w, x)
    assert [t.shape[1:] for t in z] == list(net.shapes)
    assert len(h) == net.L == 2
    assert h[0] is x
    torch.testing.assert_close(h[1], z[1].relu())
    torch.testing.assert_close(net.df(1, z[1], h[1]), (z[1] > 0).float())


def test_the_32x32_net_of_the_mdfa_paper(configured: Callable[..., Any]) -> None:
    net: Network = configured("arch", "allconv", (3, 32, 32), 10)
    # (32 - 5) // 2 + 1 = 14, (14 - 3) // 2 + 1 = 6, (6 - 3) // 1 + 1 = 4
    assert net.shapes == ((3, 32, 32), (96, 14, 14), (96, 6, 6), (96, 4, 4), (10,))
    assert [net.weight_shape(l) for l in range(1, 5)] == [(96, 3, 5, 5), (96, 96, 3, 3), (96, 96, 3, 3), (10, 1536)]
    assert [net.units(l) for l in range(5)] == [3072, 18816, 3456, 1536, 10]
    assert (net.activation.name, net.bias) == ("tanh", True)


def test_the_224x224_net_of_the_mdfa_paper(configured: Callable[..., Any]) -> None:
    net: Network = configured("arch", "allconv_224", (3, 224, 224), 100)
    assert net.layers == (
        Conv(96, 9, 4),
        Conv(96, 3, 2),
        Conv(128, 5, 1),
        Conv(128, 3, 2),
        Conv(192, 3, 1),
        Conv(192, 3, 2),
        Conv(384, 3, 1),
        Dense(100),
    )
    assert [shape[-1] for shape in net.shapes] == [224, 54, 26, 22, 10, 8, 3, 1, 100]
    assert net.weight_shape(8) == (100, 384)
    assert (net.activation.name, net.bias) == ("tanh", True)


def test_the_mlp_of_the_configs(configured: Callable[..., Any]) -> None:
    net: Network = configured("arch", "mlp", (1, 28, 28), 10)
    assert net.layers == (*[Dense(256)] * 4, Dense(10))
    assert net.shapes == ((1, 28, 28), (256,), (256,), (256,), (256,), (10,))
    assert net.weight_shape(1) == (256, 784)


def test_no_hidden_layer_is_a_linear_classifier() -> None:
    net = mlp((1, 2, 3), 4, hidden=[], activation="tanh")
    assert net.L == 1
    assert net.weight_shape(1) == (4, 6)


def test_without_biases_there_are_no_names_for_them() -> None:
    net = mlp((4,), 3, hidden=[5], activation="tanh", bias=False)
    h, d = torch.ones(2, 4), torch.ones(2, 5)
    assert net.hebbian(1, h, d).keys() == {"W1"}
    assert initial_weights(net, BP(), Normal(), Normal(), seed=0).keys() == {"W1", "W2"}


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(mlp((1, 4, 4), 3, hidden=[8, 5], activation="pl", bias=False), id="mlp"),
        pytest.param(allconv((2, 9, 9), 3, filters=[[4, 3, 2], [5, 3, 1, 1]], activation="relu"), id="conv"),
    ],
)
def test_a_description_is_plain_data_and_gives_the_net_back(net: Network) -> None:
    description = net.describe()
    assert Network.from_description(description) == net
    assert all(type(v) in (list, str, bool) for v in description.values())
    assert all(type(v) in (str, int) for layer in description["layers"] for v in layer.values())


def test_a_description_says_whether_each_token_has_feedback_of_its_own() -> None:
    net = replace(mlp((4,), 3, hidden=[5], activation="tanh"), own_feedback=True)
    assert Network.from_description(net.describe()) == net


def test_a_description_with_an_unknown_layer_type_is_refused() -> None:
    description = mlp((4,), 3, hidden=[5], activation="tanh").describe()
    description["layers"][0]["type"] = "Pool"
    with pytest.raises(Unknown, match="a net with Pool, which is not in nobackprop: import it first"):
        Network.from_description(description)


@pytest.mark.parametrize("conv", [[4], [4, 3, 2, 1, 1]], ids=["too_few", "too_many"])
def test_filters_of_a_wrong_length_are_refused(conv: list[int]) -> None:
    with pytest.raises(ValueError, match=r"arch\.filters: .* is not \[channels, kernel, stride, padding\]"):
        allconv((3, 8, 8), 10, filters=[conv], activation="tanh")


def test_a_layer_that_does_not_fit_the_one_below_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit a feature map of 3x3"):
        allconv((3, 8, 8), 10, filters=[[4, 3, 2], [4, 5, 1]], activation="tanh")


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown activation"):
        mlp((4,), 3, hidden=[5], activation="swish")


def test_computed_again_activations_are_the_same_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp((5,), 2, hidden=[6] * 12, activation="tanh")
    w = initial_weights(net, BP(), Normal(0.4), Normal(0.4), seed=0)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    (z, h), calls = net.forward(w, x), []
    preactivation = Network.preactivation
    monkeypatch.setattr(Network, "preactivation", lambda *args: (calls.append(args[1]), preactivation(*args))[1])
    again = replace(net, recompute=True).forward(w, x)
    for l in range(net.L, -1, -1):
        assert torch.equal(again[0][l], z[l])
        assert l == net.L or torch.equal(again[1][l], h[l])
    assert len(calls) <= 2 * net.L  # no more than one more forward pass
    assert [torch.equal(a, b) for a, b in zip(again[1], h, strict=True)] == [True] * net.L
    assert torch.equal(torch.stack(list(again[0][2:6])), torch.stack(list(z[2:6])))
    with pytest.raises(IndexError):
        again[0][net.L + 1]
