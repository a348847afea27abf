"""Recipes by name: the settings of whole runs that come with the package, in a checkout and in a wheel alike."""

from importlib.resources import files
from pathlib import Path


RECIPE_PREFIX = "recipe:"


def path_of_config(config: str) -> str:
    """The file that `--config` names: that of a recipe for `recipe:surgery_safe`, else the path that was given.

    Raises ValueError for a recipe that does not exist, with the names of those that do.
    """
    if not config.startswith(RECIPE_PREFIX):
        return config
    name = config.removeprefix(RECIPE_PREFIX).removesuffix(".yaml")
    recipes = {path.stem: path for path in Path(str(files("hf_moe_cpt.scripts"))).glob("recipes/*.yaml")}
    if name not in recipes:
        raise ValueError(f"--config {config!r}: no recipe has this name, choose from {', '.join(sorted(recipes))}.")
    return str(recipes[name])
