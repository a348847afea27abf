"""Names that a package imports when somebody first asks for them, so that one name loads no more than it needs."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` (PEP 562) of a package. names: for each module those that it is the home of.

    A name that was asked for is a plain attribute afterwards; an unknown one raises AttributeError.
    """
    home_of_name = {name: module for module, its_names in names.items() for name in its_names}

    def get(name: str) -> object:
        if name not in home_of_name:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home_of_name[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted({*vars(sys.modules[package]), *home_of_name})
