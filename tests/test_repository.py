"""The repository keeps its word: files that run alone, a house without circles, commands that
parse, names that exist.
"""

import argparse
import ast
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import recipes
import train

ROOT = Path(train.__file__).parent
ROOMS = ("referees", "studies", "support", "toy")
HOUSE = sorted(
    [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))])
CORE = ("grpo", "flow_grpo", "rewards", "policy", "sample", "train")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def run(command, folder):
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


# ---- files that can be copied ----


def test_a_copied_file_needs_nothing_of_ours(tmp_path):
    """Each is imported from an empty folder of its own."""
    code = "import importlib, sys\n"
    for name in ("grpo", "flow_grpo", "rewards", "policy", "toy/shapes"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        shutil.copy(ROOT / f"{name}.py", folder)
        code += f"sys.path[0] = {str(folder)!r}\n"
        code += f"importlib.import_module({folder.name!r})\n"
        code += f"del sys.modules[{folder.name!r}]\n"
    run(["-c", code], tmp_path)


@pytest.mark.parametrize("line", ["grpo.py", "flow_grpo.py --out flow.png"])
def test_a_copied_file_that_proves_itself_runs_alone_and_learns(tmp_path, line):
    name, *flags = line.split()
    shutil.copy(ROOT / name, tmp_path)
    rewards = re.findall(r"reward (\d\.\d+)", run(["-I", name, *flags], tmp_path))
    assert float(rewards[0]) < 0.6 < 0.8 < float(rewards[-1])
    assert not flags or (tmp_path / "flow.png").stat().st_size > 10_000


@pytest.mark.parametrize("ours, others", [
    ("grpo, flow_grpo, toy.shapes", "transformers diffusers open_clip matplotlib PIL"),
    ("sample", "toy referees rewards studies")])
def test_importing_files_of_ours_reads_no_library_or_room_that_they_do_not_need(ours, others):
    run(["-c", f"import sys, {ours}; assert not sys.modules.keys() & set({others.split()!r})"], ROOT)


# ---- the house ----


def test_the_top_level_is_the_card_with_tasks_recipes_and_janus():
    card = {*CORE, "eval", "tasks", "recipes", "janus"}
    assert {path.stem for path in ROOT.glob("*.py")} == card


def imports(path):
    """The files of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & {name_of(other) for other in HOUSE}


def test_arrows_between_files_run_one_way():
    arrows = {name_of(path): imports(path) for path in HOUSE}
    while free := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in free}
    assert not arrows, f"a circle runs through {sorted(arrows)}"


def without_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def is_table(node):
    """Whether a statement of a file is a table of data, which is no code."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return False
    if isinstance(node.value, ast.Call):
        return getattr(node.value.func, "id", "") == "dict"
    return isinstance(node.value, (ast.Dict, ast.List, ast.Tuple, ast.Set))


def density(tree):
    """Syntax nodes per statement of a file's code, without docstrings and tables."""
    marks = (ast.expr_context, ast.operator, ast.boolop, ast.unaryop, ast.cmpop)
    code = [node for top in tree.body if not is_table(top) for node in ast.walk(top)]
    return sum(not isinstance(node, marks) for node in code) / sum(
        isinstance(node, ast.stmt) for node in code)


@pytest.mark.parametrize("path", HOUSE, ids=name_of)
def test_one_idea_stands_on_a_line(path):
    text = path.read_text(encoding="utf-8")
    lines, tree = text.split("\n"), without_docstrings(ast.parse(text))
    assert max(map(len, lines)) <= 110
    assert sum(len(line) > 100 for line in lines) <= 0.05 * len(lines)
    assert density(tree) <= (9 if name_of(path) in CORE else 10)
    named_lambdas = {(ast.Assign, ast.Lambda), (ast.AnnAssign, ast.Lambda)}
    for node in ast.walk(tree):
        pair = type(node), type(getattr(node, "value", None))
        assert pair not in named_lambdas | {(ast.Expr, ast.Tuple)}, f"line {node.lineno}: {pair}"
        if isinstance(node, ast.IfExp):
            inside = [inner for inner in ast.walk(node) if isinstance(inner, ast.IfExp)]
            assert len(inside) == 1, f"line {node.lineno}: a condition inside a condition"


def test_the_toy_stays_small_and_holds_no_pickle():
    paths = [path for path in (ROOT / "toy").rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in paths) < 14 * 2**20
    assert not {path.suffix for path in paths} & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


# ---- commands ----


def head_of(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def commands():
    """What starts one of our programs in README, docs and heads of files, on a line of its own or
    in backticks.
    """
    found = set()
    for text in (README, *DOCS.values(), *map(head_of, HOUSE)):
        text = text.replace("\\\n", " ")
        lines = re.findall(r"^\s*((?:pip install|torchrun|python) .*)$", text, re.M)
        lines += re.findall(r"`((?:torchrun|python) [^`]+)`", text)
        for line in lines:
            parts = line.split(" #")[0].split("&&")
            found |= {" ".join(part.split()) for part in parts if ".py" in part or " -m " in part}
    return sorted(found)


class Parsed(BaseException):
    """Raised once a command line has been read, so that nothing runs."""


@pytest.mark.parametrize("command", commands())
def test_every_command_parses(command, monkeypatch):
    module, file, flags = re.search(r"(?:-m (\S+)|(\S+)\.py)(.*)", command).groups()
    name, argv = module or file.replace("/", "."), shlex.split(flags)
    assert name in map(name_of, HOUSE)
    if "--help" in argv:
        return
    if name == "train":
        assert argv == ["recipes"] or recipes.parse(argv)
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [name, *argv])
    module = importlib.import_module(name)
    if "ArgumentParser(" in inspect.getsource(module) or "Arguments(" in inspect.getsource(module):
        with pytest.raises(Parsed):
            module.main()


# ---- README and docs ----


def test_the_readme_opens_with_a_command_and_has_short_tables():
    lines = README.split("\n")
    cells = [cell for line in lines if line.startswith("|") for cell in line.split("|")]
    rows = [line for line in lines if line.startswith("|") and not re.match(r"^\|[\s:|-]+$", line)]
    assert "pip install -r requirements.txt" in "\n".join(lines[:20])
    assert max(map(len, cells), default=0) <= 64
    assert len(rows) <= 24
    assert len(lines) <= 121


def test_files_that_readme_and_docs_name_exist():
    for text in (README, *DOCS.values()):
        for file in re.findall(r"`((?:[\w]+/)*\w+\.(?:py|md|png))`", text):
            assert (ROOT / file).exists(), file


def test_functions_that_the_readme_names_exist():
    modules = {name_of(path).split(".")[-1]: name_of(path) for path in HOUSE}
    for module, name in re.findall(r"\b(\w+)\.(\w{3,})\b", README):
        if module in modules:
            assert hasattr(importlib.import_module(modules[module]), name), (module, name)


def test_pictures_and_links_lead_somewhere():
    for folder, text in ((ROOT, README), *((ROOT / "docs", text) for text in DOCS.values())):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (folder / target).exists(), target
        assert not re.search(r"@[A-Z]+@|TODO|TBD", text)
    assert "![" in README


def test_the_equation_table_names_functions_and_tests_that_exist():
    rows = re.findall(
        r"^\| .+ \| `([\w.]+)\.(\w+)` \| `(tests/\w+\.py)` \|$", DOCS["equations.md"], re.M)
    assert len(rows) == DOCS["equations.md"].count("\n|") - 2
    for module, function, test in rows:
        assert hasattr(importlib.import_module(module), function), (module, function)
        assert function in (ROOT / test).read_text(encoding="utf-8"), (function, test)
