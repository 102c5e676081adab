"""Classifier-free guidance against two separate calls."""

import pytest
import torch

import odesolvers as ods
from odesolvers.models import ClassifierFreeGuidance, Gaussian


class Conditional(torch.nn.Module):
    """Pulls towards a place that every condition moves; records the batches it is called with."""

    def __init__(self):
        super().__init__()
        self.places = torch.nn.Parameter(torch.linspace(-2, 2, 6).double(), requires_grad=False)
        self.batches = []

    def forward(self, x, sigma, *, label=None, text=None, added=None, bias=0.0):
        self.batches.append(x.shape[0])
        place = torch.full((x.shape[0], 1), bias, dtype=x.dtype, device=x.device)
        if label is not None:
            place = place + self.places[label][:, None]
        if text is not None:
            place = place + text.mean((1, 2))[:, None]
        if added is not None:
            place = place + added["ids"].mean(1, keepdim=True) * added["extra"][0].sum(1)[:, None]
        noise = sigma[:, None] ** 2
        return (0.25 * x + noise * torch.tanh(place + 0.1 * x)) / (0.25 + noise)


def conditions(device):
    """Both branches in every form that a condition comes in."""
    g = torch.Generator().manual_seed(3)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device)

    def label(*values):
        return torch.tensor(values, device=device)

    return {
        "labels": ({"label": label(0, 1, 2)}, {"label": label(5, 5, 5)}),
        "text": ({"text": rand(3, 7, 4)}, {"text": rand(1, 7, 4)}),
        "added": (
            {"added": {"ids": rand(3, 2), "extra": [rand(3, 2)]}},
            {"added": {"ids": rand(1, 2), "extra": [rand(3, 2)]}},
        ),
        "all": (
            {"label": label(0, 1, 2), "text": rand(3, 7, 4), "bias": 0.5},
            {"label": label(4), "text": rand(3, 7, 4), "bias": 0.5},
        ),
    }


def separately(denoiser, scale, x, sigma, positive, negative):
    """The definition, one branch after the other, conditions of one image spelled out."""

    def whole(value):
        if isinstance(value, torch.Tensor):
            return value.repeat(x.shape[0] // value.shape[0], *([1] * (value.ndim - 1)))
        if isinstance(value, dict):
            return {k: whole(v) for k, v in value.items()}
        return [whole(v) for v in value] if isinstance(value, list) else value

    towards, away = denoiser(x, sigma, **whole(positive)), denoiser(x, sigma, **whole(negative))
    return away + scale * (towards - away)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, -1.0])
@pytest.mark.parametrize("form", ["labels", "text", "added", "all"])
def test_equals_two_separate_calls(form, scale, device):
    denoiser = Conditional().to(device)
    positive, negative = conditions(device)[form]
    x = torch.randn(3, 5, dtype=torch.float64, device=device)
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device)
    expected = separately(denoiser, scale, x, sigma, positive, negative)
    denoiser.batches.clear()
    guided = ClassifierFreeGuidance(denoiser, scale)
    found = guided(x, sigma, positive=positive, negative=negative)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert denoiser.batches == ([3] if scale == 1 else [6]), "one call, of one branch at scale 1"


def test_scale_one_needs_no_negative_branch():
    denoiser = Conditional()
    x, sigma = torch.randn(3, 5).double(), torch.ones(3).double()
    positive = {"label": torch.tensor([0, 1, 2])}
    found = ClassifierFreeGuidance(denoiser, 1.0)(x, sigma, positive=positive)
    torch.testing.assert_close(found, denoiser(x, sigma, **positive), rtol=0, atol=0)


def test_shared_arguments_reach_both_branches():
    denoiser = Conditional()
    x, sigma = torch.randn(3, 5).double(), torch.ones(3).double()
    positive, negative = conditions("cpu")["labels"]
    found = ClassifierFreeGuidance(denoiser, 2.0)(
        x, sigma, positive=positive, negative=negative, bias=0.7
    )
    shared = ({**positive, "bias": 0.7}, {**negative, "bias": 0.7})
    torch.testing.assert_close(found, separately(denoiser, 2.0, x, sigma, *shared))


@pytest.mark.parametrize("method", [ods.DDIM(), ods.HeunEDM()])
def test_guided_runs_invert(method):
    positive, negative = conditions("cpu")["all"]
    extra = {"positive": positive, "negative": negative}
    guided = ClassifierFreeGuidance(Conditional(), 3.0)
    sigmas = ods.karras_sigmas(20, 0.02, 20.0, append_zero=False)
    x = torch.randn(3, 5, dtype=torch.float64) * sigmas[0]
    solver = ods.BDIA(method)
    solution = solver.sample(guided, x, sigmas, extra_args=extra)
    unguided = solver.sample(guided.denoiser, x, sigmas, extra_args=positive)
    assert (solution.x - unguided.x).abs().max() > 1e-3, "guidance did nothing"
    assert solution.nfe == unguided.nfe
    back = solver.invert(guided, solution.state, sigmas, extra_args=extra)
    assert ((back.x - x).norm() / x.norm()).item() < 1e-12


def test_a_scale_of_the_call_takes_the_place_of_the_own_one():
    net = Gaussian(0.3, 0.5)
    x, sigma = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0])

    class Labelled(torch.nn.Module):
        def forward(self, x, sigma, label, scale=None):
            assert scale is None or scale == 9  # of the network itself
            return net(x, sigma) * label[:, None]

    branches = {
        "positive": {"label": torch.tensor([1.0, 2.0, 3.0]).double(), "scale": 9},
        "negative": {"label": torch.tensor([0.5, 0.2, 0.1]).double(), "scale": 9},
    }
    guided = ClassifierFreeGuidance(Labelled(), 7.0)
    for scale in (2, 2.5, torch.tensor(2.5), torch.tensor(3), torch.tensor(1.0)):
        own = ClassifierFreeGuidance(Labelled(), float(scale))
        found = guided(x, sigma, scale=scale, **branches)
        assert torch.allclose(found, own(x, sigma, **branches), rtol=1e-14)
    each = guided(x, sigma, scale=torch.tensor([1.0, 2.0, 3.0]), **branches)
    for k in range(3):
        alone = ClassifierFreeGuidance(Labelled(), float(k + 1))(x, sigma, **branches)
        assert torch.allclose(each[k], alone[k], rtol=1e-14)
    assert guided(x, sigma, scale=1, positive=branches["positive"]).shape == x.shape
    for scale, message in (
        (torch.ones(2), r"tensor \(\) or \(3,\), one for each state, got torch.float32 \(2,\)"),
        (torch.ones(3, 1), r"got torch.float32 \(3, 1\)"),
        (torch.tensor(True), "got torch.bool"),
        (torch.tensor(float("nan")), "scale must be finite, got nan"),
        (float("inf"), "scale must be a finite number, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            guided(x, sigma, scale=scale, **branches)
    with pytest.raises(ValueError, match="guidance by a tensor needs the negative branch"):
        guided(x, sigma, scale=torch.tensor(1.0), positive=branches["positive"])


def test_never_applied_twice():
    guided = ClassifierFreeGuidance(Gaussian(), 3.0)
    with pytest.raises(TypeError, match="guided already"):
        ClassifierFreeGuidance(guided, 2.0)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "7", None, True])
def test_bad_scale(scale):
    with pytest.raises((TypeError, ValueError), match="scale must be a"):
        ClassifierFreeGuidance(Gaussian(), scale)


def test_bad_denoiser():
    with pytest.raises(TypeError, match="must be callable, got str"):
        ClassifierFreeGuidance("model", 2.0)


@pytest.mark.parametrize(
    ("branches", "error", "message"),
    [
        ({}, ValueError, "needs the positive branch"),
        ({"positive": {}}, ValueError, "needs the negative branch"),
        ({"positive": torch.zeros(3), "negative": {}}, TypeError, "positive must be a mapping"),
        (
            {"positive": {"label": torch.tensor([0, 1, 2])}, "negative": {"label": None}},
            TypeError,
            "label is NoneType and Tensor",
        ),
        (
            {"positive": {"label": torch.tensor([0, 1, 2])}, "negative": {}},
            ValueError,
            "the same keys",
        ),
        (
            {
                "positive": {"label": torch.zeros(2).long()},
                "negative": {"label": torch.zeros(3).long()},
            },
            ValueError,
            r"label must have the batch of x, 3, or 1 .* got shape \(2,\)",
        ),
        (
            {
                "positive": {"text": torch.zeros(3, 4, 2)},
                "negative": {"text": torch.zeros(3, 5, 2)},
            },
            ValueError,
            r"text must have one form .* \(3, 5, 2\) .* \(3, 4, 2\): pad the shorter prompt",
        ),
        (
            {
                "positive": {"text": torch.zeros(3, 4, 2).half()},
                "negative": {"text": torch.zeros(3, 4, 2)},
            },
            ValueError,
            "convert one to the dtype of the other",
        ),
        (
            {
                "positive": {"added": {"ids": torch.zeros(3)}},
                "negative": {"added": {"extra": torch.zeros(3)}},
            },
            ValueError,
            "added must have the same keys",
        ),
        (
            {"positive": {"bias": 0.5}, "negative": {"bias": 0.0}},
            ValueError,
            "only tensors can differ",
        ),
    ],
)
def test_bad_branches(branches, error, message):
    guided = ClassifierFreeGuidance(Conditional(), 2.0)
    with pytest.raises(error, match=message):
        guided(torch.zeros(3, 5).double(), torch.ones(3).double(), **branches)


# Conditions without a batch


def positioned(x, sigma, *, text, ids, added=None):
    """Depends on positions that all images share, as FLUX does; 5 positions for states of length 5."""
    assert ids.shape == (5, 2)
    extra = 0 if added is None else added["grid"].mean()
    return torch.tanh(x + text.mean((1, 2))[:, None] + ids.sum(1) + extra)


@pytest.mark.parametrize("n", [2, 5])  # 5 is also the number of positions
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("where", ["both", "branches"])
def test_conditions_without_a_batch(n, scale, where):
    g = torch.Generator().manual_seed(3)
    x, ids = torch.randn(n, 5, generator=g), torch.randn(5, 2, generator=g)
    sigma = torch.ones(n)
    text = [torch.randn(n, 7, 4, generator=g) for _ in range(2)]
    rest = {"ids": ids, "added": {"grid": torch.randn(3, 3, generator=g)}}
    away, towards = (positioned(x, sigma, text=t, **rest) for t in text)
    guided = ClassifierFreeGuidance(positioned, scale, shared=["ids", "added.grid"])
    copies = [{"ids": ids.clone(), "added": {"grid": rest["added"]["grid"].clone()}} for _ in text]
    branches = copies if where == "branches" else [{}, {}]
    extra = rest if where == "both" else {}
    found = guided(
        x,
        sigma,
        positive={"text": text[1], **branches[1]},
        negative={"text": text[0], **branches[0]},
        **extra,
    )
    torch.testing.assert_close(found, away + scale * (towards - away))


def test_shared_conditions_that_are_not_shared():
    x, sigma, ids = torch.zeros(2, 5), torch.ones(2), torch.zeros(5, 2)
    branch = {"text": torch.zeros(2, 7, 4), "ids": ids}
    guided = ClassifierFreeGuidance(positioned, 3.0, shared=("ids",))
    for other in (ids + 1, ids.double(), torch.zeros(4, 2), None, [ids]):
        with pytest.raises(
            ValueError, match="ids is shared by both branches, but is given with two"
        ):
            guided(x, sigma, positive=branch, negative={**branch, "ids": other})
    with pytest.raises(ValueError, match=r"ids must have the batch .* shared=\['ids'\]"):
        ClassifierFreeGuidance(positioned, 3.0)(x, sigma, positive=branch, negative=branch)
    for bad in ("ids", [3], [None]):
        with pytest.raises(TypeError, match="shared must be a list of names of conditions"):
            ClassifierFreeGuidance(positioned, 3.0, shared=bad)
