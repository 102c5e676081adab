"""Contact sheets and figures, and their files."""

from __future__ import annotations

import pytest
import torch

from odesolvers.cli import pictures


def test_a_contact_sheet_holds_every_image_in_its_place() -> None:
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 20, 32)
    sheet = pictures.contact_sheet(images)
    height, width, gap = 40, 64, pictures.GAP
    assert sheet.shape == (2 * height + gap, 3 * width + 2 * gap, 3)
    for k, value in enumerate([0, 64, 128, 191, 255]):
        top, left = k // 3 * (height + gap), k % 3 * (width + gap)
        assert (sheet[top : top + height, left : left + width] == value).all()
    assert (sheet[height : height + gap] == pictures.SLATE).all()
    assert (sheet[height:, 2 * (width + gap) - gap :] == pictures.SLATE).all()


def test_a_contact_sheet_clips_and_takes_colours() -> None:
    images = torch.tensor([3.0, -1.0, -7.0]).reshape(1, 3, 1, 1)
    assert (pictures.contact_sheet(images) == [255, 0, 0]).all()
    with pytest.raises(ValueError, match=r"got \(1, 4, 2, 2\)"):
        pictures.contact_sheet(torch.zeros(1, 4, 2, 2))


def test_signs_have_colours() -> None:
    red, white, blue = pictures.signed_colours(torch.tensor([1.0, 0, -1]).reshape(3, 1, 1, 1))
    assert red[0] > red[2]
    assert white.flatten().tolist() == [1, 1, 1]
    assert blue[2] > blue[0]
