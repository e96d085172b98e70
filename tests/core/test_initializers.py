"""How weights start: the strings, the distributions, and what each rule makes of them."""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from conftest import options
from torch import Tensor

from nobackprop.core.initializers import (
    GlorotNormal,
    GlorotUniform,
    HeNormal,
    HeUniform,
    Initializer,
    LecunNormal,
    NonnegativeNormal,
    NonnegativeUniform,
    Normal,
    Orthogonal,
    Uniform,
    Zeros,
    from_string,
    initial_weights,
)
from nobackprop.core.layers import Shape
from nobackprop.core.network import Network, allconv, mlp
from nobackprop.core.rule import Rule
from nobackprop.rules.bp import BP
from nobackprop.rules.dfa import DFA
from nobackprop.rules.fa import FA
from nobackprop.rules.lra_e import LRAE
from nobackprop.rules.mdfa import MDFA


@pytest.fixture(scope="module")
def wide() -> Network:
    """Large enough for the bounds of a draw to be reached to within a few percent."""
    return mlp((100,), 4, hidden=[400, 300], activation="tanh")


@pytest.fixture(scope="module")
def conv() -> Network:
    return allconv((3, 10, 10), 5, filters=[[20, 3, 1], [30, 3, 2]], activation="tanh")


def _weights(net: Network, rule: Rule, forward: str, backward: str | None = None, seed: int = 0) -> dict[str, Tensor]:
    return initial_weights(net, rule, from_string(forward), from_string(backward or forward), seed)


def _assert_uniform(tensor: Tensor, low: float, high: float) -> None:
    """The tensor lies in [low, high], comes close to both ends, and has the mean and spread of a uniform draw."""
    width = high - low
    assert low <= tensor.min() <= low + 0.02 * width
    assert high >= tensor.max() >= high - 0.02 * width
    assert tensor.mean().item() == pytest.approx((low + high) / 2, abs=0.02 * width)
    assert tensor.std().item() == pytest.approx(width / 12**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", Zeros()),
        (0, Zeros()),
        (0.0, Zeros()),
        ("U1", Uniform(1.0, -0.5)),
        ("U0.5", Uniform(0.5, -0.5)),
        ("U.5", Uniform(0.5, -0.5)),
        ("U1e-3", Uniform(0.001, -0.5)),
        ("N0.1", Normal(0.1)),
        ("N2", Normal(2.0)),
        ("P1", NonnegativeUniform(1.0, -0.5)),
        ("A0.1", NonnegativeNormal(0.1)),
        ("literal_U1", Uniform(1.0, 0.25)),
        ("literal_P1", NonnegativeUniform(1.0, 0.25)),
    ],
)
def test_strings(text: str | float, expected: Initializer) -> None:
    parsed = from_string(text)
    assert type(parsed) is type(expected)
    assert parsed == expected


@pytest.mark.parametrize(
    "text",
    ["", "U", "1", 1, 0.5, "u1", "X1", "U-1", "U1x", "xU1", "N1,5", "literal_N1", "literal_A1", "literal_0"],
)
def test_other_strings_are_refused(text: str | float) -> None:
    with pytest.raises(ValueError, match=r"unknown initializer .*: write one of 0 \(zeros\), U<v>.*literal_U<v>"):
        from_string(text)


@pytest.mark.parametrize("shape", [(300, 200), (60, 40, 3, 3)], ids=["matrix", "kernel"])
@pytest.mark.parametrize(
    ("initializer", "numerator", "fan"),
    [
        pytest.param(Zeros(), 0, "none", id="zeros"),
        pytest.param(Uniform(2.0), 2**2 / 3, "in", id="uniform"),
        pytest.param(Uniform(2.0, 0.0), 2**2 / 3, "none", id="uniform_power_0"),
        pytest.param(Normal(0.3), 0.3**2, "none", id="normal"),
        pytest.param(GlorotUniform(3.0), 3**2 * 2, "both", id="glorot_uniform"),
        pytest.param(GlorotNormal(3.0), 3**2 * 2, "both", id="glorot_normal"),
        pytest.param(HeUniform(), 2, "in", id="he_uniform"),
        pytest.param(HeNormal(), 2, "in", id="he_normal"),
        pytest.param(LecunNormal(), 1, "in", id="lecun_normal"),
    ],
)
def test_variance_is_the_numerator_over_the_fan(
    initializer: Initializer, numerator: float, fan: str, shape: Shape
) -> None:
    positions = prod(shape[2:])
    fans = {"none": 1, "in": shape[1] * positions, "both": (shape[0] + shape[1]) * positions}
    std = (numerator / fans[fan]) ** 0.5
    tensor = initializer.draw(shape, torch.Generator().manual_seed(0))
    assert tensor.shape == shape
    assert tensor.dtype == torch.float32
    assert tensor.mean().item() == pytest.approx(0, abs=0.02 * std)
    assert tensor.std().item() == pytest.approx(std, rel=0.02)
    beyond_uniform = (tensor.abs() > 1.75 * std).any()  # uniform draws end at sqrt(3) times their standard deviation
    assert beyond_uniform == ("Normal" in type(initializer).__name__)


def test_orthogonal_is_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)
    tall = Orthogonal(2.0).draw((30, 20), generator)
    torch.testing.assert_close(tall.T @ tall, 4 * torch.eye(20), atol=1e-5, rtol=0)
    kernels = Orthogonal().draw((8, 4, 3, 3), generator).flatten(1)
    torch.testing.assert_close(kernels @ kernels.T, torch.eye(8), atol=1e-5, rtol=0)


def test_u1_is_bounded_by_the_root_of_the_fan_in(wide: Network, conv: Network) -> None:
    w = _weights(wide, FA(), "U1")
    _assert_uniform(w["W1"], -(100**-0.5), 100**-0.5)
    _assert_uniform(w["W2"], -(400**-0.5), 400**-0.5)
    _assert_uniform(w["B2"], -(400**-0.5), 400**-0.5)  # FA's B stands for W
    kernel = _weights(conv, FA(), "U1")
    _assert_uniform(kernel["W2"], -(180**-0.5), 180**-0.5)  # 20 channels x 3 x 3
    _assert_uniform(kernel["B2"], -(180**-0.5), 180**-0.5)


def test_the_fan_in_of_direct_feedback_is_the_number_of_outputs(wide: Network, conv: Network) -> None:
    w = _weights(wide, DFA(), "U1")
    assert {name: w[name].shape for name in ("B1", "B2")} == {"B1": (400, 4), "B2": (300, 4)}
    _assert_uniform(w["B1"], -0.5, 0.5)
    images = _weights(conv, DFA(), "U1")
    assert images["B1"].shape == (20 * 8 * 8, 5)
    _assert_uniform(images["B1"], -(5**-0.5), 5**-0.5)
    one_output = mlp((10,), 1, hidden=[20000], activation="tanh")
    _assert_uniform(_weights(one_output, DFA(), "U1")["B1"], -1, 1)
    _assert_uniform(_weights(one_output, MDFA(), "U1")["B1"], 0, 1)


def test_the_fan_in_of_lra_es_error_weights_is_the_layer_above(wide: Network, conv: Network) -> None:
    """As in its program, which draws E, the transpose of what is stored here, like any other matrix."""
    w = _weights(wide, LRAE(), "U1")
    assert w["E3"].shape == (4, 300)
    _assert_uniform(w["E3"], -0.5, 0.5)
    _assert_uniform(w["E2"], -(300**-0.5), 300**-0.5)
    kernel = _weights(conv, LRAE(), "U1")["E2"]
    assert kernel.shape == (30, 20, 3, 3)
    _assert_uniform(kernel, -(270**-0.5), 270**-0.5)  # 30 channels x 3 x 3


def test_literal_u1_is_bounded_by_the_fourth_root_of_the_fan_in(wide: Network) -> None:
    w = _weights(wide, FA(), "literal_U1")
    _assert_uniform(w["W1"], -(100**0.25), 100**0.25)
    _assert_uniform(w["B2"], -(400**0.25), 400**0.25)
    positive = _weights(wide, FA(), "literal_P1")
    _assert_uniform(positive["W1"], -(100**0.25), 100**0.25)
    _assert_uniform(positive["W2"], 0, 400**0.25)


@pytest.mark.parametrize("text", ["P1", "A0.1"])
def test_p_and_a_leave_only_the_first_forward_layer_signed(wide: Network, rule: Rule, text: str) -> None:
    w = _weights(wide, rule, text)
    signed = {name for name, tensor in w.items() if (tensor < 0).any()}
    assert signed == {"W1"}
    assert (w["W1"] > 0).any()


def test_p_and_a_are_the_absolute_values_of_u_and_n(wide: Network) -> None:
    for absolute, signed in (("P1", "U1"), ("A0.1", "N0.1")):
        a, s = _weights(wide, BP(), absolute), _weights(wide, BP(), signed)
        assert torch.equal(a["W1"], s["W1"])
        assert torch.equal(a["W2"], s["W2"].abs())


def test_forward_and_backward_have_initializers_of_their_own(wide: Network) -> None:
    w = _weights(wide, FA(), "N0.1", "0")
    assert w["W2"].any()
    assert not w["B2"].any()


def test_mdfa_takes_absolute_values_above_the_first_layer_and_of_all_feedback(wide: Network) -> None:
    plain, monotone = _weights(wide, DFA(), "U1"), _weights(wide, MDFA(), "U1")
    assert plain.keys() == monotone.keys()
    assert torch.equal(monotone["W1"], plain["W1"])
    for name in ("W2", "W3", "B1", "B2"):
        assert (plain[name] < 0).any()
        assert torch.equal(monotone[name], plain[name].abs())


def test_every_rule_starts_from_the_same_forward_weights(conv: Network, rule: Rule) -> None:
    reference, w = _weights(conv, BP(), "N0.1", seed=3), _weights(conv, rule, "N0.1", seed=3)
    for name, tensor in reference.items():
        assert torch.equal(w[name], tensor.abs() if name in rule.nonnegative(conv) else tensor)


def test_biases_start_at_zero(wide: Network, rule: Rule) -> None:
    w = _weights(wide, rule, "U1")
    assert all(w[f"b{l}"].shape == (units,) and not w[f"b{l}"].any() for l, units in ((1, 400), (2, 300), (3, 4)))


def test_a_draw_depends_on_the_seed_and_its_name_alone() -> None:
    same = mlp((4,), 4, hidden=[4, 4], activation="tanh")
    w = _weights(same, FA(), "N1")
    drawn = [w[name] for name in ("W1", "W2", "W3", "B2", "B3")] + [_weights(same, FA(), "N1", seed=1)["W1"]]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    deeper = mlp((4,), 4, hidden=[4, 4, 4], activation="relu", bias=False)
    again = _weights(deeper, DFA(), "N1", "U1")
    assert all(torch.equal(w[name], again[name]) for name in ("W1", "W2", "W3"))


def test_orthogonal_is_refused_where_weights_must_be_nonnegative(conv: Network) -> None:
    message = r"rule MDFA needs non-negative weights \({}\), and Orthogonal.*choose another initializer, such as"
    with pytest.raises(ValueError, match=message.format("W2")):
        initial_weights(conv, MDFA(), Orthogonal(), Uniform(), seed=0)
    with pytest.raises(ValueError, match=message.format("B1")):
        initial_weights(conv, MDFA(), Uniform(), Orthogonal(), seed=0)


@pytest.mark.parametrize("option", options("init"))
def test_every_config_works(configured: Callable[..., Any], rule: Rule, option: str) -> None:
    net = allconv((1, 5, 5), 2, filters=[[3, 3, 1]], activation="tanh")
    made = configured("init", option)
    forward, backward = (from_string(i) if isinstance(i, str) else i for i in (made["forward"], made["backward"]))
    if not forward.may_be_absolute and rule.nonnegative(net):
        return  # refused, as tested above
    w = initial_weights(net, rule, forward, backward, seed=0)
    assert all(tensor.isfinite().all() for tensor in w.values())
    assert w["W1"].any() != (option == "zeros")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("normal", Normal(0.1)),
        ("uniform", Uniform(1.0, -0.5)),
        ("glorot_normal", GlorotNormal(1.0)),
        ("glorot_uniform", GlorotUniform(1.0)),
        ("orthogonal", Orthogonal(1.0)),
    ],
)
def test_configs_state_the_defaults(configured: Callable[..., Any], option: str, expected: Initializer) -> None:
    assert configured("init", option) == {"forward": expected, "backward": expected}
    assert type(expected)() == expected
