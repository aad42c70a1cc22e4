"""Marks of the recipes: a `p` is the paper's value, as paper_values.json has it with its place; a `d` names the paper's."""

import json
import re
from pathlib import Path

import pytest

from recipes import RECIPES, SCALES, TOKEN_SCALES, parse, recipe_table, settings_of

HERE = Path(__file__).parent
PAPERS = json.loads((HERE / "paper_values.json").read_text(encoding="utf-8"))
at_every_scale = pytest.mark.parametrize("scale", SCALES)
of_every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@at_every_scale
@of_every_recipe
def test_what_is_marked_p_is_the_papers_value(recipe, scale):
    for name, (value, mark) in settings_of(recipe, scale).items():
        if mark == "p":
            assert PAPERS[recipe][scale][name]["value"] == value, name


@at_every_scale
@of_every_recipe
def test_a_run_takes_every_value_that_is_written_down_as_the_papers(recipe, scale):
    """Those that come from the scale or a default too."""
    if recipe == "unifpo" and scale in TOKEN_SCALES:
        pytest.skip("image tokens have no flow steps")
    cfg = parse(["--recipe", recipe], scale)
    taken = vars(cfg) | cfg.rows | cfg.weights
    for name, paper in PAPERS[recipe][scale].items():
        assert taken[name] == paper["value"], name
        assert paper["where"]


@at_every_scale
@of_every_recipe
def test_every_other_mark_is_o_or_names_what_the_paper_has(recipe, scale):
    for name, (_, mark) in settings_of(recipe, scale).items():
        assert re.fullmatch(r"p|o|d: \S.*", mark), name


@at_every_scale
def test_the_page_shows_the_table_as_it_is(scale):
    page = (HERE.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert recipe_table(scale) in page
