"""English out of docstrings: hand-written texts, and `ast` as the judge of what a docstring is."""

import ast
import sysconfig
from pathlib import Path

import pytest

from hf_moe_cpt.data.boilerplate import contains_licence_text
from hf_moe_cpt.data.python_literals import docstrings
from hf_moe_cpt.data.python_prose import clean_paragraphs, description_body, is_english, topic_texts


SOURCE = '''\
# "no docstring"
"""First line.

    Indented detail.
"""
TEXT = """
class Fake:
    "not a docstring, but data"
"""


class Real:  # "comment"
    r"""A class\\d."""

    def method(self, text="x:"):

        # a comment first
        \'\'\'One "quoted"\\tword.\'\'\'
        return {"key": "a value"}, text
'''


def docstrings_by_ast(source: str) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node)) is not None]


def test_docstrings_are_found_dedented_and_unescaped():
    assert docstrings(SOURCE) == ["First line.\n\nIndented detail.", "A class\\d.", 'One "quoted"    word.']
    assert docstrings(SOURCE) == docstrings_by_ast(SOURCE)


def test_docstrings_of_the_standard_library_are_those_of_ast():
    folder = Path(sysconfig.get_path("stdlib"))
    found = expected = common = 0
    for path in sorted(folder.glob("*.py"))[::5]:
        source = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
        ours, theirs = docstrings(source), docstrings_by_ast(source)
        found, expected = found + len(ours), expected + len(theirs)
        common += len(set(ours) & set(theirs)) + len(theirs) - len(set(theirs))
    assert expected > 300
    assert common >= 0.995 * expected and found <= 1.005 * expected


def test_cleaning_keeps_sentences_and_drops_code():
    text = (
        "Return the mean of the values.\n\n"
        "Parameters\n----------\nvalues : list of float\n    The numbers to take the mean of.\n\n"
        ">>> mean([1, 2, 3])\n2\n\n"
        "```python\nmean([1, 2, 3]) is a call of the function\n```\n\n"
        "An example follows::\n\n    this indented block would be words too\n\n"
        "x = {k: v[0] for (k, v) in a.items() if v[1] != '(%s)' % k}\n\n"
        "Licensed under the Apache License, Version 2.0.\n\n"
        "The empty list has no mean, and is refused.\n"
    )
    assert clean_paragraphs(text) == [
        "Return the mean of the values.",
        "Parameters\nvalues : list of float\n    The numbers to take the mean of.",
        "An example follows::",
        "The empty list has no mean, and is refused.",
    ]


def test_short_text_gives_nothing():
    assert clean_paragraphs("Return x.") == []


@pytest.mark.parametrize(
    "paragraph, expected",
    {
        "sentence": ("Wait until the lock is free, then take it.", True),
        "other language": ("Die Größe der Fläche wird in Pixeln gezählt.", True),
        "figures": ("0.1 0.2 0.3 | 0.4 0.5 | 1e-3 2e-3", False),
        "doctest": (">>> print the words of this line", False),
        "call": ("result = f(a[0], b[1])(c)  # {0: 1}", False),
    }.values(),
)
def test_is_english(paragraph: str, expected: bool):
    assert is_english(paragraph) is expected


@pytest.mark.parametrize(
    "text, expected",
    {
        "wrapped over lines": ("Permission is hereby\n  granted, free of charge, to any person", True),
        "copyright": ("Copyright (c) 2020 The Authors", True),
        "licence by name": ("see the BSD 3-clause license for details", True),
        "spdx": ("SPDX-License-Identifier: MIT", True),
        "permission of a file": ("Return the permission bits of the file.", False),
        "a function about licences": ("Show the licence page of the wizard.", False),
    }.values(),
)
def test_contains_licence_text(text: str, expected: bool):
    assert contains_licence_text(text) is expected


def test_topics_and_descriptions():
    assert topic_texts(ast.parse("topics = {'if': 'The if statement', 'n': 3}\n")) == {"if": "The if statement"}
    assert topic_texts(ast.parse("other = 3\n")) == {}
    assert description_body("Name: x\nVersion: 1\n\nWhat x is.\n\nMore.\n") == "What x is.\n\nMore.\n"
    assert description_body("Name: x\n") == ""
