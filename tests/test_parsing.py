"""Solvers by name: `parse` reads every `repr` back, and nothing else runs."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
from hypothesis import given, strategies as st

import odesolvers
from odesolvers import (
    BDIA,
    BELM,
    DDIM,
    EDICT,
    EES25,
    MALI,
    RK3,
    RK4,
    Calibrated,
    ConstantGamma,
    DampedStepRatio,
    DDIMInversion,
    Dopri5,
    DPMSolverPP2S,
    Euler,
    Exponential,
    FixedPoint,
    FixedPointInversion,
    FloatingPoint,
    FlowEuler,
    HeunEDM,
    HeunStepRatio,
    McCallumFoster,
    Midpoint,
    PerStep,
    ReverseStepInversion,
    ReversibleHeun,
    Rex,
    SmoothedOutput,
    StepRatio,
    order_gaining,
    parse,
)

shares = st.floats(0, 1, exclude_min=True)
sizes = st.floats(-1e300, 1e300)
methods = st.recursive(
    st.one_of(
        st.sampled_from([Euler(), DDIM(), FlowEuler(), RK3(), RK4(), Dopri5(), EES25()]),
        st.sampled_from(["ahead", "behind", "both"]).map(HeunEDM),
        st.sampled_from(["ahead", "both"]).map(Midpoint),
        st.sampled_from(["ahead", "both"]).map(DPMSolverPP2S),
    ),
    lambda inner: inner.map(Exponential),
    max_leaves=3,
)
rules = st.recursive(
    st.one_of(
        shares.map(ConstantGamma),
        st.builds(StepRatio, sizes, shares),
        st.just(HeunStepRatio()),
        st.builds(DampedStepRatio, st.floats(1e-300, 1e300), st.floats(0, 1e300)),
        st.lists(st.floats(0, 1e300), max_size=5).map(PerStep),
    ),
    lambda inner: inner.map(SmoothedOutput),
    max_leaves=3,
)
arithmetics = st.one_of(st.just(FloatingPoint()), st.integers(8, 53).map(FixedPoint))
solvers = st.one_of(
    methods,
    st.builds(BDIA, methods, st.one_of(shares, rules), arithmetics),
    st.builds(BELM, st.one_of(st.none(), st.lists(st.floats(0, 1e300), max_size=5)), arithmetics),
    st.builds(EDICT, shares, arithmetics),
    st.builds(McCallumFoster, methods, shares, arithmetics),
    st.builds(Rex, methods, shares, arithmetics),
    st.builds(ReversibleHeun, arithmetics),
    st.builds(MALI, st.floats(0.5, 1, exclude_min=True), arithmetics),
    st.builds(DDIMInversion, methods),
    st.builds(ReverseStepInversion, methods),
    st.builds(
        FixedPointInversion,
        methods,
        st.floats(1e-300, 0.99),
        st.integers(1, 10**30),
        st.integers(0, 10**30),
    ),
)


@given(st.one_of(solvers, rules, arithmetics))
def test_what_repr_writes_parse_reads(value: Any) -> None:
    again = parse(repr(value))
    assert again == value
    assert type(again) is type(value)
    assert hash(again) == hash(value)
    assert repr(again) == repr(value)


@given(solvers)
def test_an_expression_names_public_things_only(solver: Any) -> None:
    """Python itself reads it back, with the names of `odesolvers` and nothing else."""
    assert eval(repr(solver), {**vars(odesolvers), "__builtins__": {}}) == solver


def test_learned_weights_are_read_back() -> None:
    rule = Calibrated("Euler()", (3.0, 2.0, 1.0, 0.0), (0.1, 1 / 3))
    assert parse(repr(BDIA(Euler(), rule))) == BDIA(Euler(), rule)


@pytest.mark.parametrize(
    ("text", "solver"),
    [
        ("BDIA(Euler())", BDIA(Euler())),
        (" BDIA( HeunEDM( ),gamma = StepRatio(2) ) \n", BDIA(HeunEDM(), gamma=StepRatio(2))),
        ("BDIA(approximator=DDIM(), gamma=0.9)", BDIA(DDIM(), 0.9)),
        ("BDIA(RK3(), order_gaining(RK3()))", BDIA(RK3(), order_gaining(RK3()))),
        ("BELM()", BELM()),
        ("Rex(RK4(), .9)", Rex(RK4(), 0.9)),
        ("BDIA(Euler(), PerStep([1, 0.5]))", BDIA(Euler(), PerStep((1.0, 0.5)))),
        ("StepRatio(-1)", StepRatio(-1)),
        ("EDICT(arithmetic=FixedPoint(32))", EDICT(arithmetic=FixedPoint(32))),
    ],
)
def test_it_reads_calls_as_python_does(text: str, solver: object) -> None:
    assert parse(text) == solver


def refusal(text: str) -> str:
    """The message of the ValueError for `text`, which is never long and never a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as caught:
            parse(text)
    assert len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "word", "guess"),
    [
        ("BDIA(Eulr())", "Eulr", "Euler"),
        ("Heun()", "Heun", None),
        ("bdia", "bdia", None),
        ("BDIA(Euler(), gamma=StepRatios(2))", "StepRatios", "StepRatio"),
        ("__import__('os')", "__import__", None),
        ("eval('1')", "eval", None),
        ("torch", "torch", None),
        ("State(1, 2)", "State", None),
        ("karras_sigmas(5)", "karras_sigmas", None),
    ],
)
def test_an_unknown_word_is_named_beside_the_known_ones(
    text: str, word: str, guess: str | None
) -> None:
    message = refusal(text)
    assert f"there is no {word!r}" in message
    assert all(name in message for name in ("BDIA", "Euler", "StepRatio", "FixedPoint"))
    if guess is not None:
        assert f"did you mean {guess!r}?" in message


def test_a_setting_that_there_is_not_is_named_beside_those_there_are() -> None:
    message = refusal("BDIA(Euler(), gama=0.9)")
    assert "BDIA has no setting 'gama'; did you mean 'gamma'?" in message
    assert "approximator, arithmetic, gamma" in message
    assert "BELM has no setting 'b'. Known: a2, arithmetic" in refusal("BELM(b=1)")
    assert "Euler has no setting 'order'. Known: none" in refusal("Euler(order=2)")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("EDICT(p=2)", "p must be in (0, 1], got 2"),
        ("EDICT(p='0.5')", "p must be a number"),
        ("EDICT(p=None)", "p must be a number"),
        ("EDICT(p=1e999)", "got inf"),
        ("BDIA()", "missing 1 required"),
        ("BDIA(Euler(), Euler())", "gamma must be a number"),
        ("BDIA(0.5)", "wraps an IntegrationApproximator"),
        ("BDIA(Euler(), 1, 2, 3)", "positional arguments"),
        ("BDIA(Euler(), approximator=Euler())", "multiple values"),
        ("HeunEDM('left')", "second must be"),
        ("FixedPoint(7)", "integer from 8 to 53"),
        ("order_gaining(HeunEDM())", "even order 2"),
        ("PerStep(5)", "one weight for every step"),
        (f"PerStep(({'9' * 400},))", "must be finite"),
        (f"FixedPoint({'9' * 4000})", "integer from 8 to 53"),
        (f"BDIA(Euler(), Calibrated('{'x' * 9000}', (2, 1, 0), (0.5,)))", "calibrated for xxx"),
    ],
)
def test_what_a_constructor_refuses_is_told_with_its_reason(text: str, reason: str) -> None:
    message = refusal(text)
    assert "is refused: " in message
    assert reason in message


@pytest.mark.parametrize(
    "text",
    [
        # Attributes, and calls of what is no name.
        "Euler.order",
        "Euler().sample",
        "().__class__.__bases__[0].__subclasses__()",
        "Euler()()",
        "(lambda: Euler())()",
        "odesolvers.Euler()",
        # Expressions that would have to be run.
        "1 + 1",
        "StepRatio(1 + 1)",
        "StepRatio(~1)",
        "StepRatio(-True)",
        "StepRatio(-'a')",
        "not True",
        "1 < 2",
        "Euler() if True else DDIM()",
        "Euler() or DDIM()",
        "[Euler() for _ in (1, 2)]",
        "(Euler() for _ in (1, 2))",
        "{'a': 1 for _ in (1, 2)}",
        "lambda: Euler()",
        "PerStep((1, 2)[0:1])",
        "StepRatio(power := 2)",
        "(yield)",
        "(await Euler())",
        # Strings that hold expressions, and other literals.
        "f'{Euler()}'",
        "HeunEDM(f'{1}')",
        "b'a'",
        "StepRatio(1j)",
        "StepRatio(...)",
        "PerStep({1, 2})",
        "PerStep({})",
        # Arguments that are unpacked or given twice.
        "BDIA(*(Euler(),))",
        "BDIA(**{})",
        "EDICT(p=0.5, p=0.6)",
        # A constructor that is not called.
        "BDIA(Euler)",
        # Literals alone, which name nothing.
        "5",
        "None",
        "'BDIA(Euler())'",
        "(Euler(), DDIM())",
        # No single expression.
        "",
        "  \n ",
        "#",
        "Euler(",
        "Euler(); DDIM()",
        "import os",
        "x = Euler()",
        "Euler()\nDDIM()",
        "Euler\0()",
        "\ud800",
        "'\\d'",
        "1if 1 else 2",
        # Too long, too deep, too large.
        "(" * 5000,
        "[" * 5000 + "]" * 5000,
        "Exponential(" * 3000 + "Euler()" + ")" * 3000,
        "-" * 90_000 + "1",
        "1" + "+1" * 40_000,
        "a." * 40_000 + "a",
        "9" * 90_000,
        "a" * 90_000 + "()",
        "Euler(" + "1, " * 20_000 + ")",
        "Euler(" + "a" * 90_000 + "=1)",
        "-" * 900_000 + "1",
        "1" + "+1" * 400_000,
        "a." * 400_000 + "a",
        "a" * 1_100_000,
    ],
    ids=lambda text: repr(text[:30]),
)
def test_everything_else_is_refused(text: str) -> None:
    refusal(text)


def test_rules_of_long_grids_are_read() -> None:
    for rule in (
        PerStep(tuple(1 / (3 + i) for i in range(9999))),
        Calibrated("Euler()", tuple(3000.0 / 7 - i / 7 for i in range(3000)), (1 / 3,) * 2998),
    ):
        assert len(repr(rule)) > 100_000
        assert parse(repr(rule)) == rule


def test_a_constructor_that_is_not_called_is_told_how() -> None:
    assert refusal("BDIA(Euler)").endswith("write Euler()")


@pytest.mark.parametrize("value", [None, 5, b"Euler()", Euler(), ["Euler()"]])
def test_a_name_is_a_string(value: Any) -> None:
    with pytest.raises(TypeError, match="a solver is named by a string, got"):
        parse(value)


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")  # Python's own
@given(st.text(alphabet="BDIAEuler()StepRatio=,.-'0123456789 *[]{}:\\\n_", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    message = ""
    try:
        parse(text)
    except ValueError as error:
        message = str(error)
    assert len(message) < 700


def test_constructors_of_your_own_are_known_by_their_names() -> None:
    class Mine:
        def __init__(self, size: float = 1.0, **others: float) -> None:
            self.size, self.others = size, others

    known = {"Mine": Mine}
    assert parse("Mine(2)", known).size == 2
    assert parse("Mine(other=3)", known).others == {"other": 3}
    with pytest.raises(ValueError, match=r"no 'Mne' .* did you mean 'Mine'\?"):
        parse("Mne()", known)
    with pytest.raises(ValueError, match="there is no 'Mine'"):
        parse("Mine(2)")


def test_errors_of_other_kinds_are_the_constructors_own() -> None:
    """A file that is not there is no fault of the expression."""
    with pytest.raises(FileNotFoundError):
        parse("load('/nowhere/rule.json')", {"load": Calibrated.load})


def test_a_number_keeps_its_value() -> None:
    for value in (0.1, 1e-300, 1e300, 2**53 + 1, -0.0, math.pi, 5e-324):
        assert parse(repr(StepRatio(value))).power == float(value)
