"""The repository keeps its word: files that run alone, arrows that make no circle, commands that parse, tables that name what exists."""

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
from studies import bench
import eval as evaluation
import policy
import sample
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md")}
ALONE = ("grpo", "flow_grpo", "rewards", "geneval", "referees", "policy", "toy/shapes")
HOUSE = sorted([*ROOT.glob("*.py"), *(ROOT / "toy").glob("*.py")])
OURS = {p.stem for p in HOUSE}


@pytest.mark.parametrize("name", ALONE)
def test_a_copied_file_needs_nothing_of_ours(tmp_path, name):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    name = Path(name).name
    code = f"import sys, {name}; assert not set({sorted(OURS - {name})!r}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_concept_files_that_prove_themselves_run_alone(tmp_path):
    """flow_grpo.py; tests/test_grpo.py does the same with grpo.py."""
    shutil.copy(ROOT / "flow_grpo.py", tmp_path)
    flags = ["--out", str(tmp_path / "flow.png"), "--assert-reward"]
    subprocess.run([sys.executable, "flow_grpo.py", *flags], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "flow.png").stat().st_size > 10_000


def test_importing_reads_no_heavy_library():
    code = "import sys, grpo, flow_grpo, toy.shapes; assert not {'transformers', 'diffusers', 'open_clip', 'matplotlib', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# ---- the house ----


def name_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path):
    """The files of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & {name_of(p) for p in HOUSE}


def test_arrows_between_files_run_one_way():
    arrows = {name_of(p): imports(p) for p in HOUSE}
    while free := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in free}
    assert not arrows, f"a circle runs through {sorted(arrows)}"
    assert not imports(ROOT / "policy.py") and imports(ROOT / "checkpoint.py") == {"policy", "terminal"}


@pytest.mark.parametrize("path", HOUSE, ids=name_of)
def test_files_functions_and_lines_stay_within_their_sizes(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    assert len(lines) <= (550 if path.name == "train.py" else 650) and max(map(len, lines)) <= 140
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_readme_is_short():
    assert README.count("\n") <= 160


# ---- commands and tables ----


def commands():
    """Every command line in the README, the docs and the files' heads that starts one of our programs."""
    texts = [README, *DOCS.values()] + [(ROOT / f"{n}.py").read_text(encoding="utf-8").split('"""')[1] for n in ("train", "sample", "eval", "bench")]
    lines = [line.split(" #")[0].strip() for text in texts for line in re.findall(r"^\s*((?:pip install|torchrun|python) .*)$", text, re.M)]
    return sorted({part.strip() for line in lines for part in line.split("&&") if ".py" in part})


def test_there_are_commands_to_check():
    assert len(commands()) >= 12


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_parses(command, monkeypatch, tmp_path):
    words = shlex.split(command)
    script = next(i for i, w in enumerate(words) if w.endswith(".py"))
    name, argv = Path(words[script]).stem, words[script + 1:]
    assert (ROOT / words[script]).is_file()
    if name == "train":
        assert argv == ["recipes"] or recipes.parse(argv)
    elif name in ("sample", "eval", "bench"):
        ran, module = [], {"sample": sample, "eval": evaluation, "bench": bench}[name]
        doing = {"sample": ["run"], "bench": ["bench", "bench_release", "bench_rewards", "memory_table", "random_release"],
                 "eval": [inner for inner in vars(evaluation) if inner.startswith("run_")]}[name]
        for inner in doing:
            monkeypatch.setattr(module, inner, lambda *a, inner=inner: inner != "random_release" and ran.append(a))
        module.main(argv)
        assert len(ran) == 1
    else:
        subprocess.run([sys.executable, str(ROOT / words[script]), "--help"], check=True, capture_output=True)


def test_the_equation_table_names_functions_and_tests_that_exist():
    rows = re.findall(r"^\| .+ \| `(\w+)\.(\w+)` \| `(tests/\w+\.py)` \|$", DOCS["equations.md"], re.M)
    assert len(rows) >= 10
    for module, function, test in rows:
        assert hasattr(importlib.import_module(module), function), (module, function)
        assert function in (ROOT / test).read_text(encoding="utf-8"), (function, test)


def test_the_file_table_names_all_that_is_there():
    first = re.findall(r"^\| (`\w+(?:\.py|/)`[^|]*) \|", README, re.M)
    named = {name for cell in first for name in re.findall(r"`(\w+(?:\.py|/))`", cell)}
    assert named == {p.name for p in ROOT.glob("*.py")} | {"toy/"}


def test_the_phases_name_functions_that_exist():
    for module, function in re.findall(r" {2,}(\w+)\.(\w+)(?: {2,}|$)", README.split("```")[5], re.M):
        assert hasattr(importlib.import_module(module), function), (module, function)


def test_what_the_docs_quote_exists():
    for text in (README, *DOCS.values()):
        for name in re.findall(r"`((?:tests|toy|docs)/[\w/]+\.\w+)`", text) + re.findall(r"\]\((docs/[\w.]+)\)", text):
            assert (ROOT / name).exists(), name


def test_functions_that_stand_in_two_files_are_the_same():
    import flow_grpo
    import grpo
    assert inspect.getsource(grpo.clipped_surrogate) == inspect.getsource(flow_grpo.clipped_surrogate)
    body = lambda f: inspect.getsource(f.__wrapped__).split('"""')[2]
    assert body(policy.declare_torchvision_ops) == body(policy.declare_torchvision_ops)


def test_the_toy_stays_small_and_holds_no_pickle():
    files = [p for p in (ROOT / "toy").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 12 * 2**20
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_the_readme_has_no_gap_and_its_pictures_exist():
    for folder, text in ((ROOT, README), *((ROOT / "docs", text) for text in DOCS.values())):
        assert not re.search(r"@[A-Z]+@|TODO|TBD", text)
        assert all((folder / p).is_file() for p in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text))
    assert len(re.findall(r"!\[", README)) >= 1
