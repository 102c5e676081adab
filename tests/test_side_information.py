"""Weights as fractions, the stack that keeps what they destroy, and how much that is."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from odesolvers import (
    BDIA,
    DDIM,
    Euler,
    FixedPoint,
    HeunEDM,
    PerStep,
    State,
    StepRatio,
    karras_sigmas,
    side_information_bound,
)
from odesolvers.arithmetic.stack import Stack, checksum, pack_bits, unpack_bits

from .problems import smooth


def aside(state: State) -> int:
    """How many words of side information were put aside."""
    return sum(done.words for done in state.side.done)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6000), st.integers(1, 6000)), min_size=1, max_size=40),
    st.integers(0, 2**32),
)
def test_any_fractions_are_undone_after_the_stack_was_stored(fractions, seed: int) -> None:
    """Numerators other than 1 as well: undoing pushes those, with a bound that may be looser."""
    z = torch.randint(-(2**40), 2**40, (33,), generator=torch.Generator().manual_seed(seed))
    stack, trail, product = Stack(z.shape, 0, checksum(z), torch.float32), [z], 1.0
    for a, b in fractions:
        product *= a / b
        if product > 2**18 or a == b:
            product /= a / b
            continue
        trail.append(stack.multiply(trail[-1], a, b).clone())
        stack = Stack.unpack(stack.pack(), z.shape)
    done = [(done.a, done.b) for done in stack.pack().done]
    for before, (a, b) in zip(reversed(trail[:-1]), reversed(done), strict=True):
        assert torch.equal(stack.divide(trail.pop(), a, b), before)
        stack = Stack.unpack(stack.pack(), z.shape)
    side = stack.pack()
    assert (side.bits_per_element, side.done) == (0, ())


def test_a_weight_and_its_inverse_in_turn_are_no_turning_round() -> None:
    """2/3 and then 3/2, of other states, down a grid: the second does not undo the first."""
    solver = BDIA(Euler(), PerStep([2 / 3, 3 / 2] * 20), FixedPoint())
    sigmas = karras_sigmas(41)
    x = solver.arithmetic.snap(torch.randn(3, 17) * 80)
    state = solver.sample(smooth, x, sigmas).state
    assert len(state.side.done) == 40
    assert torch.equal(solver.invert(smooth, state, sigmas).x, x)


@pytest.mark.parametrize("power", [2, 3, 4])
@pytest.mark.parametrize("steps", [10, 25, 40, 63])
def test_steep_step_ratios_come_back_to_the_bit(power: int, steps: int) -> None:
    """Fractions with large terms, and stacks near 63 bits."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        solver, sigmas = BDIA(HeunEDM(), StepRatio(power), FixedPoint()), karras_sigmas(steps)
        x = solver.arithmetic.snap(80 * torch.randn(1, 64, generator=generator))
        state = solver.sample(smooth, x, sigmas).state
        assert torch.equal(solver.invert(smooth, state, sigmas).x, x)


def test_spills_are_crossed_in_one_run_and_in_pieces() -> None:
    solver, sigmas = BDIA(Euler(), 0.5, FixedPoint()), karras_sigmas(150)
    x = torch.randn(2, 16, dtype=torch.float64) * 80
    whole = solver.sample(smooth, x, sigmas).state
    assert aside(whole) >= 3
    state: Tensor | State = x
    for stop in (60, 90, 150):
        state = solver.sample(smooth, state, sigmas, stop=stop).state
    assert torch.equal(state.current, whole.current)
    assert aside(state) >= 2
    for stop in (120, 61, 20):
        state = solver.invert(smooth, state, sigmas, stop=stop).state
    assert 0 < state.side.bits_per_element < 32
    back = solver.invert(smooth, state, sigmas)
    assert torch.equal(back.x, solver.arithmetic.snap(x))
    assert back.state.side.bits_per_element == 0


def test_spills_of_a_run_that_starts_from_the_image() -> None:
    # Weights above 1 contract on the way up, so that it is the encoding that must remember.
    sigmas = torch.linspace(2, 0.01, 90)
    solver = BDIA(Euler(), PerStep([2.0] * 88), FixedPoint())
    image = torch.rand(2, 16)
    code = solver.invert(smooth, image, sigmas)
    assert aside(code.state) >= 1
    again = solver.sample(smooth, code.state, sigmas)
    assert torch.equal(again.x, solver.arithmetic.snap(image))


# --- side information ------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [18, 50, 100])
@pytest.mark.parametrize("gamma", [1.0, 0.96, 0.5, StepRatio(1), StepRatio(2)], ids=str)
@pytest.mark.parametrize("approximator", [Euler(), DDIM()], ids=str)
def test_side_information_is_near_the_bound(approximator, gamma, steps: int) -> None:
    solver, sigmas = BDIA(approximator, gamma, FixedPoint()), karras_sigmas(steps)
    x = torch.randn(4, 1024, dtype=torch.float64) * 80
    side = solver.sample(smooth, x, sigmas).state.side
    assert side.bits_per_element <= side_information_bound(solver, sigmas) + 4
    assert side.nbytes * 8 == side.bits_per_element * x.numel()


def test_no_side_information_for_weights_of_one_and_little_for_encoding() -> None:
    sigmas = karras_sigmas(18)
    x = torch.randn(4, 64, dtype=torch.float64) * 80
    one = BDIA(Euler(), 1.0, FixedPoint())
    assert one.sample(smooth, x, sigmas).state.side.bits_per_element == 0
    half = BDIA(Euler(), StepRatio(1), FixedPoint())
    bits = half.invert(smooth, x / 80, sigmas).state.side.bits_per_element
    assert bits <= 1  # the bound of encoding; sampling has 13.5


def test_the_bound_is_the_sum_of_the_logarithms() -> None:
    sigmas = karras_sigmas(50)
    assert side_information_bound(BDIA(Euler(), 0.5), sigmas) == pytest.approx(49)
    steps = -sigmas.diff()
    bound = side_information_bound(BDIA(Euler(), StepRatio(2)), sigmas)
    ratios = (steps[1:] / steps[:-1]) ** 2
    assert bound == pytest.approx(float(-ratios.log2().sum()))
    # Room that is made before anything is stored is of no use.
    assert side_information_bound(BDIA(Euler(), PerStep([8, 0.5])), [3, 2, 1, 0]) == pytest.approx(
        1
    )


@given(
    st.sampled_from([2**58, 2**53, 2**40]).flatmap(
        lambda most: st.lists(st.integers(-most, most), min_size=1, max_size=40)
    ),
    st.lists(st.tuples(st.integers(1, 2**12), st.integers(1, 2**12), st.booleans()), max_size=40),
)
@settings(max_examples=50, deadline=None)
def test_the_stack_is_the_algorithm_on_integers_without_limit(values, scalings) -> None:
    """Against the five lines of Maclaurin et al. in Python's own integers."""
    z = torch.tensor(values)
    stack = Stack(z.shape, 0, checksum(z), torch.float32)
    expected, piles = list(values), [0] * len(values)
    done = []
    for a, b, multiply in scalings:
        if any(abs(value) * a // b >= 2**61 for value in expected):
            continue
        for i, value in enumerate(expected):
            quotient, remainder = divmod(value, b)
            piles[i], t = divmod(piles[i] * b + remainder, a)
            expected[i] = quotient * a + t
        size = float(z.abs().max())
        z = (stack.multiply(z, a, b, size) if multiply else stack.divide(z, b, a, size)).clone()
        done.append((a, b, multiply))
        assert z.tolist() == expected
        stack = Stack.unpack(stack.pack(), z.shape)
    side = stack.pack()
    assert side.bits_per_element >= max(piles).bit_length()
    for a, b, multiply in reversed(done):
        size = float(z.abs().max())
        z = (stack.divide(z, a, b, size) if multiply else stack.multiply(z, b, a, size)).clone()
    assert z.tolist() == values
    if all(multiply for _, _, multiply in done):
        assert stack.pack().bits_per_element == 0


@pytest.mark.parametrize("bits", [30, 52, 53, 54, 60])
@pytest.mark.parametrize("b", [3, 7, 2401, 4095])
def test_quotients_beside_an_integer_are_rounded_down(b: int, bits: int) -> None:
    """Where a quotient in float64 comes nearest to the wrong side of it."""
    multiples = [n * b for n in range(2**bits // b - 50, 2**bits // b)]
    values = [sign * m + beside for m in multiples for sign in (1, -1) for beside in (-1, 0, 1)]
    z = torch.tensor(values)
    stack = Stack(z.shape, 0, checksum(z), torch.float32)
    product = stack.multiply(z, 1, b, float(z.abs().max()))
    assert product.tolist() == [value // b for value in values]
    assert stack.divide(product.clone(), 1, b).tolist() == values


@given(st.integers(0, 31), st.integers(1, 200), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_packing_is_undone(width: int, n: int, random: random.Random) -> None:
    z = torch.tensor([random.randrange(2**width) for _ in range(n)])
    packed = pack_bits(z, width)
    assert packed.dtype == torch.int32
    assert packed.shape == (width, -(-n // 32))
    assert torch.equal(unpack_bits(packed, n), z)


@given(st.floats(-47.9, 47.9))
@settings(max_examples=150, deadline=None)
def test_weights_are_near_and_are_their_own(log2: float) -> None:
    g = 2.0**log2
    weight = FixedPoint().weight(g)
    assert abs(weight - g) <= g / 2**12
    assert FixedPoint().weight(weight) == weight


def test_weights_that_are_simple_stay_and_hopeless_ones_are_refused() -> None:
    for g in (0.0, 1.0, 0.5, 2.0, 0.75, 2**-12, 3000.0):
        assert FixedPoint().weight(g) == g
    with pytest.raises(ValueError, match="too far from 1"):
        FixedPoint().weight(1e-15)
    with pytest.raises(ValueError, match="too far from 1"):
        FixedPoint().weight(1e15)


def test_weights_over_the_whole_range_come_back() -> None:
    sigmas = [9, 8, 7, 6, 5, 4, 3, 2, 1]
    solver = BDIA(Euler(), PerStep([1e-9, 3e3, 2e-4, 0.7, 1e4, 1e-6, 1.1]), FixedPoint())
    x = torch.randn(4, 8, dtype=torch.float64)
    solution = solver.sample(smooth, x, sigmas)
    assert torch.equal(solver.invert(smooth, solution.state, sigmas).x, solver.arithmetic.snap(x))
