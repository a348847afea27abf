"""Rules about how the files hang together. A rule takes the project's files and returns one line for each offence."""

import ast
import re
from collections import Counter, defaultdict
from pathlib import PurePosixPath

from tests.architecture.import_rules import modules_meant
from tests.helpers.source_tree import SourceFile


MAX_SCRIPT_LINES = 150
MAX_FILES_OF_FOLDER = 15
MAX_FILES_OF_PREFIX = 3
MIN_LINES_OF_ONE_IMPORTER = 300
MAX_FRAGMENTS = 10
_SCRIPTS = "hf_moe_cpt.scripts"
_SUITES = ("scripts/benchmarks/", "scripts/replication/")  # programs of many files


def scripts_are_entry_points(files: list[SourceFile]) -> list[str]:
    """What a script does lies in a room of the package; the script parses its options and calls it."""
    scripts = [file for file in files if file.path.startswith("scripts/") and file.path.count("/") == 1]
    lengths = {file.path: len(file.text.splitlines()) for file in scripts}
    return [f"{path} has {lines} lines" for path, lines in lengths.items() if lines > MAX_SCRIPT_LINES]


def nobody_imports_scripts(files: list[SourceFile]) -> list[str]:
    """The command names its script in a table; benchmarks and replications import the files of their own folder."""
    return [
        f"{file.path}:{found.line} imports {module}"
        for file in files
        if not file.is_test
        for found in file.imports
        for module in modules_meant(file, found)
        if (module == _SCRIPTS or module.startswith(f"{_SCRIPTS}.")) and not _same_suite(file, module)
    ]


def folders_are_not_crowded(files: list[SourceFile]) -> list[str]:
    """More than fifteen files want a folder of their own, and so does a prefix that four of them share."""
    code = [PurePosixPath(file.path) for file in files if not file.is_test and not file.path.endswith("/__init__.py")]
    folders = Counter(path.parent for path in code)
    prefixes = Counter((path.parent, path.stem.split("_")[0]) for path in code if "_" in path.stem)
    crowded = [f"{folder} has {count} files" for folder, count in folders.items() if count > MAX_FILES_OF_FOLDER]
    return crowded + [
        f"{folder}/{prefix}_* is {count} files: make it a folder"
        for (folder, prefix), count in prefixes.items()
        if count > MAX_FILES_OF_PREFIX
    ]


def files_are_no_fragments(files: list[SourceFile]) -> list[str]:
    """A file earns its place by two importers, a public name or 300 lines; listed only if more than ten do not."""
    code = {file.module: file for file in files if not file.is_test}
    importers = defaultdict(set)
    for file in code.values():
        for module in file.imported_modules():
            if module in code and module != file.module:
                importers[module].add(file.path)
    home = "".join(file.text for file in code.values() if file.path == "hf_moe_cpt/__init__.py")
    fragments = [
        f"{file.path} has {file.text.count(chr(10))} lines and one importer, {next(iter(importers[module]))}"
        for module, file in code.items()
        if len(importers[module]) == 1
        and file.text.count("\n") < MIN_LINES_OF_ONE_IMPORTER
        and not file.path.endswith("/__init__.py")
        and module not in home
    ]
    return fragments if len(fragments) > MAX_FRAGMENTS else []


def nothing_is_there_for_tests_alone(files: list[SourceFile]) -> list[str]:
    """A public function or class is used by some other code; `plain_*` is the definition beside a fast version."""
    used = {file.path: _words(file.nodes) for file in files if not file.is_test}
    elsewhere = {path: count for path, count in used.items() if not path.endswith("/__init__.py")}
    elsewhere |= {file.path: _called(file.nodes) for file in files if file.path.endswith("/__init__.py")}
    return [
        f"{file.path}:{node.lineno} {node.name} is used by nothing but tests"
        for file in files
        if not file.is_test and "/metrics/" not in file.path  # the library evaluate loads these by their path
        for node in file.tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not _is_exempt(node.name)
        if not used[file.path][node.name]
        and not any(count[node.name] for path, count in elsewhere.items() if path != file.path)
    ]


def _same_suite(file: SourceFile, module: str) -> bool:
    return any(
        file.path.startswith(suite) and module.startswith(f"hf_moe_cpt.{suite[:-1].replace('/', '.')}")
        for suite in _SUITES
    )


def _is_exempt(name: str) -> bool:
    return name == "main" or name.startswith(("_", "plain_"))


def _called(nodes: list[ast.AST]) -> Counter[str]:
    """What a package runs when it is imported; names that it hands on are no use of them."""
    return Counter(node.func.id for node in nodes if isinstance(node, ast.Call) and "id" in vars(node.func))


def _words(nodes: list[ast.AST]) -> Counter[str]:
    """How often a name is used: as a name, an attribute, an import, or in a short string, such as a table of names."""
    found: Counter[str] = Counter()
    for node in nodes:
        if isinstance(node, ast.Name):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update(alias.name.split(".")[-1] for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 200:
            found.update(re.findall(r"[A-Za-z_]\w+", node.value))
    return found
