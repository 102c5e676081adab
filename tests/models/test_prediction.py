"""What the check of predictions says of networks whose prediction is known."""

import warnings

import pytest
import torch

from odesolvers.models import (
    CosineDenoiser,
    DiscreteDenoiser,
    EDMDenoiser,
    FlowDenoiser,
    Gaussian,
    GaussianMixture,
    IdealDenoiser,
    PredictionWarning,
    VPDenoiser,
    check_prediction,
    init_noise,
    load_digits,
    load_emoji,
)

from .exact import exact_network, levels_of

PREDICTIONS = ["epsilon", "v_prediction", "sample", "score"]
ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2, 0)


def data(name):
    """A perfect denoiser, or the trained one of emoji, and the shape of its states."""
    if name == "emoji":
        return load_emoji(), (2, 3, 32, 32)
    if name == "digits":
        pytest.importorskip("sklearn", reason="the digits")
        return IdealDenoiser(*load_digits()), (8, 1, 8, 8)
    if name == "mixture":
        means = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).double()
        return GaussianMixture(means, torch.tensor([0.1, 0.2, 0.05, 0.3, 0.1])), (32, 8)
    return Gaussian(0.3, float(name)), (4, 3, 16, 16)


discrete_level = levels_of(ALPHAS)


def linear_level(t):
    return torch.expm1(19.9 * t**2 / 2 + 0.1 * t).sqrt()


def warning_of(denoiser, shape):
    """The text of the warning, or None."""
    sigmas = denoiser.sigmas(10)
    x = init_noise(shape, sigmas, generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_prediction(denoiser, x, sigmas)
    assert all(issubclass(w.category, PredictionWarning) for w in caught)
    return str(caught[0].message) if caught else None


@pytest.mark.parametrize("family", ["discrete", "vp", "cosine"])
@pytest.mark.parametrize("name", ["emoji", "digits", "mixture", "0.5", "0.1"])
def test_every_confusion(name, family):
    closed, shape = data(name)
    make = {
        "discrete": lambda right, said: DiscreteDenoiser(
            exact_network(right, closed, discrete_level), ALPHAS, said
        ),
        "vp": lambda right, said: VPDenoiser(exact_network(right, closed, linear_level), said),
        "cosine": lambda right, said: CosineDenoiser(
            exact_network(right, closed, lambda t: (torch.pi / 2 * t).tan()), said
        ),
    }[family]
    named = 0
    for right in PREDICTIONS:
        assert warning_of(make(right, right), shape) is None, right
        for declared in set(PREDICTIONS) - {right}:
            text = warning_of(make(right, declared), shape)
            v_or_sample = {right, declared} == {"v_prediction", "sample"}
            if text is None:
                assert v_or_sample, f"{right} declared as {declared} was not seen"
                continue
            assert f"declared as {declared}, but at the level" in text
            assert f"'{right}'" in text, text
            named += f": '{right}' is likely" in text
    # Of white data v is next to nothing at the lowest levels, which of the cosine reach 0.002.
    assert named >= (9 if name in ("0.5", "0.1") else 12)


def test_white_data_do_not_tell_v_from_sample():
    closed = Gaussian(0.0, 1.0)  # of which v is 0 at all levels
    v = exact_network("v_prediction", closed, discrete_level)
    assert warning_of(DiscreteDenoiser(v, ALPHAS, "sample"), (4, 3, 8, 8)) is None
    text = warning_of(DiscreteDenoiser(v, ALPHAS, "epsilon"), (4, 3, 8, 8))
    assert "either 'v_prediction' or 'sample' is likely, unless it is not trained" in text


@pytest.mark.parametrize("name", ["emoji", "0.5"])
@pytest.mark.parametrize("declared", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("noise_at", [0, 1])
def test_flow_conventions(noise_at, sign, declared, name):
    closed, shape = data(name)

    def velocity(z, t):  # dz/dt of its own time, or minus that
        t = (t if noise_at else 1 - t).clamp(1e-4, 1 - 1e-4).to(z.dtype)
        time = t.reshape(-1, *[1] * (z.ndim - 1))
        away = (z - closed(z / (1 - time), t / (1 - t))) / time  # noise - data
        return sign * away if noise_at else -sign * away

    text = warning_of(FlowDenoiser(velocity, noise_at=declared), shape)
    right = declared == noise_at
    if sign == 1 and right:
        assert text is None
    elif sign == 1:
        assert f": noise_at={noise_at} is likely, if the data have a standard" in text
    else:
        assert ": either minus its output is the velocity, or noise_at=" in text


def test_the_sign_of_a_velocity_shows_whatever_the_size_of_the_data():
    for std in (0.2, 1.0, 3.0):

        def velocity(z, t, std=std):  # of data N(0, std²)
            t = t.to(z.dtype)[:, None]
            return (t - (1 - t) * std**2) * z / ((1 - t) ** 2 * std**2 + t**2)

        assert "minus its output" in warning_of(FlowDenoiser(lambda z, t: -velocity(z, t)), (9, 20))


def test_untrained_networks_and_bad_input():
    x, sigmas = torch.randn(2, 3, 8, 8), [5.0, 1.0]
    with pytest.warns(PredictionWarning, match="unless it is not trained"):
        check_prediction(DiscreteDenoiser(lambda z, t: 0 * z, ALPHAS), x, sigmas)
    with pytest.warns(PredictionWarning, match="another prediction than the velocity"):
        check_prediction(FlowDenoiser(lambda z, t: 0 * z), x, sigmas)
    with pytest.raises(TypeError, match=r"DiscreteDenoiser, VPDenoiser, .* got EDMDenoiser"):
        check_prediction(EDMDenoiser(lambda z, t: z), x, sigmas)
    with pytest.raises(ValueError, match=r"at least 4 to be called noise, got 1"):
        check_prediction(DiscreteDenoiser(lambda z, t: z, ALPHAS), x, [1.0, 0.0])


def test_conditions_reach_the_network():
    seen = []

    def conditional(z, t, cond):
        seen.append(cond)
        return z

    x = torch.randn(2, 3, 8, 8)
    denoiser = DiscreteDenoiser(conditional, ALPHAS)
    check_prediction(denoiser, x, [5.0, 1.0], extra_args={"cond": "a"})
    assert seen == ["a", "a"]
