"""Rules about the shape of a file. A rule takes the project's files and returns one line for each offence."""

import ast
import re
from collections.abc import Iterator

from tests.helpers.source_tree import SourceFile


MAX_FUNCTION_LINES = 80
_ENVIRONMENT = {"environ", "getenv", "environb"}
MAX_BLOCKS = 5
MIN_DOCUMENTED = 0.90
MIN_TYPED = 0.95
_UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
_NAMES_THAT_SAY_NOTHING = {"helper", "misc", "util", "utils", "stuff"}
_BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def functions_fit_their_limit(files: list[SourceFile]) -> list[str]:
    return [
        f"{file.path}:{function.lineno} {function.name} has {_length(function)} lines"
        for file in files
        for function in file.functions()
        if _length(function) > MAX_FUNCTION_LINES
    ]


def blocks_are_not_nested_deeply(files: list[SourceFile]) -> list[str]:
    return [
        f"{file.path}:{function.lineno} {function.name} nests {depth} blocks"
        for file in files
        for function in file.functions()
        if (depth := _depth(function)) > MAX_BLOCKS
    ]


def files_open_with_a_sentence(files: list[SourceFile]) -> list[str]:
    return [
        f"{file.path} has no docstring that ends a sentence"
        for file in files
        if not re.search(r"[.:?)]", ast.get_docstring(file.tree) or "")
    ]


def names_of_files_say_something(files: list[SourceFile]) -> list[str]:
    return [
        f"{file.path} has a name that says nothing"
        for file in files
        if _NAMES_THAT_SAY_NOTHING & set(re.split(r"[/_.]", file.path))
    ]


def users_are_never_met_with_assert(files: list[SourceFile]) -> list[str]:
    """`python -O` removes assertions, and their messages are for us: raise ValueError."""
    return [f"{file.path}:{node.lineno} asserts" for file, node in _nodes(files, ast.Assert) if not file.is_test]


def no_error_is_swallowed(files: list[SourceFile]) -> list[str]:
    """Neither `except:` nor a handler of Exception or BaseException that raises nothing."""
    return [
        f"{file.path}:{node.lineno} catches everything"
        for file, node in _nodes(files, ast.ExceptHandler)
        if node.type is None
        or (
            ast.unparse(node.type) in ("Exception", "BaseException")
            and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        )
    ]


def no_environment_variable_is_read(files: list[SourceFile]) -> list[str]:
    """A number must not depend on them."""
    named = [
        f"{file.path}:{node.lineno} uses os.{node.attr}"
        for file, node in _nodes(files, ast.Attribute)
        if not file.is_test and node.attr in _ENVIRONMENT and ast.unparse(node.value) == "os"
    ]
    imported = [
        f"{file.path}:{found.line} imports {', '.join(found.names)} from os"
        for file in files
        for found in file.imports
        if not file.is_test and found.module == "os" and _ENVIRONMENT & set(found.names)
    ]
    return named + imported


def nothing_is_left_unfinished(files: list[SourceFile]) -> list[str]:
    marked = [
        f"{file.path}:{line} {text}"
        for file in files
        if _UNFINISHED.search(file.text)
        for line, text in file.comments()
        if _UNFINISHED.search(text)
    ]
    return marked + [
        f"{file.path}:{node.lineno} raises NotImplementedError"
        for file, node in _nodes(files, ast.Raise)
        if not file.is_test and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc)
    ]


def public_functions_are_documented(files: list[SourceFile]) -> list[str]:
    """The offences are listed only if more than a tenth of all public functions has no docstring."""
    public = [(file, f) for file, f in _public_functions(files) if not f.name.startswith("_")]
    bare = [f"{file.path}:{f.lineno} {f.name} has no docstring" for file, f in public if not ast.get_docstring(f)]
    return bare if len(bare) > (1 - MIN_DOCUMENTED) * len(public) else []


def arguments_are_typed(files: list[SourceFile]) -> list[str]:
    """The offences are listed only if more than a twentieth of all arguments has no type; Triton types its own."""
    functions = [(file, f) for file, f in _public_functions(files) if not _is_kernel(f)]
    arguments = [(file, f, argument) for file, f in functions for argument in _arguments(f)]
    bare = [
        f"{file.path}:{f.lineno} {f.name}: {argument.arg} has no type"
        for file, f, argument in arguments
        if argument.annotation is None
    ]
    return bare if len(bare) > (1 - MIN_TYPED) * len(arguments) else []


def _is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is compiled by Triton, which reads only `tl.constexpr` from annotations."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def _nodes(files: list[SourceFile], kind: type) -> Iterator[tuple[SourceFile, ast.AST]]:
    return ((file, node) for file in files for node in file.nodes if isinstance(node, kind))


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def _depth(node: ast.AST) -> int:
    """The most blocks around any statement; an `elif` is no deeper than its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        deepest = max(deepest, _depth(child) + (isinstance(child, _BLOCKS) and not is_elif))
    return deepest


def _public_functions(files: list[SourceFile]) -> Iterator[tuple[SourceFile, ast.FunctionDef | ast.AsyncFunctionDef]]:
    return ((file, function) for file in files if not file.is_test for function in file.functions())


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    spec = function.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    return [argument for argument in named if argument.arg not in ("self", "cls")]
