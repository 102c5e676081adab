"""The scheduler: a solver to which the pipeline hands the outputs of its network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

from odesolvers.models.base import append_dims
from odesolvers.models.flow import flow_times_of
from odesolvers.models.schedules import DISCRETE, EDM, FLOW, EDMSchedule, FlowSchedule, schedule_of

from ..checks import OVERFLOW, check_choice, check_is, check_origin, is_finite, place, version
from ..parsing import parse
from ..run import Run
from ..solver import Solver
from ..state import State
from ..stepwise import Outputs, Route, check_invertible
from ..trust import SAMPLING_LIMIT, warn_before_inverting, warn_of_samples
from .configs import OWN, read_config
from .levels import calls_at, grid_of, latent_scale
from .places import Place, warn_of_added_noise, warn_of_another_pair, warn_of_size


class InvertibleScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Any explicit solver of this package as a scheduler of diffusers, in either direction.

        pipe.scheduler = InvertibleScheduler.from_config(pipe.scheduler.config, solver=BDIA(DDIM()))
        latents = pipe(prompt, latents=noise, output_type="latent").images
        pipe.scheduler = pipe.scheduler.inverse()
        noise = pipe(prompt, latents=latents, output_type="latent").images

    The scheduler that the pipeline had says how its network is trained and which levels it visits. Each
    evaluation of the solver is a step of the pipeline, with a timestep of its own in `timesteps`.

    Latents are those of diffusers' `DDIMScheduler`, ``z = x / sqrt(1 + σ²)``, and for flow matching
    ``z = x / (1 + σ)``, so that noise is standard normal. The state is kept here, in `state_dtype`; the
    pipeline gets a copy in its own dtype. If it comes back changed, as inpainting and callbacks do, the
    latents that came are the state from there on.

    Args:
        solver: a solver, or its `repr`, which is what the config holds.
        base: the name of the scheduler class of diffusers that the other settings are for.
        inverted: go from data to noise.
        state_dtype: "float64" or "float32", which is used on devices without float64 in any case.
        settings: of the base class. Clipping and thresholding are not applied: they cannot be undone.

    Attributes:
        solver: the solver.
        start: the pair from which runs begin if their latents are of that pair; None for none. A run
            from other latents begins with a lone tensor, see `Solver.invert`.
        timesteps: the network's noise input at each evaluation.
        sigmas: the levels of the evaluations, and the last level of the run, in float64; under flow
            matching flow times.
        order: evaluations of a step.

    Raises:
        TypeError, ValueError: at construction, if a setting is not usable, or the base class is not
            known to say how a network is trained.
    """

    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers]  # noqa: RUF012
    init_noise_sigma = 1.0
    order = 1

    def __init__(
        self,
        solver: str | Solver = "BDIA(DDIM(), gamma=DampedStepRatio())",
        base: str = "DDIMScheduler",
        inverted: bool = False,
        state_dtype: str = "float64",
        **settings: Any,
    ) -> None:
        check_choice("state_dtype", state_dtype, "float64", "float32")
        check_choice("base", base, *DISCRETE, *EDM, *FLOW)
        if isinstance(solver, type):
            raise TypeError(
                f"solver is the class {solver.__name__}: write {solver.__name__}(), with its arguments"
            )
        text = solver if isinstance(solver, str) else repr(solver)
        self.solver: Solver = parse(text)
        check_is(self.solver, Solver, "solver must be one such as BDIA(DDIM()), or its repr")
        if inverted:
            check_invertible(self.solver)
        base = base.replace("Inverse", "")  # whose levels rise, for the same network
        self._base = getattr(diffusers, base)(**settings)
        self._schedule = schedule_of(self._base)
        own = {"solver": text, "base": base, "inverted": inverted, "state_dtype": state_dtype}
        self.register_to_config(**self._base.config, **own)  # type: ignore[no-untyped-call]
        for name in {"betas", "alphas_cumprod"} & vars(self._base).keys():
            setattr(self, name, getattr(self._base, name))
        self.timesteps: Tensor = self._base.timesteps
        self.num_inference_steps: int | None = None
        self.start: State | None = None
        self._begin: int | None = None
        self._place: Place | None = None

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler for the network that the config of another scheduler is for.

        Args:
            config: of a scheduler of the DDPM family, of EDM or of flow matching, or of this class.
            return_unused_kwargs: return also the dictionary of arguments that are no settings.
            kwargs: arguments of the constructor, and settings in place of those in `config`.

        Raises:
            TypeError, ValueError: as at construction, and for arguments that are no settings.
        """
        check_is(
            return_unused_kwargs, bool, "return_unused_kwargs must be a bool (solver= is named)"
        )
        arguments, hidden, unused = read_config(config, kwargs, cls.__name__)
        unknown = sorted(kwargs.keys() & unused.keys())
        if unknown and not return_unused_kwargs:
            raise TypeError(
                f"{', '.join(unknown)}: no setting of {arguments['base']}, nor one of {', '.join(OWN)}"
            )
        made = cls(**arguments)
        made.register_to_config(**hidden)  # type: ignore[no-untyped-call]
        return (made, unused) if return_unused_kwargs else made

    def inverse(self) -> InvertibleScheduler:
        """The same solver in the other direction, from the pair at which this scheduler stands.

        Before a run, the inverse of an inverse has no steps left to undo and begins with a lone tensor.

        Raises:
            ValueError: if the solver cannot be inverted, or only by an iteration.
        """
        made: InvertibleScheduler = self.from_config(
            self.config, inverted=not self.config["inverted"]
        )
        made.start = self.state
        if made.start is not None and made.start is self.start:
            index, steps = made.start.index, len(made.start.sigmas) - 1
            last = (0 if self.solver.coupled else 1) if made.config["inverted"] else steps
            if index == last:
                made.start = None
        return made

    @property
    def state(self) -> State | None:
        """The pair at which the run stands; before the end of its first step `start`."""
        return self._place.state if self._place and self._place.leg else self.start

    @property
    def begin_index(self) -> int | None:
        """The number of the evaluation at which the next run begins, where a pipeline has set it."""
        return self._begin

    @property
    def step_index(self) -> int | None:
        """The number of the next evaluation; None before a run."""
        return self._place.call if self._place else None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Sets the number of the evaluation at which the next run begins."""
        self._begin = int(begin_index)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Sets the levels of a new run, and forgets the run before.

        Args:
            num_inference_steps: steps of the solver; None where levels are given.
            device: of `timesteps`.
            timesteps: as for the base class; where that reads none, whole training timesteps.
            sigmas: as for the base class; where that reads none, noise levels, with the last one.
            mu: as for the base class.

        Raises:
            TypeError: if `num_inference_steps` is not an integer, or `start` not a `State`.
            ValueError: if the levels do not decrease or are outside of the training levels, or `start`
                is of another grid or solver.
        """
        self._place = self._begin = None
        n, up, start = num_inference_steps, self.config["inverted"], self.start
        self._grid, known = grid_of(self._base, self._schedule, n, timesteps, sigmas, mu)
        index = self._grid.steps if up else 0
        if start is not None:
            check_is(start, State, "scheduler.start must be a State or None")
            try:
                check_origin(start, self._grid, self.solver, repr(self.solver))
            except ValueError as error:
                other = len(start.sigmas) != len(self._grid.levels)
                same = "use the same num_inference_steps, " if other else ""
                raise ValueError(
                    f"{error}; {same}or scheduler.start = None for a lone tensor"
                ) from error
            index = start.index if up or self.solver.coupled else start.index - 1
        self._route = Route.of(self.solver, self._grid, index, up=up)
        levels = self._route.sigmas
        self._calls = calls_at(self._schedule, levels, known)
        times = torch.tensor([call.timestep for call in self._calls])
        if not hasattr(self._base, "sigmas") and bool((times == times.round()).all()):
            times = times.long()
        self.timesteps = times.to(device)
        self.sigmas = torch.tensor([*levels, self._route.end], dtype=torch.float64)
        if isinstance(self._schedule, FlowSchedule):
            self.sigmas = flow_times_of(self.sigmas)
        self.num_inference_steps = self._grid.steps
        self.order = len(self._route.legs[len(self._route.legs) // 2].sigmas)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The network's input for latents: these themselves, and multiples of them under EDM."""
        if not isinstance(self._schedule, EDMSchedule):
            return sample
        call = self._place.call if self._place else self._find(timestep)[0]
        return sample * self._calls[call].input

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        generator: object = None,
    ) -> Any:
        """Takes the output of one evaluation, and returns the latents of the next.

        Args:
            model_output: the output of the network, shape ``(B, ...)``; if the config has a learned
                `variance_type`, with twice the channels.
            timestep: its noise input, which says where a run begins.
            sample: the latents, shape ``(B, ...)``.
            return_dict: return a `DDIMSchedulerOutput` in place of a tuple.
            generator: for pipelines that pass one; nothing is drawn.

        Returns:
            The latents to evaluate next, or those at the end of the run, and the denoised latents of
            this evaluation, both in the dtype of `sample`.

        Raises:
            ValueError: if the run has not begun or is over, or the shapes do not fit.
            FloatingPointError: if the last state, or in an exact arithmetic an output, is not finite.
        """
        at = self._place or self._first(timestep, sample)
        if at.call == len(self._calls):
            raise ValueError("the run is over: set_timesteps begins another")
        if str(self.config.get("variance_type")).startswith("learned"):
            model_output = model_output[:, : sample.shape[1]]
        if model_output.shape != sample.shape:
            raise ValueError(
                f"the network returned the shape {tuple(model_output.shape)} for latents of "
                f"{tuple(sample.shape)}: pass the mean alone, without a learned variance"
            )
        call, route, arithmetic = self._calls[at.call], self._route, self.solver.arithmetic
        leg, pair, (state, point) = at.leg, at.pair, self._taken(at, sample)
        denoised = model_output.to(point.dtype, copy=True).mul_(call.out)
        denoised.add_(point, alpha=call.skip)
        if arithmetic.exact and not is_finite(denoised):
            raise FloatingPointError(
                f"the output of the network is not finite {place(call.sigma, at.call)}; {OVERFLOW}"
            )
        outputs: Outputs = (*at.outputs, denoised)
        while leg < len(route.legs):
            found = route.advance(route.legs[leg], state, outputs, point.dtype)
            if isinstance(found, Tensor):
                point, scale = found, self._calls[at.call + 1].scale
                break
            state, outputs = pair or found[0], found[1]
            leg, pair = leg + 1, None
        else:
            point, scale = arithmetic.load(route.last(state), point.dtype), self._scale(route.end)
            if not is_finite(point):
                raise FloatingPointError(f"the last state is not finite; {OVERFLOW}")
        latents = (point * scale).to(sample.dtype)
        self._place = Place(
            leg, at.call + 1, state, pair, outputs, point, latents, version(latents)
        )
        denoised = denoised.to(sample.dtype)
        return DDIMSchedulerOutput(latents, denoised) if return_dict else (latents, denoised)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents with noise of the levels of some of `timesteps`, one for each element of the batch."""
        if self.config["inverted"]:
            warn_of_added_noise()
        found = [self._find(t)[0] for t in timesteps.tolist()]
        calls = [self._calls[k] for k in found]
        factors = [(call.scale, call.scale * call.sigma) for call in calls]
        scale, share = original_samples.new_tensor(factors).unbind(1)
        scale, share = append_dims(scale, noise), append_dims(share, noise)
        noisy: Tensor = scale * original_samples + share * noise
        return noisy

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as pipelines of flow matching call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    def _scale(self, sigma: float) -> float:
        return latent_scale(self._schedule, sigma)

    def _find(self, timestep: float | Tensor) -> list[int]:
        """The numbers of the evaluations with that timestep. Waits for the device."""
        if self.num_inference_steps is None:
            raise ValueError("there is no run: call set_timesteps first")
        t, times = float(timestep), self.timesteps.tolist()
        if t not in times:
            raise ValueError(
                f"{t:.6g} is not one of scheduler.timesteps, {times[0]:g} to {times[-1]:g}"
            )
        return [k for k, known in enumerate(times) if known == t]

    def _first(self, timestep: float | Tensor, sample: Tensor) -> Place:
        """The first evaluation of a run, at `sample`."""
        calls = self._find(timestep) if self._begin is None else [self._begin]
        routes = {k: self._route.later(k) if k else self._route for k in calls}
        call, route = next(((k, r) for k, r in routes.items() if r is not None), (0, None))
        if route is None or (call and self.start is not None):
            raise ValueError(
                f"no run of {self.solver} begins at evaluation {calls[0]} of {len(self._calls)}: "
                + (
                    "going up, it begins at the data"
                    if self.config["inverted"]
                    else "to begin in the middle, as image to image does, use a solver with equally "
                    "many evaluations in every step, such as BDIA(DDIM()), and scheduler.start = None"
                )
            )
        self._route, solver = route, self.solver
        scale = self._scale(self._grid.levels[route.index])
        wide = self.config["state_dtype"] == "float64" and sample.device.type != "mps"
        x = sample.to(torch.float64 if wide else torch.float32) / scale
        run = Run(solver, _network, x, self._grid, route.index)
        pair = None if self.start is None else self._pair(sample, x.dtype, scale)
        if route.up:
            warn_before_inverting(solver, run.plan, self._grid, pair or run.state, 0, x.dtype)
        elif not run.sampling_error <= SAMPLING_LIMIT:
            warn_of_samples(solver, run.sampling_error, self._grid.steps)
        if not (route.up or call or pair):
            warn_of_size(sample)
        point = route.advance(route.legs[0], run.state, (), x.dtype)
        assert isinstance(point, Tensor)
        return Place(0, call, run.state, pair, (), point, sample, version(sample))

    def _pair(self, sample: Tensor, dtype: torch.dtype, scale: float) -> State | None:
        """The pair to begin with, if `sample` is of that pair."""
        assert self.start is not None
        pair = Run(self.solver, _network, self.start.to(sample.device), self._grid).state
        stored = pair.current if pair.index == self._route.index else pair.partner
        assert stored is not None
        x = self.solver.arithmetic.load(stored, dtype)
        if torch.equal((x * scale).to(sample.dtype), sample):
            return pair
        warn_of_another_pair()
        return None

    def _taken(self, at: Place, sample: Tensor) -> tuple[State, Tensor]:
        """The state and the point of an evaluation; of latents that were changed, what these are."""
        same = at.version == version(at.latents) >= 0
        if same and sample is at.latents:
            return at.state, at.point
        scale, arithmetic = self._calls[at.call].scale, self.solver.arithmetic
        shown = at.latents if same else (at.point * scale).to(at.latents.dtype)
        if torch.equal(sample, shown.to(sample.dtype)):
            return at.state, at.point
        if self.solver.coupled:
            raise ValueError(
                f"the latents were changed between two steps, and {self.solver} carries two states, of "
                "which the pipeline has one: use BDIA"
            )
        state, point = at.state, sample.to(at.point.dtype) / scale
        if not at.outputs:
            near = arithmetic.store(point) if arithmetic.exact else point
            point = arithmetic.load(near, point.dtype)
            up = self._route.legs[at.leg].undo
            state = (replace(state, partner=near) if up else replace(state, current=near)).fork()
        return state, point


def _network(x: Tensor, sigma: Tensor, /, **extra_args: Any) -> Tensor:
    raise AssertionError("the pipeline calls the network")
