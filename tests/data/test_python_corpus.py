"""Corpora of a Python installation, small by hand and real, and of a user's folders; the tokenizer trained on them.

Judges: results written by hand, `ast` (what a docstring is, what code does), `tokenize` (comments), sets of word
tuples (shingles), `transformers` (the tokenizer).
"""

import ast
import io
import json
import random
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_moe_cpt.data import python_corpus as pc


def rows_of(text: str) -> Dataset:
    return Dataset.from_list([{"text": f"{text} ä", "path": "a.py"}] * 3)


CORPUS = {
    domain: {side: rows_of(f"{domain} {side}") for side in ("train", "held_out")} for domain in ("prose", "code")
}


def as_lists(corpus):
    return {domain: {side: rows.to_list() for side, rows in sides.items()} for domain, sides in corpus.items()}


def test_saved_corpus_comes_back(tmp_path):
    """Also where `datasets` has put a tokenised copy beside the text."""
    assert pc.load_corpus(tmp_path, "key") is None
    pc.save_corpus(CORPUS, tmp_path, "key")
    loaded = pc.load_corpus(tmp_path, "key")
    assert as_lists(loaded) == as_lists(CORPUS) and list(loaded) == ["prose", "code"]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    loaded["code"]["train"].map(lambda row: {"length": len(row["text"])})
    assert len(list((tmp_path / "key/code").iterdir())) == 3
    assert as_lists(pc.load_corpus(tmp_path, "key")) == as_lists(CORPUS)


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "manifest", "no manifest"])
def test_damaged_corpus_is_not_used_and_can_be_replaced(tmp_path, damage):
    pc.save_corpus(CORPUS, tmp_path, "key")
    file, manifest = tmp_path / "key/code/train.arrow", tmp_path / "key/manifest.json"
    content = file.read_bytes()
    {
        "cut": lambda: file.write_bytes(content[:-10]),
        "flip": lambda: file.write_bytes(content.replace(b"code train", b"code trairn"[:10])),
        "missing": file.unlink,
        "manifest": lambda: manifest.write_text("[1]"),
        "no manifest": manifest.unlink,
    }[damage]()
    assert pc.load_corpus(tmp_path, "key") is None
    pc.save_corpus(CORPUS, tmp_path, "key")
    assert as_lists(pc.load_corpus(tmp_path, "key")) == as_lists(CORPUS)


def test_failed_saving_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_moe_cpt.data.python_corpus._write_arrow", full_disk)
    with pytest.raises(OSError, match="No space left"):
        pc.save_corpus(CORPUS, tmp_path, "key")
    assert list(tmp_path.iterdir()) == []


def words(start: int, stop: int) -> str:
    return " ".join(f"word{number}" for number in range(start, stop))


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=30))
def test_shingles_count_the_distinct_n_grams(text: list[str]):
    expected = {tuple(text[start : start + 3]) for start in range(len(text) - 2)}
    assert len(pc.shingles(" ".join(text), words_per_shingle=3, keep_one_in=1)) == len(expected)


def test_thinning_keeps_the_same_shingles_everywhere():
    whole, part = pc.shingles(words(0, 3000)), pc.shingles(words(500, 1500))
    assert set(part.tolist()) <= set(whole.tolist())
    assert len(whole) == pytest.approx(3000 / 4, rel=0.1)


def test_shingles_are_pinned_for_all_processes_and_platforms():
    """Python's own hash of a string would differ in each process."""
    marks = [1033415184163533211, 2308136238884651691, 3964921850464214140, 10548313853365337822]
    assert pc.shingles("a b c d e", 2, 1).tolist() == marks


def test_overlap_is_the_share_of_the_new_text_seen_before():
    seen = set(pc.shingles(words(0, 2000)).tolist())
    assert pc.overlap(pc.shingles(words(0, 2000)), set()) == 0.0
    assert pc.overlap(pc.shingles(words(0, 2000)), seen) == 1.0
    assert pc.overlap(pc.shingles(words(1000, 3000)), seen) == pytest.approx(0.5, abs=0.05)
    assert pc.overlap(np.empty(0, dtype=np.uint64), seen) == 0.0


def test_a_held_out_text_spread_over_several_train_texts_is_a_leak():
    domain = pc.Domain(limits=dict.fromkeys(pc.SIDES, 10**6))
    train = [words(0, 350) + words(10_000, 11_000), words(650, 1000) + words(20_000, 21_000), words(7970, 9000)]
    held_out = {"leaked": words(0, 1000), "alone": words(5000, 6000), "a little": words(7000, 8000)}
    assert all(domain.add("held_out", "package", name, text) for name, text in held_out.items())
    assert all(domain.add("train", "package", "file", text) for text in train)
    domain.drop_leaked_documents()
    assert [row["path"] for row in domain.documents["held_out"]] == ["alone", "a little"]
    assert domain.add("train", "package", "copy", words(5000, 6000).upper()) == 0


def text_of(seed: int, characters: int = 30_000) -> str:
    rng = random.Random(seed)
    lines = (" ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(10)) for _ in range(characters // 60 + 1))
    return "\n".join(lines)


def write(root, folder: str, *texts: str) -> None:
    (root / folder).mkdir(parents=True)
    for number, text in enumerate(texts):
        (root / folder / f"{number}.txt").write_text(text)


def test_two_folders_become_two_domains_in_the_order_of_their_names(tmp_path):
    write(tmp_path, "2-code", *(text_of(seed, 9_000) for seed in range(10)))
    (tmp_path / "1-wiki").mkdir()
    rows = [json.dumps({"text": text_of(seed, 9_000)}) for seed in range(20, 30)]
    (tmp_path / "1-wiki/wiki.jsonl").write_text("\n".join(rows) + "\n")
    corpus = pc.load_folder_corpus(tmp_path, held_out_fraction=0.2)
    assert list(corpus) == ["1-wiki", "2-code"]
    for sides in corpus.values():
        assert (len(sides["train"]), len(sides["held_out"])) == (8, 2)
        assert not set(sides["train"]["text"]) & set(sides["held_out"]["text"])
    write(tmp_path / "by role", "new", text_of(1))
    write(tmp_path / "by role", "old", text_of(2))
    assert list(pc.load_folder_corpus(tmp_path / "by role", held_out_fraction=0.3)) == ["old", "new"]


def test_split_does_not_depend_on_file_names(tmp_path):
    texts = [text_of(seed, 5_000) for seed in range(10)]
    sides = []
    for root, order in ((tmp_path / "a", texts), (tmp_path / "b", texts[::-1])):
        write(root, "1", *order)
        write(root, "2", text_of(77))
        sides.append(set(pc.load_folder_corpus(root, held_out_fraction=0.3)["1"]["held_out"]["text"]))
    assert sides[0] == sides[1]


@given(st.text(alphabet="ab\n", max_size=80), st.integers(1, 20))
def test_pieces_are_short_and_lose_nothing(text: str, longest: int):
    pieces = pc.cut_to_pieces(text, longest)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= longest


def test_folders_without_two_domains_of_text_are_refused(tmp_path):
    def refuses(folder, message, **options):
        with pytest.raises(ValueError, match=message):
            pc.load_folder_corpus(folder, **options)

    refuses(tmp_path / "absent", "is no folder: give a folder with two subfolders")
    refuses(tmp_path, "held_out_fraction=0.0 must lie between 0 and 1", held_out_fraction=0.0)
    refuses(tmp_path, r"has 0 subfolders .*the older first by name")
    write(tmp_path, "1", "too short")
    write(tmp_path, "2", text_of(2))
    refuses(tmp_path, "holds 9 characters of text and a domain needs 20000: add files")
    (tmp_path / "1/0.txt").unlink()
    (tmp_path / "1/tokens.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    refuses(tmp_path, "holds tokens and not text")
    write(tmp_path, "c")
    refuses(tmp_path, r"has 3 subfolders \(1, 2, c\)")
    write(tmp_path / "copies", "1", text_of(1, 9_900), text_of(1, 9_900), text_of(1, 9_900))
    write(tmp_path / "copies", "2", text_of(2))
    refuses(tmp_path / "copies", "leaves no text for train once copies are dropped")


def strip(source: str) -> str | None:
    return pc.strip_docstrings_and_comments(source, ast.parse(source))


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


@pytest.mark.parametrize(
    "source, expected",
    {
        "docstring after non-ascii on its line": ("def ä(): 'ö'\n", "def ä(): pass\n"),
        "docstring before a statement": ('def two(): """doc"""; return 2\n', "def two(): pass; return 2\n"),
        "docstring with quotes": (
            'def f(a="#"):  # b\n    """A "c" and a # sign."""\n    return a\n',
            'def f(a="#"):\n    return a\n',
        ),
        "class of a docstring": ("class E(Exception):\n    'only'\n", "class E(Exception):\n    pass\n"),
        "head of a module": (
            '#!/bin/x\n# (c)\n"""m"""\n\nimport os  # why\n\n\n# n\nN = 3\n',
            "import os\n\n\nN = 3\n",
        ),
        "comment that is data": ('x = """\n# kept\n"""  # tail # twice\n', 'x = """\n# kept\n"""\n'),
        "second string becomes no docstring": ('"""one"""\n"""two"""\nx = 1\n', "x = 1\n"),
        "comment inside brackets": ("x = [1,  # one\n     # two\n     2]\n", "x = [1,\n     2]\n"),
        "hash in every kind of string": 2 * ("x = ['#', \"#\", '''#''', \"\"\"#\"\"\", rb'\\#', '\\'#']\n",),
        "quote in a comment": ("x = 1  # don't\ny = '#'  # isn't\n", "x = 1\ny = '#'\n"),
        "empty lines of a string stay": 2 * ('x = """a\n\n\n\n\n\nb"""\n',),
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


@pytest.mark.slow
def test_standard_library_keeps_its_syntax_tree_loses_its_comments_and_gives_the_docstrings_of_ast():
    folder = Path(sysconfig.get_path("stdlib"))
    checked = found = expected = common = 0
    for path in sorted(folder.glob("*.py"))[::15] + sorted(folder.glob("asyncio/*.py"))[::9]:
        source = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
        ours, theirs = pc.docstrings(source), docstrings_by_ast(source)
        found, expected = found + len(ours), expected + len(theirs)
        common += len(set(ours) & set(theirs)) + len(theirs) - len(set(theirs))
        if (code := strip(source)) is not None:
            assert dump_without_texts(code) == dump_without_texts(source), path.name
            assert comments_of(code) == [], path.name
            checked += 1
    assert checked > 10 and expected > 100
    assert common >= 0.995 * expected and found <= 1.005 * expected


def test_code_that_no_longer_compiles_is_refused(monkeypatch):
    monkeypatch.setattr("hf_moe_cpt.data.python_corpus._without_comments", lambda source: source + "(")
    assert strip("x = 1\n") is None


FUNCTION = (
    "def area_of(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('negative side')\n\n"
)
JUDGED = {
    pc.is_worth_learning: {
        "code": (FUNCTION * 5, True),
        "a fragment": (FUNCTION, False),
        "a table": ("table = [\n" + "    0x00, 0x01, 0x1f, 12, 13,\n" * 50 + "]\n", False),
        "a long line": (FUNCTION * 5 + "x = '" + "word " * 100 + "'\n", False),
        "long lines": ("".join(f"value_{'x' * 100} = argument_{'y' * 100}\n" for _ in range(9)), False),
    },
    pc.is_generated: {
        "protobuf": ("# Generated by the protocol buffer compiler.  DO NOT EDIT!\n", True),
        "marker": ("# @generated\n", True),
        "sphinx": ("# Autogenerated by Sphinx on Mon\n", True),
        "generator": ("def numbers():\n    '''A generator of numbers.'''\n", False),
    },
    pc.is_english: {
        "sentence": ("Wait until the lock is free, then take it.", True),
        "other language": ("Die Größe der Fläche wird in Pixeln gezählt.", True),
        "figures": ("0.1 0.2 0.3 | 0.4 0.5 | 1e-3 2e-3", False),
        "doctest": (">>> print the words of this line", False),
        "call": ("result = f(a[0], b[1])(c)  # {0: 1}", False),
    },
    pc.contains_licence_text: {
        "wrapped over lines": ("Permission is hereby\n  granted, free of charge, to any person", True),
        "copyright": ("Copyright (c) 2020 The Authors", True),
        "licence by name": ("see the BSD 3-clause license for details", True),
        "spdx": ("SPDX-License-Identifier: MIT", True),
        "permission of a file": ("Return the permission bits of the file.", False),
        "a function about licences": ("Show the licence page of the wizard.", False),
    },
}


@pytest.mark.parametrize("judge, case", [(judge, case) for judge, cases in JUDGED.items() for case in cases])
def test_texts_are_judged(judge, case):
    text, expected = JUDGED[judge][case]
    assert judge(text) is expected


NAMES = [f"package{number % 12}/module{number}.py" for number in range(60)]


def source_of(number: int) -> str:
    """A module of its own words: a licence, four sentences of docstring, and a function long enough to keep."""
    rng = random.Random(number)
    words = ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(60)]
    sentences = [" ".join(words[start : start + 15]).capitalize() + "." for start in (0, 15, 30, 45)]
    lines = "\n".join(f"    {word} = {words[-1]}({word!r}, {rng.randrange(10)})  # note {word}" for word in words[:12])
    return (
        "# Copyright (c) 2020 The Authors. All rights reserved.\n"
        f'"""{sentences[0]}\n\n{sentences[1]}\n\nLicensed under the MIT license.\n"""\n'
        f'def {words[1]}({words[2]}):\n    """{sentences[2]}\n\n    {sentences[3]}\n    """\n{lines}\n'
    )


def documentation_of(*numbers: int) -> str:
    return "\n\n".join(ast.get_docstring(ast.parse(source_of(number))) for number in numbers)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for number, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source_of(number))
    return root


def build(root: Path, **options):
    settings = {"held_out_fraction": 0.3, "max_characters_per_domain": 1_000_000, "progress": False}
    return pc.build_python_corpus(roots=[root], **(settings | options))


def paths_of(corpus, domain: str, side: str) -> list[str]:
    return list(corpus[domain][side]["path"])


def test_domains_hold_what_their_name_says_and_a_file_lies_on_one_side(root):
    corpus = build(root)
    name = paths_of(corpus, "code", "train")[0]
    source = source_of(NAMES.index(name))
    prose = dict(zip(paths_of(corpus, "prose", "train"), corpus["prose"]["train"]["text"], strict=True))[name]
    code = corpus["code"]["train"]["text"][0]
    documentation = ast.get_docstring(ast.parse(source)).split("\n\n")[:2]
    assert prose.startswith("\n\n".join(documentation)) and "MIT" not in prose and "def " not in prose
    assert code.startswith("def ") and "#" not in code and documentation[0] not in code
    ast.parse(code)
    sides = [{*paths_of(corpus, "prose", side), *paths_of(corpus, "code", side)} for side in pc.SIDES]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(NAMES)
    assert 0.15 < len(sides[1]) / len(NAMES) < 0.45
    assert set(paths_of(corpus, "prose", "train")) == set(paths_of(corpus, "code", "train"))


def test_a_seed_changes_the_sides_and_neither_new_files_nor_another_place_do(root, tmp_path):
    first, again, other = build(root), build(root), build(root, seed=1)
    assert as_lists(first) == as_lists(again)
    assert set(paths_of(first, "code", "held_out")) != set(paths_of(other, "code", "held_out"))
    elsewhere = root.rename(tmp_path / "elsewhere")
    (elsewhere / "added.py").write_text(source_of(1000))
    after = build(elsewhere)
    for side in pc.SIDES:
        assert set(paths_of(first, "code", side)) <= set(paths_of(after, "code", side))


def test_copies_do_not_cross_the_split(root):
    for number in range(20):
        text = source_of(number)
        (root / f"exact{number}.py").write_text(text)
        (root / f"near{number}.py").write_text(text.replace("# note", "# other").replace("2020", "2021") + "x = 1\n")
    corpus = build(root)
    for domain in corpus:
        kept = [path for side in pc.SIDES for path in paths_of(corpus, domain, side)]
        assert len(kept) <= len(NAMES) and len(kept) == len(set(kept))
        train = {mark for text in corpus[domain]["train"]["text"] for mark in pc.shingles(text).tolist()}
        for text in corpus[domain]["held_out"]["text"]:
            marks = pc.shingles(text).tolist()
            assert sum(mark in train for mark in marks) <= 0.1 * len(marks)


def test_useless_files_are_skipped(root):
    bad = {
        "not_utf8.py": b"# coding: latin-1\n" + source_of(100).encode() + b"x = '\xe9'\n",
        "broken.py": source_of(101).encode() + b"def (:\n",
        "null.py": source_of(102).encode() + b"\x00",
        "generated.py": b"# Generated by a program. Do not edit.\n" + source_of(103).encode(),
        "empty.py": b"",
        "huge.py": source_of(104).encode() * 1000,
        "tests/inside.py": source_of(105).encode(),
        "test_it.py": source_of(106).encode(),
        "table.py": b"x = [\n" + b"    0x01, 0x02, 0x03,\n" * 100 + b"]\n",
    }
    for name, content in bad.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    corpus = build(root)
    for side in pc.SIDES:
        assert not set(paths_of(corpus, "code", side)) & set(bad)
    assert set(paths_of(corpus, "prose", "train") + paths_of(corpus, "prose", "held_out")) & set(bad) <= {
        "broken.py", "null.py", "generated.py"
    }  # fmt: skip


def test_topics_and_descriptions_are_prose(root):
    (root / "pydoc_data").mkdir()
    topics = {f"topic{number}": documentation_of(200 + number, 209 + number) for number in range(9)}
    (root / "pydoc_data/topics.py").write_text(f"# Autogenerated by Sphinx\ntopics = {topics!r}\n")
    (root / "Some_Name-1.2.dist-info").mkdir()
    body = documentation_of(300, 301)
    (root / "Some_Name-1.2.dist-info/METADATA").write_text(f"Name: some-name\nLicense: MIT\n\n{body}\n")
    corpus = build(root)
    paths = {side: paths_of(corpus, "prose", side) for side in pc.SIDES}
    assert "some_name/METADATA" in paths["train"] + paths["held_out"]
    for side in pc.SIDES:
        assert any("topics.py#topic" in path for path in paths[side])


def test_limit_takes_a_cross_section(root):
    whole, part = build(root), build(root, max_characters_per_domain=8_000)
    for domain in part:
        sizes = {side: sum(map(len, part[domain][side]["text"])) for side in pc.SIDES}
        longest = max(map(len, whole[domain]["train"]["text"]))
        assert 0.7 * 8_000 <= sizes["train"] + longest <= 0.7 * 8_000 + 2 * longest
        assert set(paths_of(part, domain, "train")) <= set(paths_of(whole, domain, "train"))
        assert len({path.split("/")[0] for path in paths_of(part, domain, "train")}) > 4


def test_cache_is_used_until_a_file_changes(root, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = build(root, cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr("hf_moe_cpt.data.python_corpus.CorpusBuilder", None)  # building again would fail
        second = build(root, cache_dir=cache)
    assert first["code"]["train"].to_list() == second["code"]["train"].to_list()
    (root / NAMES[0]).write_text(source_of(0) + "y = 2\n")
    build(root, cache_dir=cache)
    assert len(list(cache.iterdir())) == 2


def test_a_root_without_text_is_refused(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=f"no prose for train found in {tmp_path}"):
        build(tmp_path)


@pytest.mark.slow
def test_listing_of_the_real_installation_is_stable_and_complete():
    files = pc.list_files(pc.installation_roots())
    names = [file.name for file in files]
    assert names == sorted(set(names))
    assert {"json/decoder.py", "torch/nn/functional.py", "torch/METADATA"} <= set(names)
    assert not any("__pycache__" in name or "/tests/" in name for name in names)


@pytest.mark.slow
def test_real_standard_library():
    root = Path(sysconfig.get_path("stdlib"))
    corpus = build(root, max_characters_per_domain=300_000, held_out_fraction=0.1)
    for domain in corpus:
        assert sum(map(len, corpus[domain]["train"]["text"])) > 150_000
        assert sum(map(len, corpus[domain]["held_out"]["text"])) > 10_000
    for code in corpus["code"]["held_out"]["text"]:
        ast.parse(code)
    words = " ".join(corpus["prose"]["train"]["text"]).lower().split()
    assert words.count("the") / len(words) > 0.03  # 0.05 to 0.07 in edited English


SOURCE_PYTHON_PROSE = '''\
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
    assert pc.docstrings(SOURCE_PYTHON_PROSE) == [
        "First line.\n\nIndented detail.",
        "A class\\d.",
        'One "quoted"    word.',
    ]
    assert pc.docstrings(SOURCE_PYTHON_PROSE) == docstrings_by_ast(SOURCE_PYTHON_PROSE)


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
    assert pc.clean_paragraphs(text) == [
        "Return the mean of the values.",
        "Parameters\nvalues : list of float\n    The numbers to take the mean of.",
        "An example follows::",
        "The empty list has no mean, and is refused.",
    ]
    assert pc.clean_paragraphs("Return x.") == [], "too short"


TEXTS = ["def area(width, height):\n    return width * height\n", "The area is the width times the height.\n"] * 20
SOME_VOCABULARY = 280


@pytest.fixture(scope="module")
def tokenizer():
    return pc.train_byte_level_bpe(TEXTS, SOME_VOCABULARY, model_max_length=64, progress=False)


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=60))
def test_every_text_comes_back(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_fixed_places_and_are_not_added(tokenizer):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 1)
    assert tokenizer.convert_ids_to_tokens(tokenizer("area")["input_ids"]) == ["are", "a"]
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]
    assert tokenizer.decode(tokenizer("area<|endoftext|>")["input_ids"], skip_special_tokens=True) == "area"


def test_words_numbers_and_indentation_are_cut_apart(tokenizer):
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("if x12345:\n        return it's")
    shown = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces]
    assert shown == ["if", " x", "123", "45", ":\n", "       ", " return", " it", "'s"]


def test_trainings_agree_and_the_vocabulary_is_as_large_as_asked_or_as_the_texts_allow(tokenizer):
    again = pc.train_byte_level_bpe(iter(TEXTS), SOME_VOCABULARY, progress=False)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) == SOME_VOCABULARY
    assert 258 < len(pc.train_byte_level_bpe(TEXTS, 5000, progress=False)) < 5000


def test_saved_tokenizer_is_loaded_by_transformers(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "  The height,\n\n\twidth ² and 中文  \n"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.model_max_length, loaded.eos_token_id, loaded.pad_token_id) == (64, 0, 1)


REFUSED = {
    "limit": (lambda: pc.build_python_corpus(max_characters_per_domain=10), "=10 holds no document: pass at least 10"),
    "fraction": (lambda: pc.build_python_corpus(held_out_fraction=1.0), "held_out_fraction=1.0 must lie between 0 an"),
    "missing": (lambda: pc.build_python_corpus(roots=["/no/such"]), "roots holds '/no/such', which is no folder"),
    "no room for bytes": (lambda: pc.train_byte_level_bpe(TEXTS, 257), "vocab_size=257 has no room for 256 bytes and"),
    "no text": (lambda: pc.train_byte_level_bpe(["", ""], 300, progress=False), "there is no text to train the token"),
    "no length": (lambda: pc.train_byte_level_bpe(TEXTS, 300, model_max_length=0), "model_max_length=0 must be at le"),
}


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
