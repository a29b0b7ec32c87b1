"""Tokens between host and device: those of this request, in their order, and nothing of the one before."""

from __future__ import annotations

import pytest
import torch

from hybridlab.readback import Prompt, Readback

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_prompt_is_there_with_its_length(device: str, mapped: bool) -> None:
    """The length of one prompt with the ids of another, or a copy that leaves the last id behind."""
    prompt = Prompt(5, torch.device(device), mapped)
    assert prompt.count.item() == 1  # a capture pads before there is any
    places = prompt.ids.data_ptr(), prompt.count.data_ptr()
    for ids in ([7, 8, 9, 10, 11], [1], [4, 5, 6]):
        prompt.put(ids)
        assert prompt.count.item() == len(ids)
        assert prompt.ids[:len(ids)].tolist() == ids
    assert places == (prompt.ids.data_ptr(), prompt.count.data_ptr())  # what graphs hold
    with pytest.raises(ValueError):
        prompt.put(range(6))


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_come_back_in_their_order(device: str) -> None:
    """A value read from the place of another, where more were sent than there are places."""
    token = torch.zeros(1, dtype=torch.int64, device=device)
    back = Readback(token, 2)
    for value in range(5):
        token.fill_(value)
        assert back.read(back.send()) == value
