"""What setup.cfg cannot say: packages of folders that are mapped, and a README whose links hold on a package index."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup


MAPPED = ("hub_cards", "modeling", "scripts", "trainers")  # `package_dir` in setup.cfg says to where

README = Path("README.md").read_text(encoding="utf-8")


def packages_of(*folders: str) -> list[str]:
    """Every folder in them: those without __init__.py hold recipes, templates, pages and evaluate's metrics."""
    patterns = [pattern for folder in folders for pattern in (folder, f"{folder}.*")]
    return find_namespace_packages(include=patterns, exclude=["*__pycache__"])


def write_out(link: re.Match) -> str:
    """A link to a file leads nowhere on an index: its path is written out, for whoever has the source distribution."""
    text, path = link.groups()
    return f"`{path}`" if text == path else f"{text} (`{path}`)"


setup(
    packages=packages_of("hf_moe_cpt") + [f"hf_moe_cpt.{package}" for package in packages_of(*MAPPED)],
    long_description=re.sub(r"!?\[([^\]]+)\]\((?![a-z]+:)([^)#]+)(?:#[^)]*)?\)", write_out, README),
    long_description_content_type="text/markdown",
)
