"""Inversion that is exact to the bit."""

from __future__ import annotations

import dataclasses
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, assume, given, reject, settings, strategies as st
from torch import Tensor

from benchmarks.common import EXACT_PROBLEMS as PROBLEMS, Problem
from odesolvers import (
    BDIA,
    DDIM,
    RK3,
    RK4,
    DPMSolverPP2S,
    Euler,
    FixedPoint,
    FloatingPoint,
    HeunEDM,
    InversionWarning,
    Midpoint,
    PerStep,
    SmoothedOutput,
    State,
    StepRatio,
    exponential_sigmas,
    karras_sigmas,
    side_information_bound,
    vp_sigmas,
)
from odesolvers.arithmetic.stack import Stack, checksum, pack_bits, unpack_bits
from odesolvers.models import Gaussian, IdealDenoiser, InDtype, load_digits

APPROXIMATORS = (Euler(), DDIM(), Midpoint(), HeunEDM(), RK3(), RK4(), DPMSolverPP2S())
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DEVICES = (
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
)
QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)
FULL = settings(QUICK, max_examples=2500)


def smooth(x: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser that is not linear."""
    s = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return torch.tanh(x / (1 + s * s)) * 0.8


# --- the property: any walk on the grid comes back to the bit --------------------------------------


@st.composite
def grids(draw: st.DrawFn, n: int) -> list[float]:
    kind = draw(st.sampled_from(["karras", "exponential", "vp", "any"]))
    if kind == "any" or n < 2:
        steps = draw(st.lists(st.floats(0.01, 3.0), min_size=n, max_size=n))
        levels = [draw(st.sampled_from([0.0, 0.002, 0.1]))]
        for step in steps:
            levels.append(levels[-1] + step)
        return levels[::-1]
    if kind == "karras":
        rho = draw(st.sampled_from([1.0, 3.0, 7.0]))
        sigmas = karras_sigmas(n, rho=rho, append_zero=draw(st.booleans()))
    elif kind == "exponential":
        sigmas = exponential_sigmas(n, 0.03, 14.6, append_zero=draw(st.booleans()))
    else:
        sigmas = vp_sigmas(n)
    return sigmas.tolist()


@st.composite
def gammas(draw: st.DrawFn, steps: int):
    rule = draw(
        st.one_of(
            st.just(1.0),
            st.floats(0.3, 1.0),
            st.sampled_from([0.5, 2.0]).map(StepRatio),
            st.just(StepRatio(1)),
            st.lists(st.floats(0.2, 4.0), min_size=steps - 1, max_size=steps - 1).map(PerStep),
        )
    )
    return SmoothedOutput(rule) if draw(st.booleans()) else rule


@st.composite
def walks(draw: st.DrawFn, max_steps: int):
    """A solver, a grid, a start at either end, and the levels to turn at."""
    n = draw(st.integers(1, max_steps))
    sigmas = draw(grids(n))
    steps = len(sigmas) - 1
    assume(steps >= 1)
    solver = BDIA(
        draw(st.sampled_from(APPROXIMATORS)),
        draw(gammas(steps)),
        FixedPoint(draw(st.sampled_from([40, 40, 32]))),
    )
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    network = draw(st.sampled_from([None, *DTYPES]))
    denoiser = draw(st.sampled_from([smooth, Gaussian(0.3, 0.7)]))
    if network is not None:
        denoiser = InDtype(denoiser, network)
    from_noise = draw(st.booleans())
    turns = draw(st.lists(st.integers(0, steps), max_size=3))
    return solver, sigmas, denoiser, dtype, shape, from_noise, turns, draw(st.integers(0, 2**31))


def check_walk(walk) -> None:
    solver, sigmas, denoiser, dtype, shape, from_noise, turns, seed = walk
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = 0 if from_noise else len(sigmas) - 1
    x = (noise * sigmas[0] if from_noise else noise / 2).to(dtype)
    snapped = solver.arithmetic.snap(x)

    seen: dict[int, State] = {}
    last = len(sigmas) - 1
    end = 0 if from_noise else last
    here = x
    try:
        for stop in [*turns, last - end, end]:
            index = here.index if isinstance(here, State) else start
            if stop == index or (stop > index and index == last):
                continue
            go = solver.sample if stop > index else solver.invert
            solution = go(denoiser, here, sigmas, stop=stop)
            here = solution.state
            before = seen.setdefault(here.index, here)
            assert torch.equal(here.current, before.current)
            assert torch.equal(here.partner, before.partner)
            if stop == start:
                assert torch.equal(solution.x, snapped)
                assert solution.x.dtype == dtype
    except (OverflowError, FloatingPointError):
        reject()  # refused aloud: an unstable run that left the range
    assert here.index == max(1, start)
    origin = here.current if start == last else here.partner
    assert torch.equal(solver.arithmetic.load(origin, dtype), snapped)


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # any rule, good or bad
@QUICK
@given(walks(max_steps=8))
def test_any_walk_on_the_grid_comes_back_to_the_bit(walk) -> None:
    check_walk(walk)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # any rule, good or bad
@FULL
@given(walks(max_steps=40))
def test_any_walk_on_the_grid_comes_back_to_the_bit_at_length(walk) -> None:
    check_walk(walk)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
@pytest.mark.parametrize("gamma", [1.0, StepRatio(1)], ids=str)
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::odesolvers.InversionWarning"
)
def test_every_problem_is_exact_both_ways(problem: Problem, gamma, device: str) -> None:
    if "Stable Diffusion" in problem.name:
        pytest.importorskip("diffusers")
    denoiser = problem.build(torch.device(device))
    args = problem.arguments(device)
    sigmas = karras_sigmas(8, problem.bottom, problem.top)
    solver = BDIA(HeunEDM("behind"), gamma, FixedPoint())
    x = solver.arithmetic.snap(problem.noise().to(device))

    solution = solver.sample(denoiser, x, sigmas, extra_args=args)
    back = solver.invert(denoiser, solution.state, sigmas, extra_args=args)
    assert torch.equal(back.x, x)

    image = solver.arithmetic.snap(x / problem.top)
    code = solver.invert(denoiser, image, sigmas, extra_args=args)
    again = solver.sample(denoiser, code.state, sigmas, extra_args=args)
    assert torch.equal(again.x, image)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_network_in_any_precision(dtype: torch.dtype) -> None:
    problem = next(problem for problem in PROBLEMS if problem.name == "random convolutions")
    denoiser = problem.build(torch.device("cpu")).to(dtype)
    solver = BDIA(DDIM(), 0.9, FixedPoint())
    x, sigmas = solver.arithmetic.snap(problem.noise()), karras_sigmas(6)
    solution = solver.sample(denoiser, x, sigmas)
    assert torch.equal(solver.invert(denoiser, solution.state, sigmas).x, x)


# --- it is the same solver -------------------------------------------------------------------------


@pytest.mark.parametrize("approximator", APPROXIMATORS, ids=str)
@pytest.mark.parametrize("gamma", [1.0, 0.96, 0.5, StepRatio(1), StepRatio(2)], ids=str)
def test_fixed_point_computes_what_floating_point_computes(approximator, gamma) -> None:
    denoiser, sigmas = Gaussian(0.3, 0.7), karras_sigmas(20)
    x = torch.randn(3, 5, dtype=torch.float64) * 80
    exact = BDIA(approximator, gamma, FixedPoint()).sample(denoiser, x, sigmas)
    plain = BDIA(approximator, gamma).sample(denoiser, x, sigmas)
    assert exact.nfe == plain.nfe
    # Weights differ by up to 2^-12, on terms that are small beside the state.
    torch.testing.assert_close(exact.x, plain.x, rtol=1e-5, atol=1e-5)


def test_the_denoiser_sees_the_dtype_of_x_and_the_callback_the_same_states_both_ways() -> None:
    solver, sigmas = BDIA(HeunEDM(), 0.7, FixedPoint()), karras_sigmas(6)
    down: dict[int, Tensor] = {}
    up: dict[int, Tensor] = {}

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == torch.bfloat16
        return smooth(x, sigma)

    x = torch.randn(2, 3, dtype=torch.bfloat16) * 80
    kept = x.clone()
    solution = solver.sample(denoiser, x, sigmas, callback=lambda d: down.update({d["i"]: d["x"]}))
    back = solver.invert(
        denoiser, solution.state, sigmas, callback=lambda d: up.update({d["i"]: d["x"]})
    )
    assert set(up) == set(range(1, 6))
    assert all(torch.equal(up[i], down[i]) for i in up)
    assert torch.equal(x, kept)
    assert torch.equal(back.x, x)


def test_a_thousand_steps() -> None:
    sigmas = karras_sigmas(1000)
    for gamma in (0.5, StepRatio(2)):
        solver = BDIA(Euler(), gamma, FixedPoint())
        x = torch.randn(2, 16) * 80
        solution = solver.sample(smooth, x, sigmas)
        side = solution.state.side
        assert side.bits_per_element <= side_information_bound(solver, sigmas) + 4
        assert torch.equal(
            solver.invert(smooth, solution.state, sigmas).x, solver.arithmetic.snap(x)
        )


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


def a_run(steps: int = 60) -> tuple[BDIA, Tensor, Tensor, State]:
    solver, sigmas = BDIA(Euler(), 0.5, FixedPoint()), karras_sigmas(steps)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 80
    return solver, sigmas, x, solver.sample(smooth, x, sigmas).state


def flipped(tensor: Tensor, bit: int) -> Tensor:
    """A copy of an integer tensor with one bit the other way round."""
    data = bytearray(tensor.numpy().tobytes())
    data[bit // 8] ^= 1 << bit % 8
    return torch.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape).clone()


def test_every_bit_of_the_state_counts() -> None:
    solver, sigmas, _, state = a_run()
    side = state.side
    assert side.words
    assert side.packed.numel()
    generator = random.Random(0)
    for part in ("current", "partner", "words", "packed", "checksum"):
        for _ in range(12):
            if part in ("current", "partner"):
                tensor = getattr(state, part)
                bit = generator.randrange(tensor.nbytes * 8)
                broken = dataclasses.replace(state, **{part: flipped(tensor, bit)})
            elif part == "words":
                word = flipped(side.words[0], generator.randrange(side.words[0].nbytes * 8))
                words = (word, *side.words[1:])
                broken = dataclasses.replace(state, side=dataclasses.replace(side, words=words))
            else:
                tensor = getattr(side, part)
                changed = {part: flipped(tensor, generator.randrange(tensor.nbytes * 8))}
                broken = dataclasses.replace(state, side=dataclasses.replace(side, **changed))
            with pytest.raises((RuntimeError, OverflowError), match=r"not what it was|holds|fit"):
                solver.invert(smooth, broken, sigmas)


def test_a_bit_that_no_state_ever_uses_counts_too() -> None:
    solver, sigmas, _, state = a_run()
    width = state.side.packed.shape[0]
    high = unpack_bits(state.side.packed, state.current.numel())
    packed = pack_bits(high | 1 << width, width + 1)
    side = dataclasses.replace(state.side, packed=packed)
    with pytest.raises(RuntimeError, match=r"not what it was|does not fit the run"):
        solver.invert(smooth, dataclasses.replace(state, side=side), sigmas)


# --- states in files and on devices ----------------------------------------------------------------


def test_a_state_survives_a_file(tmp_path) -> None:
    solver, sigmas, x, state = a_run()
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert torch.equal(loaded.current, state.current)
    assert loaded.sigmas == state.sigmas
    assert torch.equal(solver.invert(smooth, loaded, sigmas).x, solver.arithmetic.snap(x))


def test_a_floating_point_state_survives_a_file(tmp_path) -> None:
    solver, sigmas = BDIA(DDIM()), karras_sigmas(5)
    state = solver.sample(smooth, torch.randn(2, 3, dtype=torch.bfloat16), sigmas).state
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert loaded.side is None
    assert torch.equal(loaded.current, state.current)
    assert torch.equal(loaded.partner, state.partner)
    assert (loaded.index, loaded.solver) == (state.index, state.solver)


def test_a_damaged_or_foreign_file_is_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "state.safetensors"
    a_run()[-1].save(path)
    data = path.read_bytes()
    for place in (-1, -200, len(data) // 2):
        broken = bytearray(data)
        broken[place] ^= 4
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="damaged"):
            State.load(path)
    path.write_bytes(data.replace(b'"version":"3"', b'"version":"7"'))
    with pytest.raises(ValueError, match="version 7"):
        State.load(path)
    path.write_bytes(data[:-9])
    with pytest.raises(ValueError, match="damaged"):
        State.load(path)
    save_file({"cleaner": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a state saved by odesolvers"):
        State.load(path)
    with pytest.raises(OSError):
        State.load(tmp_path / "absent")


def test_a_code_is_sampled_under_another_label_from_its_fork() -> None:
    denoiser = IdealDenoiser(*load_digits())
    solver, sigmas = BDIA(HeunEDM(), StepRatio(2), FixedPoint()), karras_sigmas(8, 0.1)
    own, other = ({"class_labels": torch.tensor([label])} for label in (3, 5))
    image = solver.arithmetic.snap(load_digits()[0][3:4])
    code = solver.invert(denoiser, image, sigmas, extra_args=own)
    with pytest.raises(RuntimeError, match=r"state\.fork\(\)"):
        solver.sample(denoiser, code.state, sigmas, extra_args=other)
    edit = solver.sample(denoiser, code.state.fork(), sigmas, extra_args=other)
    assert not torch.equal(edit.x, image)
    back = solver.invert(denoiser, edit.state, sigmas, extra_args=other)
    assert torch.equal(back.x, code.x)
    again = solver.sample(denoiser, code.state, sigmas, extra_args=own)
    assert torch.equal(again.x, image)


def test_noise_is_noticed_in_a_denoiser_that_returns_one_buffer() -> None:
    buffer = torch.empty(2, 3)

    def noisy(x: Tensor, sigma: Tensor) -> Tensor:
        return buffer.copy_(smooth(x, sigma) + 1e-3 * torch.randn(2, 3))

    solver = BDIA(Euler(), 0.9, FixedPoint(check_determinism=True))
    with pytest.raises(RuntimeError, match="not deterministic"):
        solver.sample(noisy, torch.randn(2, 3), karras_sigmas(5))


def test_elements_that_change_places_change_the_checksum() -> None:
    z = torch.arange(6).reshape(1, 2, 3)
    for other in (z.flip(1), z.flip(2), z.transpose(1, 2)):
        assert checksum(z) != checksum(other)
    pair = torch.cat([z, z + 1])
    assert torch.equal(checksum(pair.flip(0)), checksum(pair).flip(0))  # each has its own


def test_a_state_in_channels_last_survives_a_file(tmp_path) -> None:
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    for arithmetic in (FloatingPoint(), FixedPoint()):
        state = BDIA(DDIM(), arithmetic=arithmetic).sample(smooth, x, karras_sigmas(4)).state
        state.save(tmp_path / "state.safetensors")
        loaded = State.load(tmp_path / "state.safetensors")
        assert torch.equal(loaded.current, state.current)
        assert loaded.current.stride() == state.current.stride()


def test_side_information_of_another_state_is_refused() -> None:
    solver, sigmas, _, state = a_run()
    smaller = dataclasses.replace(state, current=state.current[:1], partner=state.partner[:1])
    with pytest.raises(ValueError, match="does not belong to a state of shape"):
        solver.invert(smooth, smaller, sigmas)
    floats = dataclasses.replace(
        state, current=state.current.double(), partner=state.partner.double()
    )
    with pytest.raises(ValueError, match="pair in int64"):
        solver.invert(smooth, floats, sigmas)
    with pytest.raises(ValueError, match="another solver"):
        BDIA(Euler(), 0.5, FixedPoint(32)).invert(smooth, state, sigmas)


def test_a_state_moves_as_a_whole() -> None:
    state = a_run()[-1].to("meta")
    side = state.side
    tensors = [state.current, state.partner, side.packed, side.checksum, *side.words]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# --- snapping and range ----------------------------------------------------------------------------


@given(
    st.floats(-80, 80, width=32),
    st.integers(8, 53),
    st.sampled_from(DTYPES),
    st.integers(-40, 0),
)
@settings(max_examples=150, deadline=None)
def test_snap_rounds_to_the_grid_within_the_dtype(value, F, dtype, exponent) -> None:
    x = torch.tensor([value * 2.0**exponent], dtype=torch.float64).to(dtype)
    arithmetic = FixedPoint(F)
    snapped = arithmetic.snap(x)
    assert snapped.dtype == dtype
    assert torch.equal(arithmetic.snap(snapped), snapped)
    assert Fraction(snapped.item()) == Fraction(round(Fraction(x.item()) * 2**F), 2**F)
    precision = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}[dtype]
    if abs(x.item()) >= 2.0 ** (precision - 1 - F):
        assert torch.equal(snapped, x)


def test_snap_of_noise_changes_nothing_that_matters() -> None:
    x = torch.randn(10_000) * 80
    snapped = FixedPoint().snap(x)
    assert torch.equal(snapped[x.abs() > 2**-17], x[x.abs() > 2**-17])
    assert float((snapped - x).abs().max()) <= 2**-41


def test_a_state_that_leaves_the_range_is_an_error() -> None:
    images, _ = load_digits()
    denoiser, sigmas = IdealDenoiser(images), karras_sigmas(50)
    foreseen = pytest.warns(InversionWarning, match="code of a lone image")
    overflow = r"step from sigma = .* holds \|x\| below 2\.09715e\+06"
    with foreseen, pytest.raises(OverflowError, match=overflow):
        BDIA(DDIM(), 0.5, FixedPoint()).invert(denoiser, images[:2], sigmas)
    with foreseen, pytest.raises(OverflowError, match="float16 holds"):
        BDIA(DDIM(), 0.5, FixedPoint()).invert(denoiser, images[:2].half(), sigmas)
    with pytest.raises(OverflowError, match="an element of size 1e"):
        FixedPoint().snap(torch.tensor([1e9]))
    with pytest.raises(OverflowError, match="an element of size nan"):
        FixedPoint().snap(torch.tensor([math.nan]))


def test_the_range_is_checked_at_the_end_where_it_was_not_on_the_way() -> None:
    """As on a GPU, where a check on the way would wait for it."""
    arithmetic, z = FixedPoint(), torch.zeros(4, dtype=torch.int64)
    stack = arithmetic.open(State(z, z, 1, (2.0, 1.0), ""), 1, torch.float64)
    small, large = torch.tensor(-3.0), torch.tensor(3e6)
    stack.extents += [
        (80.0, small, -small, 1.0),
        (40.0, small, large, 1.0),
        (1.0, small, small, 9e9),
    ]
    with pytest.raises(OverflowError, match="reaches 3e\\+06 in the step from sigma = 40"):
        arithmetic.close(stack, z, z, 3)


@pytest.mark.parametrize("bits", [7, 54, 40.0, True, "40"])
def test_unusable_fractional_bits(bits) -> None:
    with pytest.raises((TypeError, ValueError), match="must be an integer"):
        FixedPoint(bits)


def test_fractional_bits_must_fit_the_grid() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"at most 46 fractional bits.*fractional_bits=46"):
        BDIA(Euler(), 1.0, FixedPoint(50)).sample(smooth, x, karras_sigmas(5))
    with pytest.raises(ValueError, match="at least 24"):
        BDIA(Euler(), 1.0, FixedPoint(20)).sample(smooth, x, karras_sigmas(5))
    with pytest.raises(ValueError, match="no number of bits"):
        BDIA(Euler(), 1.0, FixedPoint(40)).sample(smooth, x, [1e12, 1e-6, 0])
    BDIA(Euler(), 1.0, FixedPoint(46)).sample(smooth, x, karras_sigmas(5))
    BDIA(Euler(), 1.0, FixedPoint(24)).sample(smooth, x, karras_sigmas(5))


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


# --- determinism -----------------------------------------------------------------------------------


class Noisy:
    """A denoiser that returns one element different in its last bit, in one call."""

    def __init__(self, call: int) -> None:
        self.calls, self.call = 0, call

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        denoised = smooth(x, sigma)
        self.calls += 1
        if self.calls == self.call:
            denoised.view(-1)[3] = torch.nextafter(denoised.view(-1)[3], denoised.new_tensor(9.0))
        return denoised


@pytest.mark.parametrize("gamma", [1.0, 0.5], ids=str)
def test_a_single_bit_of_a_single_call_is_noticed(gamma: float) -> None:
    sigmas = karras_sigmas(10)
    solver = BDIA(Euler(), gamma, FixedPoint())
    denoiser = Noisy(call=14)  # on the way back
    solution = solver.sample(denoiser, torch.randn(2, 8), sigmas)
    with pytest.raises(RuntimeError, match="not what it was: the denoiser did not return the same"):
        solver.invert(denoiser, solution.state, sigmas)


def test_other_arguments_on_the_way_back_are_noticed() -> None:
    images, labels = load_digits()
    denoiser, sigmas = IdealDenoiser(images, labels), karras_sigmas(10)
    solver = BDIA(HeunEDM(), StepRatio(1), FixedPoint())
    args = {"class_labels": torch.tensor([1, 2])}
    solution = solver.sample(denoiser, torch.randn(2, 1, 8, 8) * 80, sigmas, extra_args=args)
    with pytest.raises(RuntimeError, match="other extra_args"):
        solver.invert(
            denoiser, solution.state, sigmas, extra_args={"class_labels": torch.tensor([1, 3])}
        )


def test_a_step_taken_twice_finds_a_denoiser_that_is_not_deterministic() -> None:
    sigmas, x = karras_sigmas(4), torch.randn(2, 8)
    solver = BDIA(HeunEDM("both"), 0.9, FixedPoint(check_determinism=True))
    with pytest.raises(RuntimeError, match=r"not deterministic: .*at level 0 .* 1 of 16 elements"):
        solver.sample(Noisy(call=3), x, sigmas)
    plain = BDIA(HeunEDM("both"), 0.9, FixedPoint())
    solution, expected = solver.sample(smooth, x, sigmas), plain.sample(smooth, x, sigmas)
    assert torch.equal(solution.x, expected.x)
    assert solution.nfe == expected.nfe + 2
    # The option is about the run and not about the state: either solver goes on with it.
    assert torch.equal(plain.invert(smooth, solution.state, sigmas).x, plain.arithmetic.snap(x))
