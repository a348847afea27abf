"""English from a Python installation: docstrings, help topics and package descriptions, cleaned. Source: ours.

Cleaning goes by paragraph: code, doctests, tables and licences go, sentences and parameter descriptions stay.
"""

import ast
import re

from hf_moe_cpt.data.boilerplate import contains_licence_text


TOPICS = "pydoc_data/topics.py"  # texts of `help("...")`: chapters of the language reference
SMALLEST_LETTER_SHARE = 0.82  # letters and spaces among the characters of a paragraph; English lies near 0.95
SHORTEST_TEXT = 40  # characters of one cleaned docstring
_FENCED = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1[^\n]*$", re.DOTALL | re.MULTILINE)
_RULER = re.compile(r"^[ \t]*[-=~^*+#_|]{3,}[ \t]*\n?", re.MULTILINE)
_MARKUP = re.compile(r"<[^>]*>|!?\[!\[[^\n]*|^\.\. [^\n]*$|https?://\S+", re.MULTILINE)


def topic_texts(tree: ast.Module) -> dict[str, str]:
    """The dictionary `topics` of the help system's module: topic to text; empty if the module has none."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            return {name: text for name, text in topics.items() if isinstance(text, str)}
    return {}


def description_body(metadata: str) -> str:
    """The long description of a package: what follows the headers of its METADATA file."""
    return metadata.partition("\n\n")[2]


def clean_paragraphs(text: str) -> list[str]:
    """The paragraphs of a text that are English; empty if fewer than SHORTEST_TEXT characters of it are."""
    text = text.replace("\r\n", "\n").expandtabs()
    text = _RULER.sub("", _MARKUP.sub("", _FENCED.sub("", text)))
    kept, introduces_code = [], False
    for block in re.split(r"\n[ \t]*\n", text):
        paragraph = "\n".join(line.rstrip() for line in block.strip("\n").split("\n")).rstrip()
        is_literal = introduces_code and paragraph.startswith("   ")
        if paragraph and not is_literal:
            introduces_code = paragraph.endswith("::")
        if paragraph and not is_literal and is_english(paragraph):
            kept.append(paragraph)
    return kept if sum(map(len, kept)) >= SHORTEST_TEXT else []


def is_english(paragraph: str) -> bool:
    """Whether a paragraph is made of words: no doctest, code, table of figures, or licence."""
    visible = " ".join(paragraph.split())
    if visible.startswith((">>>", "...", "In [", "$ ", "@", "import ", "from ")) or ">>> " in visible:
        return False
    letters = len(re.sub(r"[^\w ]|[\d_]", "", visible))
    return letters >= SMALLEST_LETTER_SHARE * len(visible) and not contains_licence_text(visible)
