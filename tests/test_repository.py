"""The repository keeps its word: files that run alone, README commands that parse, tables that name what exists."""

import inspect
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import bench
import eval as evaluation
import policy
import rewards
import sample
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()
ALONE = ("grpo", "flow_grpo", "rewards", "policy", "toy/shapes")
OURS = {p.stem for p in ROOT.glob("*.py")}


@pytest.mark.parametrize("name", ALONE)
def test_a_copied_file_needs_nothing_of_ours(tmp_path, name):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    name = Path(name).name
    code = f"import sys, {name}; assert not {sorted(OURS - {name})!r} or not set({sorted(OURS - {name})!r}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_concept_files_that_prove_themselves_run_alone(tmp_path):
    for name, flags in (("grpo", ["--assert-reward", "0.9"]), ("flow_grpo", ["--out", str(tmp_path / "flow.png"), "--assert-reward"])):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
        subprocess.run([sys.executable, f"{name}.py", *flags], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "flow.png").stat().st_size > 10_000


def test_importing_reads_no_heavy_library():
    code = "import sys, grpo, flow_grpo, toy.shapes; assert not {'transformers', 'diffusers', 'open_clip', 'matplotlib', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def commands():
    """Every command line in the README's and the files' fenced or indented examples that starts one of our programs."""
    texts = [README] + [(ROOT / f"{n}.py").read_text().split('"""')[1] for n in ("train", "sample", "eval", "bench")]
    lines = [line.split(" #")[0].strip() for text in texts for line in re.findall(r"^\s*((?:pip install|torchrun|python) .*)$", text, re.M)]
    return sorted({part.strip() for line in lines for part in line.split("&&") if ".py" in part})


def test_there_are_commands_to_check():
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_parses(command, monkeypatch, tmp_path):
    words = shlex.split(command)
    script = next(i for i, w in enumerate(words) if w.endswith(".py"))
    name, argv = Path(words[script]).stem, words[script + 1:]
    assert (ROOT / f"{name}.py").is_file()
    if name == "train":
        assert argv == ["recipes"] or train.parse(argv)
    elif name in ("sample", "eval", "bench"):
        ran, zero = [], {k: (0.0, 0.0) for k in ("draw", "think", "ask", "draw/held_out", "ask/held_out", "layout_entropy", "pairwise_distance")}
        module = {"sample": sample, "eval": evaluation, "bench": bench}[name]
        for inner in ("run", "plot", "bench", "bench_release", "memory_table", "evaluate"):
            if hasattr(module, inner):
                monkeypatch.setattr(module, inner, lambda *a, **k: ran.append(a) or zero)
        if name == "bench":
            monkeypatch.setattr(module, "random_release", lambda device: None)
        if name == "eval":
            toy = SimpleNamespace(config=SimpleNamespace(llm={"hidden_size": 128}))
            monkeypatch.setattr(module, "load_policy", lambda *a, **k: toy)
            argv = [*argv, "--out", str(tmp_path / "out.json")]
        module.main(argv)
        assert len(ran) == 1
    else:
        subprocess.run([sys.executable, str(ROOT / f"{name}.py"), "--help"], check=True, capture_output=True)


def test_the_equation_table_names_functions_and_tests_that_exist():
    rows = re.findall(r"^\| .+ \| `(\w+)\.(\w+)` \| `(tests/\w+\.py)` \|$", README, re.M)
    assert len(rows) >= 10
    for module, function, test in rows:
        assert hasattr(importlib.import_module(module), function), (module, function)
        assert function in (ROOT / test).read_text(), (function, test)


def test_the_file_table_names_what_is_there():
    for name in re.findall(r"^\| `(\w+(?:\.py|/))` \|", README, re.M):
        assert (ROOT / name).exists(), name


def test_functions_that_stand_in_two_files_are_the_same():
    import flow_grpo
    import grpo
    assert inspect.getsource(grpo.clipped_surrogate) == inspect.getsource(flow_grpo.clipped_surrogate)
    body = lambda f: inspect.getsource(f.__wrapped__).split('"""')[2]
    assert body(policy.declare_torchvision_ops) == body(rewards.declare_torchvision_ops)


def test_the_assets_stay_small_and_hold_no_pickle():
    files = [p for p in (ROOT / "toy").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) < 12 * 2**20
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_the_readme_has_no_gap_and_its_pictures_exist():
    assert not re.search(r"@[A-Z]+@|TODO|TBD", README)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert len(pictures) >= 2 and all((ROOT / p).is_file() for p in pictures)
