"""What setup.cfg cannot say: packages of folders that are mapped, and a README whose links hold on a package index."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup


MAPPED = ("hub_cards", "modeling", "scripts", "trainers")  # `package_dir` in setup.cfg says to where

README = Path("README.md").read_text(encoding="utf-8")

inside = find_packages(include=["hf_moe_cpt", "hf_moe_cpt.*"])
inside += find_namespace_packages(include=["hf_moe_cpt.metrics.*"])  # evaluate's folders, without __init__.py
mapped = find_packages(include=[name for folder in MAPPED for name in (folder, f"{folder}.*")])


def write_out(link: re.Match) -> str:
    """A link to a file leads nowhere on an index: its path is written out, for whoever has the source distribution."""
    text, path = link.groups()
    return f"`{path}`" if text == path else f"{text} (`{path}`)"


setup(
    packages=inside + [f"hf_moe_cpt.{package}" for package in mapped],
    long_description=re.sub(r"\[([^\]]+)\]\((?![a-z]+:)([^)#]+)(?:#[^)]*)?\)", write_out, README),
    long_description_content_type="text/markdown",
)
