"""Runs that are recorded and replayed, in CUDA graphs and compiled.

Where there is no GPU a graph is stood in for: operations are recorded as they are made, and made
again in the same tensors, which must still be there.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from odesolvers import (
    BDIA,
    EDICT,
    RK4,
    Compiled,
    CUDAGraph,
    DPMSolverPP2S,
    Euler,
    FixedPoint,
    FixedPointInversion,
    HeunEDM,
    InvertibleSolver,
    Solver,
    execution,
    karras_sigmas,
)
from odesolvers.models import Gaussian

from .problems import gaussian, mixture, noise, relative_error

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Recorder(TorchDispatchMode):
    """Records operations with the tensors they read and write, and refuses to wait for values."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._own: set[int] = set()
        self.read: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        for tensor in (leaf for leaf in leaves if isinstance(leaf, Tensor)):
            if id(tensor) not in self._own:
                self.read.setdefault(id(tensor), weakref.ref(tensor))
        # Tensors of the graph itself live as long as it; those from outside it does not keep.
        own = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        self._own.update(map(id, own))
        self.operations.append((func, _Weakly(args, self._own), _Weakly(kwargs, self._own), result))
        return result


class _Weakly:
    """Arguments, of which those that `own` does not list are not kept alive."""

    def __init__(self, values: Any, own: set[int]) -> None:
        def hold(x: Any) -> Any:
            return weakref.ref(x) if isinstance(x, Tensor) and id(x) not in own else x

        self._held = torch.utils._pytree.tree_map(hold, values)

    def __call__(self) -> Any:
        def find(x: Any) -> Any:
            if not isinstance(x, weakref.ref):
                return x
            tensor = x()
            assert tensor is not None, "a graph reads a tensor that is gone"
            return tensor

        return torch.utils._pytree.tree_map(find, self._held)


class StandIn:
    """What `torch.cuda.CUDAGraph` is to `CUDAGraph`, on the CPU."""

    def __init__(self) -> None:
        self.recorder = Recorder()

    def replay(self) -> None:
        for func, args, kwargs, result in self.recorder.operations:
            again = func(*args(), **kwargs())
            pairs = zip(*map(torch.utils._pytree.tree_leaves, (result, again)), strict=True)
            for old, new in pairs:
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `CUDAGraph` record on the CPU."""

    @contextlib.contextmanager
    def capture(graph: StandIn, **options: Any) -> Iterator[None]:
        assert options.pop("capture_error_mode") == "thread_local"
        assert isinstance(options.pop("stream"), Stream)
        assert not options
        with graph.recorder:
            yield

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    monkeypatch.setattr(execution, "_check_on_gpu", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


SOLVERS = [
    BDIA(Euler(), 0.96),
    BDIA(HeunEDM(), batched=True),
    BDIA(DPMSolverPP2S()),
    EDICT(),
    RK4(),
]


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # of few long steps
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_graph_that_is_stood_in_for(graphs: None, solver: Solver) -> None:
    """It reads what it is given and what is kept for it, waits for nothing, and serves again."""
    grid, graph = karras_sigmas(6), CUDAGraph()
    network = nn.Linear(5, 5, dtype=torch.float64).requires_grad_(False)
    calls = []

    def denoiser(x: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
        calls.append(sigma)
        return network(x) / (1 + sigma.unsqueeze(1)) + shift

    for seed in range(3):
        x = noise(2, 5, sigma=80.0, seed=seed)
        args = {"shift": torch.full((2, 1), float(seed), dtype=torch.float64)}
        calls.clear()
        plain = solver.sample(denoiser, x, grid, extra_args=args)
        made = len(calls)
        replayed = solver.sample(denoiser, x, grid, extra_args=args, execution=graph)
        assert len(calls) == (made if seed else 4 * made)  # two to warm up, one to record
        assert torch.equal(replayed.x, plain.x)
        assert replayed.nfe == plain.nfe
        kept = replayed.x.clone()
        if isinstance(solver, InvertibleSolver):
            options: dict[str, Any] = {"extra_args": args, "execution": graph}
            back = solver.invert(denoiser, replayed.state, grid, **options)
            assert relative_error(back.x, x) < 1e-10
            code = solver.invert(denoiser, plain.x, grid, **options)
            assert torch.equal(code.x, solver.invert(denoiser, plain.x, grid, extra_args=args).x)
        assert torch.equal(replayed.x, kept)
        gc.collect()
    assert len(graph) == (3 if isinstance(solver, InvertibleSolver) else 1)


def test_a_graph_cannot_wait(graphs: None) -> None:
    x, grid = noise(2, 5, sigma=80.0), karras_sigmas(3)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        BDIA(Euler()).sample(lambda x, s: x * s[0].item(), x, grid, execution=CUDAGraph())


def test_a_graph_that_ends_in_what_is_not_finite_names_the_step(graphs: None) -> None:
    graph, grid = CUDAGraph(), karras_sigmas(4)

    def denoiser(x: Tensor, sigma: Tensor, top: Tensor) -> Tensor:
        return torch.where((sigma < top).unsqueeze(1), torch.nan, 0.5 * x)

    x = noise(2, 5, sigma=80.0)
    options: dict[str, Any] = {"execution": graph}
    BDIA(Euler()).sample(denoiser, x, grid, extra_args={"top": torch.tensor(0.0)}, **options)
    top = {"top": 0.99 * grid[1].float()}
    with pytest.raises(FloatingPointError, match="output is not finite at level 2"):
        BDIA(Euler()).sample(denoiser, x, grid, extra_args=top, **options)
    assert len(graph) == 1


def test_autocast_has_recordings_of_its_own() -> None:
    """A product is made in half precision there, and must not be replayed elsewhere."""
    network = nn.Linear(5, 5).requires_grad_(False)
    x, grid, compiled = noise(2, 5, dtype=torch.float32), karras_sigmas(3), Compiled("aot_eager")

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x).float()

    plain = BDIA(Euler()).sample(denoiser, x, grid, execution=compiled).x
    with torch.autocast("cpu", torch.bfloat16):
        half = BDIA(Euler()).sample(denoiser, x, grid).x
        assert torch.equal(BDIA(Euler()).sample(denoiser, x, grid, execution=compiled).x, half)
    assert not torch.equal(half, plain)
    assert torch.equal(BDIA(Euler()).sample(denoiser, x, grid, execution=compiled).x, plain)
    assert len(compiled) == 2


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("solver", [BDIA(Euler(), 0.96), BDIA(HeunEDM())], ids=repr)
def test_a_run_within_what_the_user_compiles(solver: BDIA) -> None:
    """Traced in pieces, as Python is that reads versions and addresses of tensors."""
    x, grid = noise(2, 5), karras_sigmas(3)

    def there_and_back(x: Tensor) -> Tensor:
        state = solver.sample(lambda x, sigma: 0.5 * x, x, grid).state
        return solver.invert(lambda x, sigma: 0.5 * x, state, grid).x

    compiled = torch.compile(there_and_back, backend="eager")
    for scale in (1.0, 2.0):
        torch.testing.assert_close(compiled(scale * x), scale * x)


def test_settings_of_another_type_are_told_apart() -> None:
    x, grid, compiled = noise(2, 5), karras_sigmas(3), Compiled("aot_eager")

    def denoiser(x: Tensor, sigma: Tensor, flag: object) -> Tensor:
        return 0.5 * x if flag is True else 0.25 * x

    for flag in (True, 1, 1.0):
        plain = BDIA(Euler()).sample(denoiser, x, grid, extra_args={"flag": flag}).x
        args: dict[str, Any] = {"extra_args": {"flag": flag}, "execution": compiled}
        assert torch.equal(BDIA(Euler()).sample(denoiser, x, grid, **args).x, plain)
    assert len(compiled) == 3


def test_levels_that_somebody_kept_are_not_those_of_a_recording() -> None:
    x, grid, compiled = noise(2, 5, sigma=80.0), karras_sigmas(4), Compiled("aot_eager")
    network = gaussian()
    expected = BDIA(Euler()).sample(network, x, grid, execution=compiled).x
    kept: list[Tensor] = []

    def keeps(x: Tensor, sigma: Tensor) -> Tensor:
        kept.append(sigma)
        return 0.5 * x

    BDIA(Euler()).sample(keeps, x, grid)
    for sigma in kept:
        sigma.zero_()
    assert torch.equal(BDIA(Euler()).sample(network, x, grid, execution=compiled).x, expected)


def test_a_graph_needs_all_tensors_on_its_device(graphs: None) -> None:
    """One on the host is read when the graph is recorded, and never again."""
    args = {"scale": torch.zeros(1, device="meta")}
    with pytest.raises(ValueError, match=r"extra_args has one on meta.*or pass a number"):
        BDIA(Euler()).sample(
            lambda x, s, scale: 0.5 * x,
            noise(2, 5),
            karras_sigmas(3),
            extra_args=args,
            execution=CUDAGraph(),
        )


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "kernels"), [(BDIA(Euler(), 0.96), 1), (BDIA(HeunEDM()), 2)])
def test_a_combination_is_one_kernel(solver: BDIA, kernels: int) -> None:
    """Between convolutions, which nothing is fused with: one for the step and one for both points."""
    from torch._inductor import metrics
    from torch._inductor.utils import fresh_cache

    network = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False)
    counts = []
    with fresh_cache():
        for n in (4, 6):
            metrics.reset()
            x = noise(2, 4, 8, 8, sigma=80.0, dtype=torch.float32)
            grid = karras_sigmas(n)
            there = solver.sample(lambda x, s: network(x), x, grid, execution=Compiled())
            assert relative_error(there.x, solver.sample(lambda x, s: network(x), x, grid).x) < 1e-5
            counts.append(metrics.generated_kernel_count)
    assert counts[1] - counts[0] == 2 * kernels


@pytest.mark.filterwarnings("ignore::odesolvers.InversionWarning")  # of three long steps
@pytest.mark.parametrize(
    "solver",
    [BDIA(Euler(), 0.96), BDIA(HeunEDM(), batched=True), BDIA(DPMSolverPP2S()), EDICT(), RK4()],
    ids=repr,
)
def test_a_compiled_run_serves_other_values(solver: Solver) -> None:
    """Traced, and executed operation by operation: the same bits."""
    grid, compiled = karras_sigmas(3), Compiled(backend="aot_eager")
    network = gaussian()

    def denoiser(x: Tensor, sigma: Tensor, shift: Tensor, power: int) -> Tensor:
        return network(x, sigma) + shift**power

    for n, power in ((1, 1), (2, 1), (3, 2)):
        x = noise(2, 5, sigma=80.0, seed=n)
        args = {"shift": torch.full((2, 1), float(n), dtype=torch.float64), "power": power}
        plain = solver.sample(denoiser, x, grid, extra_args=args)
        replayed = solver.sample(denoiser, x, grid, extra_args=args, execution=compiled)
        assert torch.equal(replayed.x, plain.x)
        assert replayed.nfe == plain.nfe
        assert len(compiled) == power
        if isinstance(solver, InvertibleSolver) and n == 3:
            options: dict[str, Any] = {"extra_args": args, "execution": compiled}
            back = solver.invert(denoiser, replayed.state, grid, **options)
            assert relative_error(back.x, x) < 1e-10
            code = solver.invert(denoiser, plain.x, grid, **options)
            expected = solver.invert(denoiser, plain.x, grid, extra_args=args)
            assert torch.equal(code.x, expected.x)
            assert len(compiled) == 4


def test_weights_that_change_in_place_are_seen_and_new_ones_are_recorded() -> None:
    network, grid, compiled = Gaussian(std=0.5), karras_sigmas(3), Compiled("aot_eager")
    x = noise(2, 5, sigma=80.0)
    solver = BDIA(Euler())
    solver.sample(network, x, grid, execution=compiled)
    network.std.fill_(1.0)
    expected = solver.sample(network, x, grid).x
    assert torch.equal(solver.sample(network, x, grid, execution=compiled).x, expected)
    assert len(compiled) == 1
    network.std = network.std * 2.0
    expected = solver.sample(network, x, grid).x
    assert torch.equal(solver.sample(network, x, grid, execution=compiled).x, expected)
    assert len(compiled) == 2


def test_runs_that_cannot_be_recorded() -> None:
    x, grid, compiled = noise(2, 5, sigma=80.0), karras_sigmas(3), Compiled("aot_eager")
    with pytest.raises(ValueError, match="needs the state on a GPU, got cpu"):
        BDIA(Euler()).sample(mixture(), x[:, :3], grid, execution=CUDAGraph())
    with pytest.raises(ValueError, match="warmups >= 1"):
        CUDAGraph(warmups=0)
    with pytest.raises(TypeError, match="execution must be an instance"):
        BDIA(Euler()).sample(gaussian(), x, grid, execution=Compiled)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"cannot be traced.*without execution=Compiled"):
        BDIA(Euler()).sample(lambda x, s: x * s[0].item(), x, grid, execution=compiled)
    for solver, options in (
        (BDIA(Euler()), {"callback": print}),
        (BDIA(Euler()), {"progress": True}),
        (BDIA(Euler()), {"differentiable": True}),
        (BDIA(Euler(), arithmetic=FixedPoint()), {}),
    ):
        with pytest.raises(ValueError, match="leaves no place for a callback"):
            solver.sample(gaussian(), x, grid, execution=compiled, **options)
    iterative = FixedPointInversion(Euler())
    state = iterative.sample(gaussian(), x, grid, execution=compiled).state
    with pytest.raises(ValueError, match="iteration that stops by itself"):
        iterative.invert(gaussian(), state, grid, execution=compiled)
    with pytest.raises(ValueError, match="must have a hash"):
        BDIA(Euler()).sample(
            lambda x, s, y: 0.5 * x, x, grid, extra_args={"y": {1}}, execution=compiled
        )


def test_a_recorded_run_that_is_not_finite_names_the_step() -> None:
    compiled, grid = Compiled("aot_eager"), karras_sigmas(4)

    def denoiser(x: Tensor, sigma: Tensor, top: Tensor) -> Tensor:
        return torch.where((sigma < top).unsqueeze(1), torch.full_like(x, float("nan")), 0.5 * x)

    x = noise(2, 5, sigma=80.0)
    options: dict[str, Any] = {"execution": compiled}
    BDIA(Euler()).sample(denoiser, x, grid, extra_args={"top": torch.tensor(0.0)}, **options)
    with pytest.raises(FloatingPointError, match="output is not finite at level 2"):
        BDIA(Euler()).sample(
            denoiser, x, grid, extra_args={"top": 0.99 * grid[1].float()}, **options
        )
    assert len(compiled) == 1


@pytest.mark.slow
def test_inductor_fuses_a_run() -> None:
    x, grid, compiled = noise(4, 16, sigma=80.0, dtype=torch.float32), karras_sigmas(5), Compiled()
    solver, denoiser = BDIA(Euler(), 0.96), Gaussian(std=0.5)
    for scale in (1.0, 0.5):
        there = solver.sample(denoiser, scale * x, grid, execution=compiled)
        assert relative_error(there.x, solver.sample(denoiser, scale * x, grid).x) < 1e-4
        back = solver.invert(denoiser, there.state, grid, execution=compiled)
        assert relative_error(back.x, scale * x) < 1e-5


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("solver", [BDIA(Euler(), 0.96), BDIA(HeunEDM(), batched=True)], ids=repr)
def test_a_cuda_graph_serves_other_values(solver: BDIA) -> None:
    grid, graph = karras_sigmas(10), CUDAGraph()
    denoiser = Gaussian(std=0.5).cuda()
    for seed in (0, 1):
        x = noise(4, 64, sigma=80.0, seed=seed, dtype=torch.float32).cuda()
        plain = solver.sample(denoiser, x, grid)
        replayed = solver.sample(denoiser, x, grid, execution=graph)
        torch.testing.assert_close(replayed.x, plain.x)
        kept = replayed.x.clone()
        back = solver.invert(denoiser, replayed.state, grid, execution=graph)
        assert relative_error(back.x, x) < 1e-5
        assert torch.equal(replayed.x, kept)
    assert len(graph) == 2
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        solver.sample(lambda x, sigma: x * sigma[0].item(), x, grid, execution=graph)
