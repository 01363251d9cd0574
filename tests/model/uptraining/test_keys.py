"""Pass keys: where they are told, and that one pass answers as many would."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.layers.architecture import Folding
from model.uptraining.keys import DEPTHS, Keys, KeyText, answers, key_texts, keys_found
from tests.checkpoints import folded_config, random_decoder

CONFIG = folded_config(Folding(("full", "fold", "window", "fold"), 1, 1, "fitted"), 1000)
MODEL = random_decoder(CONFIG)


def by_letters(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64) % 7


def by_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int64)


def made(rows: int = 3, length: int = 700) -> list[KeyText]:
    hay = torch.randint(7, (rows, length), generator=torch.Generator().manual_seed(1))
    return key_texts(hay, by_letters)


def test_a_text_tells_a_key_at_every_depth_and_is_asked_for_each() -> None:
    hay = torch.full((3, 600), ord("-"))
    texts, again = key_texts(hay, by_bytes), key_texts(hay, by_bytes)
    assert all(a.tokens.equal(b.tokens) for a, b in zip(texts, again, strict=True))
    orders = set()
    for text in texts:
        said = bytes(text.tokens.tolist()).decode()
        assert len(said) + max(len(each.tokens) for each in text.questions) == 600
        dashes, begun, names = said.count("-"), 0, []
        assert len(text.questions) == len(DEPTHS)
        for number, question in enumerate(text.questions):
            asked, key = bytes(question.tokens.tolist()).decode()[:-5], question.tokens[-5:]
            name = asked.split()[4]
            assert asked == f"\nThe pass key of {name} is "
            digits = bytes(key.tolist()).decode()
            assert digits.isdigit() and question.key == 5 and question.depth == number
            told = f"\nThe pass key of {name} is {digits}.\n"
            begun = said.index(told, begun)
            assert said[:begun].count("-") == round(DEPTHS[number] * dashes)
            names.append(name)
        assert len({*names}) == 5
        orders.add(tuple(names))
    assert len(orders) > 1


@pytest.mark.parametrize("window", [0, 50])
def test_a_question_is_answered_as_if_it_came_alone(window: int) -> None:
    """Also where it goes on into the next block, and where a layer slides natively."""
    config = CONFIG
    if window:
        built = replace(CONFIG.architecture, windows=(window, 0, 0, 0))
        config = replace(CONFIG, architecture=built)
    model = random_decoder(config)
    (text,) = made(1, 701)
    with torch.no_grad():
        for question, logits in zip(text.questions, answers(model, text), strict=True):
            alone = model(torch.cat((text.tokens, question.tokens))[None])[0]
            torch.testing.assert_close(logits, alone[len(text.tokens) :], atol=1e-4, rtol=0)


def test_a_digit_is_right_if_it_is_the_most_likely_one() -> None:
    texts = made()
    right = [0] * 5
    with torch.no_grad():
        for text in texts:
            for question in text.questions:
                tokens = torch.cat((text.tokens, question.tokens))
                chosen = MODEL(tokens[None])[0, -6:-1].argmax(-1)
                right[question.depth] += int((chosen == tokens[-5:]).sum())
    assert 0 < sum(right) < 75 and len({*right}) > 1
    longest = max(len(each.tokens) for each in texts[0].questions)
    found = keys_found(MODEL, texts)
    assert found == Keys(len(texts[0].tokens) + longest, tuple(n / 15 for n in right), 15)
    assert found.digits_right == pytest.approx(sum(right) / 75)
