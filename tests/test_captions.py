"""Captions as tokens: nothing is lost that fits, nothing is unknown, and a state_dict carries all that was learnt."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models._captions import PADDING, Captions

TEXTS = ["a red circle", "two red circles above a blue square", "three small blue squares", "a blue circle"] * 3


def learnt(vocabulary: int = 320, length: int = 64) -> Captions:
    captions = Captions(vocabulary, length)
    captions.learn(TEXTS)
    return captions


@given(st.text(max_size=12))
def test_whatever_fits_can_be_read_back(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    captions = learnt()
    assert captions.decode(captions.encode([text])) == [" ".join(text.lower().split())]


def test_what_was_learnt_is_short_and_what_was_not_is_spelt() -> None:
    captions = learnt()
    seen, unseen = captions.encode(["Two red  circles above a blue square", "a crimson café"])
    assert int((seen != PADDING).sum()) == 7  # one token a word
    assert int((unseen != PADDING).sum()) > 7
    assert captions.decode(unseen[None]) == ["a crimson café"]


def test_ids_are_padded_at_the_end_and_stay_in_the_vocabulary() -> None:
    captions = learnt(length=5)
    ids = captions.encode([None, "a red circle", "two red circles above a blue square", "\x00ÿ"])
    assert ids.shape == (4, 5)
    assert ids.dtype == torch.int64
    assert ids.min() >= 0
    assert ids.max() < captions.vocabulary
    assert ids[0].tolist() == [PADDING] * 5
    assert ids[1, 3:].tolist() == [PADDING] * 2
    assert captions.decode(ids[2:3]) == ["two red circles above a"]


def test_a_text_that_looks_like_padding_is_text() -> None:
    captions = learnt()
    assert PADDING not in captions.encode(["<pad>[PAD]\x00"])[0, :10].tolist()


def test_learning_depends_on_the_captions_and_not_on_their_order() -> None:
    one, other = Captions(320, 8), Captions(320, 8)
    one.learn(TEXTS)
    other.learn(reversed(TEXTS))
    assert torch.equal(one.merges, other.merges)
    assert (one.merges[:, 0] >= 0).any()


def test_a_state_dict_is_all_it_needs() -> None:
    captions, again = learnt(), Captions(320, 64)
    assert not torch.equal(again.encode(TEXTS), captions.encode(TEXTS))
    again.load_state_dict(captions.state_dict())
    assert torch.equal(again.encode(TEXTS), captions.encode(TEXTS))
    assert torch.equal(copy.deepcopy(captions).encode(TEXTS), captions.encode(TEXTS))


def test_a_vocabulary_of_bytes_alone_spells_everything() -> None:
    captions = learnt(vocabulary=257)
    ids = captions.encode(["a red circle"])
    assert int((ids != PADDING).sum()) == len(" a red circle")
    assert captions.decode(ids) == ["a red circle"]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("vocabulary: 256; at least 257")):
        Captions(256, 8)
    with pytest.raises(ValueError, match="length: 0"):
        Captions(300, 0)
    with pytest.raises(ValueError, match="captions: none given"):
        Captions(300, 8).learn([])
    broken = learnt()
    broken.merges[0, 1] = 5000
    with pytest.raises(ValueError, match=r"merge 0 joins tokens .* but there are 256"):
        broken.encode(["a"])
