"""States of fixed point: every bit counts, in files and on devices."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from odesolvers import (
    BDIA,
    DDIM,
    Euler,
    FixedPoint,
    FloatingPoint,
    HeunEDM,
    State,
    StepRatio,
    karras_sigmas,
)
from odesolvers.arithmetic.stack import checksum, pack_bits, unpack_bits
from odesolvers.models import IdealDenoiser, load_digits

from .problems import smooth


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
