"""Code without its English: a Python source with docstrings, comments and licence headers removed. Source: ours.

Docstrings are found in the syntax tree, comments by one regular expression that also knows every string literal; the
result is compiled again, so that a slip in either can only lose a file.
"""

import ast
import re
import warnings

from hf_moe_cpt.data.python_literals import LITERAL
from hf_moe_cpt.data.python_syntax import is_text, statement_blocks


_COMMENT = r"(?P<line>^[ \t]*\#[^\n]*\n?)|(?P<tail>[ \t]*\#[^\n]*)"
_LITERAL_OR_COMMENT = re.compile(f"{LITERAL}|{_COMMENT}", re.DOTALL | re.MULTILINE)
_LITERAL_OR_GAP = re.compile(rf"{LITERAL}|(?P<gap>\n(?:[ \t]*\n){{3,}})", re.DOTALL)
_GENERATED = re.compile(
    r"@generated|auto-?\s?generated|\bgenerated (?:by|from|automatically|with)\b|do not (?:edit|modify)", re.IGNORECASE
)

SHORTEST_CODE = 300  # characters
LONGEST_LINE = 400
LONGEST_MEAN_LINE = 100
SMALLEST_LETTER_SHARE = 0.5  # of the visible characters; tables of numbers and escapes lie below


def is_generated(source: str) -> bool:
    """Whether the file says in its first lines that a program wrote it."""
    return _GENERATED.search(source, 0, 2_000) is not None


def is_worth_learning(code: str) -> bool:
    """Whether stripped code is neither a fragment, nor minified, nor a table of data."""
    if len(code) < SHORTEST_CODE:
        return False
    lines = code.split("\n")
    if max(map(len, lines)) > LONGEST_LINE or len(code) / len(lines) > LONGEST_MEAN_LINE:
        return False
    visible = len(code) - sum(map(code.count, " \t\n"))
    return len(re.sub(r"[\W\d_]+", "", code)) >= SMALLEST_LETTER_SHARE * visible


def strip_docstrings_and_comments(source: str, tree: ast.Module) -> str | None:
    """The source without bare strings and comments, formatting kept; None if the result does not compile.

    tree: `ast.parse(source)`. A block that was nothing but a docstring becomes `pass`.
    """
    code = _without_comments(_without_bare_strings(source, tree))
    return code if compiles(code) else None


def compiles(code: str) -> bool:
    """Whether this Python accepts the code; nothing of it runs, and its warnings concern nobody here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(code, "<stripped>", "exec", dont_inherit=True)  # a third of the time of ast.parse
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _without_comments(source: str) -> str:
    """Cut comments, with the line where nothing else stands on it; gaps shrink to two empty lines."""

    def cut(match: re.Match) -> str:
        return "" if match.lastgroup in ("line", "tail") else match.group()

    source = _LITERAL_OR_COMMENT.sub(cut, source)
    source = _LITERAL_OR_GAP.sub(lambda match: "\n\n\n" if match.lastgroup == "gap" else match.group(), source)
    return source.strip("\n") + "\n"


def _without_bare_strings(source: str, tree: ast.Module) -> str:
    """Cut bare string statements; `pass` takes the place of one that was a whole block or shares its line."""
    found: list[tuple[ast.stmt, bool]] = []
    for owner, block in statement_blocks(tree):
        texts = [statement for statement in block if is_text(statement)]
        is_whole_block = len(texts) == len(block) and not isinstance(owner, ast.Module)
        found += [(text, is_whole_block and text is texts[0]) for text in texts]
    lines = source.split("\n")
    # From the end of the file, so that lines and columns of those still to cut stay true.
    for text, must_fill in sorted(found, key=lambda pair: (pair[0].lineno, pair[0].col_offset), reverse=True):
        _cut(lines, text, must_fill)
    return "\n".join(lines)


def _cut(lines: list[str], text: ast.stmt, must_fill: bool) -> None:
    """Remove one bare string from the lines in place; columns of the syntax tree count UTF-8 bytes."""
    first, last = text.lineno - 1, text.end_lineno - 1
    before = lines[first].encode()[: text.col_offset].decode()
    after = lines[last].encode()[text.end_col_offset :].decode()
    alone = not before.strip() and (not after.strip() or after.lstrip().startswith("#"))
    keeps_line = must_fill or not alone
    lines[first : last + 1] = [before + "pass" + ("" if alone else after)] if keeps_line else []
