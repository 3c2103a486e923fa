"""How items of data sets become text to score."""

import pytest

from testbed.evaluation.data_sets import Alternative, ChoiceItem, LastWordItem, alternatives, last_word
from testbed.plan.schema import Form


@pytest.mark.parametrize(
    ("form", "question", "texts"),
    [
        ("question", "Why?", [("Question: Why?\nAnswer:", " A cat"), ("Question: Why?\nAnswer:", " a dog")]),
        ("continuation", "He saw", [("He saw", " A cat"), ("He saw", " a dog")]),
        ("blank", "Then _ ran off.", [("Then A cat", " ran off."), ("Then a dog", " ran off.")]),
        ("blank", "_'s tail.", [("A cat", " 's tail."), ("a dog", " 's tail.")]),
    ],
)
def test_alternatives_of_a_multiple_choice_item(form: Form, question: str, texts: list[tuple[str, str]]) -> None:
    item = ChoiceItem(question, ["A cat", "a dog"], 1)
    assert alternatives(item, form) == [Alternative(*text) for text in texts]


def test_the_last_word_begins_with_its_space() -> None:
    assert last_word(LastWordItem("He said, \"I don't know, Ann")) == ("He said, \"I don't know,", " Ann")
