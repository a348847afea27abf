"""Rules about who imports whom. A rule takes the project's files and returns one line for each offence."""

import sys
from collections.abc import Iterator

from tests.architecture.rooms import NAMED, room_of
from tests.helpers.source_tree import PACKAGE_OF_FOLDER, Import, SourceFile


FRONT_DOOR = "hf_moe_cpt"
_FOLDERS_INSTALLED_ELSEWHERE = {folder for folder, package in PACKAGE_OF_FOLDER.items() if folder != package}


def rooms_import_only_what_the_table_allows(files: list[SourceFile]) -> list[str]:
    """Of ours: the room itself and its row; of others: Python's library and its row; tests are free."""
    return [
        f"{file.path}:{found.line} imports {module}, which its room {room_of(file.package)[0]} may not"
        for file, found in _imports_outside_tests(files)
        for module in modules_meant(file, found)
        if not _allowed(file, module)
    ]


def trainers_never_import_modeling_or_each_other(files: list[SourceFile]) -> list[str]:
    """They take any causal model; what two of them need belongs in common. Said twice, as it is the pillar."""
    offences = []
    for file, found in _imports_outside_tests(files):
        if not file.module.startswith("hf_moe_cpt.trainers."):
            continue
        own = ".".join(file.module.split(".")[:3])
        for module in modules_meant(file, found):
            other_trainer = _below(module, "hf_moe_cpt.trainers") and not (
                _below(module, own) or _below(module, "hf_moe_cpt.trainers.common")
            )
            if other_trainer or _below(module, "hf_moe_cpt.modeling"):
                offences.append(f"{file.path}:{found.line} imports {module}")
    return offences


def front_door_is_lazy(files: list[SourceFile]) -> list[str]:
    """The package and its command import at their top Python's library and files beside them: help is instant."""
    by_module = {file.module: file for file in files if file.package == FRONT_DOOR}
    pending, front = [FRONT_DOOR, f"{FRONT_DOOR}.__main__", f"{FRONT_DOOR}.cli"], set()
    while pending:
        module = pending.pop()
        if module in by_module and module not in front:
            front.add(module)
            pending += [found.module for found in by_module[module].imports if found.at_top]
    return [
        f"{by_module[module].path}:{found.line} imports {found.module} when it is imported"
        for module in sorted(front)
        for found in by_module[module].imports
        if found.at_top and found.module not in front and not _of_python(found.module)
    ]


def modeling_is_flat_with_sibling_imports(files: list[SourceFile]) -> list[str]:
    """The folder travels to the Hub alone: no folders in it, only `from .sibling import name`."""
    modeling = [file for file in files if file.path.startswith("modeling/")]
    siblings = {file.path.removeprefix("modeling/").removesuffix(".py") for file in modeling}
    offences = [f"{file.path} lies in a folder" for file in modeling if file.path.count("/") > 1]
    for file, found in _imports_outside_tests(modeling):
        if found.level == 0 and not _below(found.module, "hf_moe_cpt"):
            continue
        if found.level != 1 or found.module not in siblings:
            offences.append(f"{file.path}:{found.line} must import its siblings as `from .sibling import name`")
    return offences


def only_modeling_imports_relatively(files: list[SourceFile]) -> list[str]:
    """Everywhere else the full name says which room is meant."""
    return [
        f"{file.path}:{found.line} imports relatively: write the full name"
        for file in files
        for found in file.imports
        if found.level and not file.path.startswith("modeling/")
    ]


def kernels_start_no_threads(files: list[SourceFile]) -> list[str]:
    """A new thread has no CUDA context, and no tensor descriptor can be made in it: expert parallelism failed so."""
    return [
        f"{file.path}:{found.line} imports {found.module}: launch from the thread that calls"
        for file in files
        for found in file.imports
        if file.path.startswith("hf_moe_cpt/kernels/")
        and found.module.partition(".")[0] in ("threading", "concurrent")
    ]


def no_room_is_imported_as_a_top_level_name(files: list[SourceFile]) -> list[str]:
    """`import modeling` finds whatever anyone calls so; installed, our room is hf_moe_cpt.modeling."""
    return [
        f"{file.path}:{found.line} imports {found.module}: write hf_moe_cpt.{found.module}"
        for file in files
        for found in file.imports
        if found.level == 0 and found.module.partition(".")[0] in _FOLDERS_INSTALLED_ELSEWHERE
    ]


def _imports_outside_tests(files: list[SourceFile]) -> Iterator[tuple[SourceFile, Import]]:
    return ((file, found) for file in files if not file.is_test for found in file.imports)


def modules_meant(file: SourceFile, found: Import) -> list[str]:
    """Absolute names; `from package import room` means package.room if the table knows it."""
    package = file.package.split(".")
    start = ".".join(package[: len(package) - found.level + 1]) if found.level else ""
    module = ".".join(part for part in (start, found.module) if part)
    return [f"{module}.{name}" for name in found.names if f"{module}.{name}" in NAMED] or [module]


def _allowed(file: SourceFile, module: str) -> bool:
    name, room = room_of(file.package)
    if _of_python(module) or module.partition(".")[0] in room.others:
        return True
    in_own_room = _below(module, name) and room_of(module)[0] == name
    return in_own_room or any(_below(module, ours) for ours in room.ours)


def _below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _of_python(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names
