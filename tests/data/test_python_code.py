"""Code keeps its meaning and loses its English: judged by hand-written results, by `ast` and by `tokenize`."""

import ast
import io
import sysconfig
import textwrap
import tokenize
from pathlib import Path

import pytest

from hf_moe_cpt.data.python_code import compiles, is_generated, is_worth_learning, strip_docstrings_and_comments


SOURCE = '''\
#!/usr/bin/env python
# Copyright (c) 2001 Somebody. All rights reserved.
"""Module text."""

import os  # why


# about SIZE
SIZE = 3


"""A string used as a comment
over two lines."""


def shout(text, mark="#"):  # signature
    """Docs with "quotes" and a # sign."""
    # inside
    url = 'http://x/#anchor'  # tail # twice
    table = """
# kept: this is data
"""
    return f"{text}#{mark}" + url + table


class Empty(Exception):
    """Nothing but this."""


def one_line(): "doc"


def two(): """doc"""; return 2
'''
STRIPPED = '''\
import os


SIZE = 3


def shout(text, mark="#"):
    url = 'http://x/#anchor'
    table = """
# kept: this is data
"""
    return f"{text}#{mark}" + url + table


class Empty(Exception):
    pass


def one_line(): pass


def two(): pass; return 2
'''


def strip(source: str) -> str | None:
    return strip_docstrings_and_comments(source, ast.parse(source))


def dump_without_texts(source: str) -> str:
    """What `ast` sees of a source, less its bare strings and `pass`: an independent measure of what the code does."""

    class Remover(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
            return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

        def visit_Pass(self, node: ast.Pass) -> None:
            return None

    return ast.dump(Remover().visit(ast.parse(source)))


def comments_of(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def test_stripped_source_is_the_one_written_by_hand():
    assert strip(SOURCE) == STRIPPED


def test_stripped_module_does_the_same():
    namespaces = [{}, {}]
    for source, namespace in zip((SOURCE, strip(SOURCE)), namespaces, strict=True):
        exec(source, namespace)
    assert namespaces[0]["shout"]("a") == namespaces[1]["shout"]("a")
    assert namespaces[1]["shout"].__doc__ is None


@pytest.mark.parametrize(
    "source, expected",
    {
        "docstring after non-ascii on its line": ("def ä(): 'ö'\n", "def ä(): pass\n"),
        "second string becomes no docstring": ('"""one"""\n"""two"""\nx = 1\n', "x = 1\n"),
        "comment inside brackets": ("x = [1,  # one\n     # two\n     2]\n", "x = [1,\n     2]\n"),
        "hash in every kind of string": (
            "x = ['#', \"#\", '''#''', \"\"\"#\"\"\", rb'\\#', '\\'#']\n",
            "x = ['#', \"#\", '''#''', \"\"\"#\"\"\", rb'\\#', '\\'#']\n",
        ),
        "quote in a comment": ("x = 1  # don't\ny = '#'  # isn't\n", "x = 1\ny = '#'\n"),
        "empty lines of a string stay": ('x = """a\n\n\n\n\n\nb"""\n', 'x = """a\n\n\n\n\n\nb"""\n'),
        "gap of many empty lines": ("x = 1\n\n\n\n\n\ny = 2\n", "x = 1\n\n\ny = 2\n"),
        "two strings on one line": ("if x:\n    'a'; 'b'\n", "if x:\n    pass; pass\n"),
        "handlers and cases": (
            "try:\n    'a'\nexcept E:\n    'b'\nmatch x:\n    case 1:\n        'c'\n",
            "try:\n    pass\nexcept E:\n    pass\nmatch x:\n    case 1:\n        pass\n",
        ),
    }.values(),
)
def test_edges_of_stripping(source: str, expected: str):
    assert strip(source) == expected


def test_standard_library_keeps_its_syntax_tree_and_loses_its_comments():
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(folder.glob("*.py"))[::6] + sorted(folder.glob("asyncio/*.py"))[::4]
    checked = 0
    for path in paths:
        source = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
        code = strip(source)
        if code is None:
            continue
        assert dump_without_texts(code) == dump_without_texts(source), path.name
        assert comments_of(code) == [], path.name
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("code, expected", {"fine": ("x = 1\n", True), "open": ("x = (\n", False)}.values())
def test_compiles(code: str, expected: bool):
    assert compiles(code) is expected


def test_code_that_no_longer_compiles_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_moe_cpt.data.python_code._without_comments", lambda source: source + "(")
    assert strip("x = 1\n") is None


def test_tables_fragments_and_minified_code_are_not_worth_learning():
    function = textwrap.dedent("""
        def area_of(width, height):
            if width < 0 or height < 0:
                raise ValueError("negative side")
            return width * height
    """)
    assert is_worth_learning(function * 5)
    assert not is_worth_learning(function)
    assert not is_worth_learning("table = [\n" + "    0x00, 0x01, 0x1f, 12, 13,\n" * 50 + "]\n")
    assert not is_worth_learning(function * 5 + "x = '" + "word " * 100 + "'\n")
    assert not is_worth_learning("value = first_name(argument) + second_name(argument)".ljust(110, "x") + "\n" * 1)


@pytest.mark.parametrize(
    "opening, expected",
    {
        "protobuf": ("# Generated by the protocol buffer compiler.  DO NOT EDIT!\n", True),
        "marker": ("# @generated\n", True),
        "sphinx": ("# Autogenerated by Sphinx on Mon\n", True),
        "generator": ("def numbers():\n    '''A generator of numbers.'''\n", False),
    }.values(),
)
def test_generated_files_say_so(opening: str, expected: bool):
    assert is_generated(opening) is expected
