"""The scheduler by itself: settings of diffusers, solvers, levels, state and refusals."""

import copy
import pickle

import pytest
import torch

from odesolvers import EDICT, InversionWarning, State, parse
from odesolvers.grids import Grid
from odesolvers.models.schedules import schedule_of
from odesolvers.schedulers import InvertibleScheduler
from odesolvers.stepwise import Route

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:the code of a lone image")

Z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SOLVER = "BDIA(DDIM(), gamma=DampedStepRatio())"
SOLVERS = (
    SOLVER,
    "BDIA(HeunEDM(), gamma=HeunStepRatio())",
    "BDIA(RK3(), gamma=StepRatio(), arithmetic=FixedPoint())",
    "BDIA(Midpoint(), gamma=StepRatio())",
    "EDICT(arithmetic=FixedPoint())",
    "McCallumFoster(HeunEDM())",
    "Rex(Euler(), arithmetic=FixedPoint())",
    "ReversibleHeun()",
    "ReversibleHeun(FixedPoint())",
)


def network(z, t):
    """Any function of latents and noise input."""
    return torch.tanh(1.3 * z.flip(-1) + 1e-3 * torch.as_tensor(t, dtype=torch.float32)).to(z.dtype)


def drive(scheduler, latents, n=None, edit=lambda k, z: z, **levels):
    """What a pipeline does with a scheduler."""
    scheduler.set_timesteps(n, **levels)
    for k, t in enumerate(scheduler.timesteps):
        z = latents
        if hasattr(scheduler, "scale_model_input"):
            z = scheduler.scale_model_input(latents, t)
        latents = edit(k, scheduler.step(network(z, t), t, latents, return_dict=False)[0])
    return latents


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def both(scheduler, solver="Euler()", **levels):
    """The results of a scheduler of diffusers, and of a solver in its place, from the same noise."""
    noise = Z.double()  # from a level of 4096, networks in float32 differ by their own rounding
    mine = drive(InvertibleScheduler.from_config(scheduler.config, solver=solver), noise, **levels)
    scheduler.set_timesteps(levels.get("n"), **{k: v for k, v in levels.items() if k != "n"})
    if hasattr(scheduler, "sigmas") and hasattr(
        scheduler, "init_noise_sigma"
    ):  # states, not latents
        noise = noise * float(scheduler.sigmas[0] ** 2 + 1) ** 0.5
    theirs = drive(scheduler, noise, **levels)
    return mine, theirs / float(getattr(scheduler, "sigmas", [0.0])[-1] ** 2 + 1) ** 0.5


@pytest.mark.parametrize(
    ("name", "settings", "levels"),
    [
        ("DDIM", {"timestep_spacing": "leading", "steps_offset": 1}, {"n": 7}),
        ("DDIM", {"timestep_spacing": "trailing"}, {"n": 8}),
        (
            "DDIM",
            {"set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "sample"},
            {"n": 5},
        ),
        ("DDIM", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {"n": 5}),
        ("EulerDiscrete", {"timestep_spacing": "linspace"}, {"n": 7}),
        ("EulerDiscrete", {"timestep_spacing": "trailing"}, {"n": 7}),
        ("EulerDiscrete", {"final_sigmas_type": "sigma_min"}, {"n": 7}),
        ("EulerDiscrete", {"use_karras_sigmas": True}, {"n": 7}),
        ("EulerDiscrete", {"use_exponential_sigmas": True}, {"n": 7}),
        (
            "EulerDiscrete",
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"n": 7},
        ),
        ("EulerDiscrete", {"prediction_type": "sample"}, {"n": 7}),
        ("EulerDiscrete", {}, {"timesteps": [999, 700, 300, 50]}),
        ("EulerDiscrete", {}, {"sigmas": [14.0, 5.0, 1.0, 0.1, 0.0]}),
        (
            "EulerDiscrete",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            {"n": 6},
        ),
        ("EDMEuler", {}, {"n": 6}),
        (
            "EDMEuler",
            {"sigma_schedule": "exponential", "prediction_type": "v_prediction"},
            {"n": 6},
        ),
        ("FlowMatchEulerDiscrete", {"shift": 3.0}, {"n": 6}),
        ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, {"n": 6, "mu": 0.8}),
        ("FlowMatchEulerDiscrete", {"use_karras_sigmas": True}, {"n": 6}),
        ("FlowMatchEulerDiscrete", {"shift_terminal": 0.1}, {"n": 6}),
        ("FlowMatchEulerDiscrete", {"shift": 3.0}, {"sigmas": [1.0, 0.6, 0.2]}),
        ("FlowMatchEulerDiscrete", {}, {"timesteps": [900.0, 500.0, 100.0]}),
    ],
)
def test_eulers_method_is_that_of_diffusers_under_every_setting(diffusers, name, settings, levels):
    kind = getattr(diffusers, f"{name}Scheduler")
    fixed = {"clip_sample": False} if name == "DDIM" else {}
    vp = SD if name in ("DDIM", "EulerDiscrete") else {}
    mine, theirs = both(kind(**vp, **fixed, **settings), **levels)
    assert relative(mine, theirs) < 1e-5


@pytest.mark.parametrize("name", ["HeunDiscrete", "FlowMatchHeunDiscrete"])
def test_heuns_method_is_that_of_diffusers(diffusers, name):
    flow = name.startswith("Flow")
    scheduler = getattr(diffusers, f"{name}Scheduler")(**({} if flow else SD))
    if flow:
        mine, theirs = both(scheduler, "Exponential(HeunEDM())", n=6)
        assert mine.shape == theirs.shape  # theirs averages velocities, which no method here does
    else:
        mine, theirs = both(scheduler, "HeunEDM()", n=6)
        assert relative(mine, theirs) < 1e-4


@pytest.mark.parametrize(
    ("config", "levels"),
    [({"timesteps": [951, 601, 201]}, (951, 601, 201)), ({"sigmas": [9.0, 2.0, 0.0]}, None)],
)
def test_levels_are_given_where_ddim_reads_none(config, levels):
    scheduler = InvertibleScheduler(**SD)
    scheduler.set_timesteps(**config)
    if levels:
        assert tuple(scheduler.timesteps.tolist()) == levels
    else:
        assert scheduler.sigmas.tolist() == config["sigmas"]


def denoiser(scheduler):
    """The network as a denoiser of the package."""
    schedule = schedule_of(scheduler._base)
    return lambda x, sigma: schedule.denoise(lambda z, t: network(z, t[0]), x, sigma)


@pytest.mark.parametrize("text", SOLVERS)
def test_every_solver_is_its_own_run_and_comes_back(text):
    scheduler = InvertibleScheduler(text, **SD, steps_offset=1)
    z = Z.double()
    picture = drive(scheduler, z, 5)
    end = scheduler.state
    own = parse(text).sample(denoiser(scheduler), z / scheduler._scale(end.sigmas[0]), end.sigmas)
    assert relative(picture, own.x * scheduler._scale(end.sigmas[-1])) < 1e-7
    assert relative(end.partner.double(), own.state.partner.double()) < 1e-7
    up = scheduler.inverse()
    again = drive(up, picture, 5)
    assert relative(again, z) < 1e-9
    assert up.timesteps.tolist()[-1] < scheduler.timesteps.tolist()[0] + 1
    lone = InvertibleScheduler(text, **SD, steps_offset=1, inverted=True)
    code = drive(lone, picture, 5)
    if "FixedPoint" in text:
        assert torch.equal(drive(lone.inverse(), code, 5), drive(lone.inverse(), code, 5))
    assert relative(drive(lone.inverse(), code, 5), picture) < 1e-9


@pytest.mark.parametrize("text", SOLVERS)
def test_a_route_asks_for_the_evaluations_of_a_run_and_at_most_one_more(text):
    solver, grid = parse(text), Grid((10.0, 4.0, 1.0, 0.3, 0.0))
    seen = []

    def denoise(x, sigma):
        seen.append(round(float(sigma[0]), 6))
        return 0.5 * x

    x = 10 * Z.double()
    solver.sample(denoise, x, grid)
    listed = [round(sigma, 6) for sigma in Route.of(solver, grid, 0, up=False).sigmas]
    assert listed[solver.coupled :] == seen
    seen.clear()
    solver.invert(denoise, x / 100, grid)
    listed = [round(sigma, 6) for sigma in Route.of(solver, grid, 4, up=True).sigmas]
    assert listed[solver.coupled :] == seen


def test_a_run_starts_afresh():
    scheduler = InvertibleScheduler(**SD)
    first = drive(scheduler, Z, 6)
    assert torch.equal(drive(scheduler, Z, 6), first)
    up = scheduler.inverse()
    assert torch.equal(drive(up, first, 6), drive(up, first, 6))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("text", [SOLVERS[1], SOLVERS[4]])
def test_copies_in_the_middle_of_a_run_go_on_alike(copied, text):
    scheduler = InvertibleScheduler(text, **SD)
    scheduler.set_timesteps(4)
    z, held = Z, []
    for t in scheduler.timesteps:
        held.append((copied(scheduler), z))
        z = scheduler.step(network(z, t), t, z).prev_sample
    for k, (twin, latents) in enumerate(held):
        for t in twin.timesteps[k:]:
            latents = twin.step(network(latents, t), t, latents).prev_sample
        assert torch.equal(latents, z)


def test_pairs_are_saved_and_continued(tmp_path):
    scheduler = InvertibleScheduler(**SD)
    picture = drive(scheduler, Z, 6)
    scheduler.state.save(tmp_path / "pair.safetensors")
    up = InvertibleScheduler(**SD, inverted=True)
    up.start = State.load(tmp_path / "pair.safetensors")
    assert relative(drive(up, picture, 6), Z) < 1e-7


def test_an_edit_goes_on_from_a_fork_in_fixed_point():
    text = "BDIA(DDIM(), gamma=DampedStepRatio(), arithmetic=FixedPoint())"
    up = InvertibleScheduler(text, **SD, inverted=True)
    code = drive(up, 0.1 * Z, 6)
    down = up.inverse()
    down.start = down.start.fork()
    down.set_timesteps(6)
    latents = code
    for t in down.timesteps:
        latents = down.step(0.5 * network(latents, t), t, latents).prev_sample
    assert relative(latents, 0.1 * Z) > 1e-3


def test_other_latents_begin_alone_and_are_warned_of():
    scheduler = InvertibleScheduler(**SD)
    picture = drive(scheduler, Z, 6)
    up, lone = scheduler.inverse(), InvertibleScheduler(**SD, inverted=True)
    with pytest.warns(InversionWarning, match="not of the pair"):
        code = drive(up, 0.9 * picture, 6)
    assert torch.equal(code, drive(lone, 0.9 * picture, 6))
    up.start = None
    assert torch.equal(code, drive(up, 0.9 * picture, 6))  # and no warning


@pytest.mark.parametrize("arithmetic", ["FloatingPoint()", "FixedPoint()"])
def test_changed_latents_are_the_state_from_there_on(arithmetic):
    text = f"BDIA(DDIM(), gamma=DampedStepRatio(), arithmetic={arithmetic})"
    plain = drive(InvertibleScheduler(text, **SD), Z, 6)
    same = drive(InvertibleScheduler(text, **SD), Z, 6, edit=lambda k, z: z.clone())
    assert torch.equal(same, plain)
    seen = []

    def edit(k, z):
        seen.append(0.7 * z if k == 2 else z)
        return seen[-1]

    scheduler = InvertibleScheduler(text, **SD)
    edited = drive(scheduler, Z, 6, edit=edit)
    assert relative(edited, plain) > 1e-2
    up = scheduler.inverse()
    up.set_timesteps(6)
    z = edited
    for t in up.timesteps[:-2]:  # back to the edit
        z = up.step(network(z, t), t, z).prev_sample
    assert up.state.index == 3
    back = up.solver.arithmetic.load(up.state.current, torch.float64)
    assert relative(back * up._scale(up.state.sigmas[3]), seen[2]) < 1e-7
    for t in up.timesteps[-2:]:  # and beyond it, to noise that the run did not begin with
        z = up.step(network(z, t), t, z).prev_sample
    assert relative(z, Z) > 1e-2

    def write(k, z):
        return z.mul_(0.7) if k == 2 else z

    for mode in (torch.no_grad, torch.inference_mode):  # which does not count the writes
        with mode():
            assert torch.equal(drive(InvertibleScheduler(text, **SD), Z, 6, edit=write), edited)
    with pytest.raises(ValueError, match="two states"):
        drive(InvertibleScheduler(EDICT(), **SD), Z, 6, edit=lambda k, z: 0.7 * z if k == 2 else z)


def test_settings_of_other_schedulers_are_read_and_kept(diffusers, tmp_path):
    euler = diffusers.EulerDiscreteScheduler(**SD, use_karras_sigmas=True)
    scheduler = InvertibleScheduler.from_config(euler.config, solver=parse(SOLVER))
    assert scheduler.config.base == "EulerDiscreteScheduler"
    assert scheduler.config.solver == SOLVER
    back = diffusers.EulerDiscreteScheduler.from_config(scheduler.config)
    assert back.config.use_karras_sigmas
    heun = diffusers.HeunDiscreteScheduler.from_config(scheduler.config)
    again = InvertibleScheduler.from_config(heun.config, state_dtype="float32")
    assert again.config.base == "HeunDiscreteScheduler"
    assert again.config.use_karras_sigmas
    scheduler.save_pretrained(tmp_path)
    loaded = InvertibleScheduler.from_pretrained(tmp_path, timestep_spacing="trailing")
    assert loaded.solver == scheduler.solver
    assert loaded.config.timestep_spacing == "trailing"
    made, unused = InvertibleScheduler.from_config(euler.config, return_unused_kwargs=True, foo=1)
    assert isinstance(made, InvertibleScheduler)
    assert unused["foo"] == 1


def test_noise_is_added_as_diffusers_does(diffusers):
    ddim, flow = diffusers.DDIMScheduler(**SD), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for theirs in (ddim, flow):
        theirs.set_timesteps(6)
        mine = InvertibleScheduler.from_config(theirs.config)
        mine.set_timesteps(6)
        t, noise = mine.timesteps[[1, 4]], Z.flip(0)
        expected = (
            theirs.add_noise(Z, noise, t) if theirs is ddim else theirs.scale_noise(Z, t, noise)
        )
        assert relative(mine.add_noise(Z, noise, t), expected) < 1e-6
        assert torch.equal(mine.scale_noise(Z, t, noise), mine.add_noise(Z, noise, t))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda s: InvertibleScheduler("DDIM()", **SD).inverse(), "wrap it as BDIA"),
        (
            lambda s: InvertibleScheduler("FixedPointInversion(DDIM())", **SD).inverse(),
            "by iteration",
        ),
        (lambda s: InvertibleScheduler("DDIM(", **SD), "is not an expression"),
        (lambda s: InvertibleScheduler("FixedPoint()", **SD), "solver must be one"),
        (lambda s: InvertibleScheduler(base="Foo"), "base must be"),
        (lambda s: InvertibleScheduler(state_dtype="float16"), "state_dtype must be"),
        (
            lambda s: InvertibleScheduler.from_config({"_class_name": "VQDiffusion"}),
            "base must",
        ),
        (lambda s: InvertibleScheduler(**SD).step(Z, 1, Z), "set_timesteps first"),
        (lambda s: s.step(Z, 17, Z), "17 is not one of scheduler.timesteps, 800 to 0"),
        (lambda s: s.step(torch.cat([Z, Z], 1), s.timesteps[0], Z), "learned variance"),
        (lambda s: [s.step(Z, t, Z) for t in (*s.timesteps, 0)], "the run is over"),
        (lambda s: s.step(Z, s.timesteps[0], Z * torch.nan), "not finite"),
        (
            lambda s: [drive(s, Z, 5), drive(s.inverse(), Z, 6)],
            "another grid.*scheduler.start = None",
        ),
    ],
)
def test_refusals_say_what_to_do(act, words):
    scheduler = InvertibleScheduler(**SD)
    scheduler.set_timesteps(5)
    with pytest.raises((TypeError, ValueError), match=words):
        act(scheduler)


@pytest.mark.parametrize("told", [True, False])
def test_a_run_begins_in_the_middle_where_its_solver_can(told):
    able = ("DDIM()", SOLVER, "BDIA(HeunEDM(), gamma=HeunStepRatio())")
    for text in (*able, "Rex(Euler())", "McCallumFoster(DDIM())"):
        scheduler = InvertibleScheduler(text, **SD, steps_offset=1)
        scheduler.set_timesteps(5)
        begin = 2 * scheduler.order
        if told:
            scheduler.set_begin_index(begin)
        z = Z.double()
        for t in scheduler.timesteps[begin:]:
            z = scheduler.step(network(z, t), t, z).prev_sample
        levels = scheduler.state.sigmas
        start = Z.double() / scheduler._scale(levels[2])
        own = parse(text).sample(denoiser(scheduler), start, levels[2:]).x
        assert relative(z, own * scheduler._scale(levels[-1])) < 1e-7
    scheduler = InvertibleScheduler(EDICT(), **SD)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    with pytest.raises(ValueError, match="begins at evaluation 2"):
        scheduler.step(Z, scheduler.timesteps[2], Z)


def test_outputs_that_are_not_finite_are_reported():
    for text in (SOLVER, "BDIA(DDIM(), gamma=DampedStepRatio(), arithmetic=FixedPoint())"):
        scheduler = InvertibleScheduler(text, **SD)
        scheduler.set_timesteps(4)
        with pytest.raises(FloatingPointError, match="not finite"):
            [scheduler.step(Z * torch.nan, t, Z) for t in scheduler.timesteps]
