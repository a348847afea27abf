"""Read the project's Python files as syntax trees, for rules about the code; nothing is run. Source: ours."""

import ast
import gc
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path


PROJECT = Path(__file__).resolve().parents[2]

# The folders of the repository and the packages they are installed as.
PACKAGE_OF_FOLDER = {
    "hf_moe_cpt": "hf_moe_cpt",
    "modeling": "hf_moe_cpt.modeling",
    "trainers": "hf_moe_cpt.trainers",
    "scripts": "hf_moe_cpt.scripts",
    "hub_cards": "hf_moe_cpt.hub_cards",
    "tests": "tests",
}


@dataclass(frozen=True)
class Import:
    """One imported module. `from a.b import c` has module "a.b" and names ("c",); `level` counts leading dots."""

    module: str
    names: tuple[str, ...]
    level: int
    line: int
    at_top: bool  # runs when the file is imported: neither inside a function nor under TYPE_CHECKING


@dataclass(frozen=True)
class SourceFile:
    """A Python file: where it lies (posix path from the project's root), its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Dotted name it is imported as, such as "hf_moe_cpt.trainers.cpt.cpt_trainer"."""
        folder, _, rest = self.path.partition("/")
        parts = [PACKAGE_OF_FOLDER[folder], *rest.removesuffix(".py").split("/")]
        return ".".join(parts).removesuffix(".__init__")

    @property
    def package(self) -> str:
        """Dotted name of the folder it lies in."""
        return self.module if self.path.endswith("/__init__.py") else self.module.rpartition(".")[0]

    @property
    def is_test(self) -> bool:
        return self.path.startswith("tests/")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Every node of the tree; rules share the walk."""
        return list(ast.walk(self.tree))

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method, nested ones too."""
        return (node for node in self.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    def comments(self) -> Iterator[tuple[int, str]]:
        """(line, text) of each comment; the inside of strings does not count."""
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of the file, those inside functions too, in no particular order."""
        found, pending = [], [(self.tree, True)]
        while pending:
            node, at_top = pending.pop()
            if isinstance(node, ast.Import):
                found += [Import(alias.name, (), 0, node.lineno, at_top) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = tuple(alias.name for alias in node.names)
                found.append(Import(node.module or "", names, node.level, node.lineno, at_top))
            at_top = at_top and not _runs_late(node)
            pending += [(child, at_top) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
        return found

    def imported_modules(self) -> set[str]:
        """Absolute dotted names of everything imported; `from a import b` gives both a and a.b."""
        names = set()
        for found in self.imports:
            base = _absolute(self.package, found.module, found.level)
            names |= {base, *(f"{base}.{name}" for name in found.names)}
        return names


def _absolute(package: str, module: str, level: int) -> str:
    parts = package.split(".")
    return ".".join([*(parts[: len(parts) - level + 1] if level else []), *([module] if module else [])])


def _runs_late(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return True
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def read_source(path: Path, root: Path = PROJECT) -> SourceFile:
    """Parse one file. A file that is not valid Python raises SyntaxError with its name."""
    text = path.read_text(encoding="utf-8")
    return SourceFile(path.relative_to(root).as_posix(), text, ast.parse(text, filename=str(path)))


@lru_cache
def read_project(root: Path = PROJECT) -> list[SourceFile]:
    """Every Python file of the known folders, sorted by path; read once in a process."""
    paths = sorted(path for folder in PACKAGE_OF_FOLDER for path in (root / folder).rglob("*.py"))
    gc.disable()  # trees are many small objects that stay: looking through them in between doubles the time
    try:
        return [read_source(path, root) for path in paths]
    finally:
        gc.enable()
