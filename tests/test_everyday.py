"""What an ordinary day does to a run: closed pipes, signals, folders in use, torn logs."""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import ALONE, records

import eval as evaluation
import sample
import train
from recipes import parse
from support.disk import write_atomic
from support.run import Log, Owner, differences, read_rows, signals
from support.terminal import Terminal, new_file, one_line

ROOT = Path(train.__file__).parent
SMALL = (
    "--draw 2 --think 0 --ask 0 --edit 0 --kn 0 --sem 0 --group_size 4 --eval_every 0").split()
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def run(out, *more):
    train.train(parse([*SMALL, "--out", str(out), *map(str, more)]), ALONE)


def steps(out):
    return [row["step"] for row in records(out) if "loss" in row]


def step_of_checkpoint(out):
    return int(load_file(out / "checkpoint.safetensors")["step"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two steps."""
    out = tmp_path_factory.mktemp("finished")
    run(out, "--steps", 2)
    return out


@pytest.fixture
def older(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "older")


# ---- the terminal ----


class Broken(io.StringIO):
    def __init__(self, error, file):
        super().__init__()
        self.error, self.file = error, file

    def write(self, text):
        raise self.error

    flush = write

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")]
)
def test_a_write_that_fails_is_dropped_and_so_is_what_follows(tmp_path, error):
    with (tmp_path / "gone").open("w") as file:
        terminal = Terminal(Broken(error, file))
        assert terminal.write("a line") == 6
        file.write("nobody sees this")
        file.flush()
    assert (tmp_path / "gone").read_text() == ""                # it went to the null device


def test_a_terminal_that_knows_no_umlauts_gets_them_spelled():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal = Terminal(stream)
    terminal.write("ein Stück")
    terminal.flush()
    assert stream.buffer.getvalue() == b"ein St\\xfcck"


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("a\nb"), "x.py: a"), (FloatingPointError("nan"), "x.py: nan"),
        (RecursionError(""), "x.py: RecursionError"),
        (MemoryError(), "x.py: MemoryError; the memory is full, try fewer samples at once"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "x.py: DefaultCPUAllocator: can't allocate memory: 9 bytes; the memory is full, try "
            "fewer samples at once",
        ),
    ],
)
def test_what_a_person_can_mend_ends_in_one_line(error, words):
    with pytest.raises(SystemExit) as left, one_line("x.py"):
        raise error
    assert left.value.code == words


def test_what_nobody_expected_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line("x.py"):
        raise ZeroDivisionError


def test_ctrl_c_while_a_program_loads_is_one_line(monkeypatch, capsys):
    def interrupt(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "load_policy", interrupt)
    with pytest.raises(SystemExit) as left:
        sample.main(["a red circle"])
    assert left.value.code == 130
    assert capsys.readouterr().err == "sample.py: interrupted\n"


def test_a_file_to_write_may_lie_in_a_new_folder(tmp_path):
    path = new_file(str(tmp_path / "new" / "a.txt"))
    write_atomic(path, b"a")
    assert path.read_bytes() == b"a"
    for refused in (tmp_path, path / "b.txt"):
        with pytest.raises(argparse.ArgumentTypeError, match="is a folder, or lies below a file"):
            new_file(str(refused))


def test_the_backend_of_a_notebook_does_not_reach_a_run():
    """Jupyter sets MPLBACKEND for what it starts, where matplotlib_inline may not be installed."""
    code = "from support.plots import pyplot; print(pyplot().get_backend().lower())"
    env = ENV | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env) == b"agg\n"


# ---- signals ----


@pytest.fixture
def handlers():
    """The usual handlers, also under nohup or in the background, which make a process ignore some
    signals.
    """
    old = {
        n: signal.signal(n, signal.SIG_DFL)
        for n in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)
    }
    yield old
    for number, handler in old.items():
        signal.signal(number, handler)


def test_every_signal_that_ends_a_session_is_noted_and_the_old_handlers_come_back(handlers):
    with signals() as caught:
        for number in handlers:
            signal.raise_signal(number)
    assert caught == list(handlers)
    assert all(signal.getsignal(number) == signal.SIG_DFL for number in handlers)


def test_nohup_is_respected(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals() as caught:
        signal.raise_signal(signal.SIGHUP)
    assert caught == []
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_closed_pipe_costs_a_run_nothing_and_a_signal_saves_it(tmp_path):
    """The reader goes at once, as `| head` does; the run goes on until it is stopped."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *SMALL, "--steps", "400", "--out", tmp_path], cwd=ROOT,
        env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    log = tmp_path / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM               # so that no `&& next` goes on
    assert step_of_checkpoint(tmp_path) == len(steps(tmp_path))


def test_a_signal_during_the_evaluation_saves_too(tmp_path, monkeypatch, handlers):
    monkeypatch.setattr(
        evaluation, "evaluate_run", lambda run, step: signal.raise_signal(signal.SIGTERM))
    run(tmp_path, "--steps", 5, "--eval_every", 5)
    assert step_of_checkpoint(tmp_path) < 5


# ---- the folder ----


def test_a_folder_has_one_owner_at_a_time(tmp_path):
    first = Owner(tmp_path)
    with pytest.raises(ValueError, match=f"--out {tmp_path} is in use by another run"):
        train.begin(parse([*SMALL, "--out", str(tmp_path)]), ALONE)
    first.close()
    Owner(tmp_path).close()
    assert not list(tmp_path.iterdir())         # nothing is left


def test_a_log_that_cannot_be_written_costs_no_step(tmp_path, monkeypatch):
    write, calls = Log.__call__, []

    def full(self, **record):
        calls.append(record)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(self, **record)

    monkeypatch.setattr(Log, "__call__", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path, "--steps", 9)
    assert step_of_checkpoint(tmp_path) == 2


# ---- resuming ----


def test_a_resumed_run_says_and_logs_what_differs(older, capsys):
    run(older, "--steps", 3, "--resume", "--seed", 9, "--ins", 2, "--save_every", 7, "--micro", 4)
    _, logged = read_rows(older / "log.jsonl")
    (row,) = [row for row in logged if "resumed" in row]
    assert row["resumed"] == {"ins": [3.0, 2.0], "seed": [0, 9]}
    assert row["step"] == 2
    assert "resumes with other settings: ins 3.0 -> 2.0, seed 0 -> 9" in capsys.readouterr().err


def test_versions_commits_and_ranks_are_settings_too():
    old = dict(
        config=dict(recipe="lvrpo", rows=dict(draw=1)), versions=dict(torch="2"), commit="a",
        world=1)
    new = dict(
        config=dict(recipe="lvrpo", rows=dict(draw=2), out="x"), versions=dict(torch="3"),
        commit="b", world=2)
    assert differences(old, new) == {
        "commit": ["a", "b"], "draw": [1, 2], "torch": ["2", "3"], "world": [1, 2]}
    assert differences({}, {}) == {}


def test_weights_and_rows_are_compared_by_content(tmp_path):
    heads = []
    for name, number in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-20)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((40_000,), number)}, tmp_path / name / "ema.safetensors")
        (tmp_path / name / "notes.md").write_text(name)
        log = Log(tmp_path / "out", {"policy": str(tmp_path / name), "siglip": "a/hub"}, False, 1)
        heads.append(log.head)
    assert differences(*heads[:2]) == {}
    assert differences(*heads[1:]).keys() == {"policy"}


def tear(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["\x00" * 9, "", lines[1][:30], lines[2], ""]))


@pytest.mark.parametrize(
    "damage, kept", [(tear, [1]), (lambda path: path.write_text(""), []), (os.unlink, [])]
)
def test_a_damaged_or_missing_log_stops_no_resume_and_loses_no_other_row(older, damage, kept):
    damage(older / "log.jsonl")
    run(older, "--steps", 3, "--resume")
    assert steps(older) == [*kept, 2]
    first = (older / "log.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert "config" in json.loads(first)


def test_seconds_come_from_a_clock_that_is_never_set_back(tmp_path, monkeypatch):
    log = Log(tmp_path, {}, True, 1)
    for i in range(3):
        monkeypatch.setattr(time, "time", lambda i=i: -1e6 * i)
        log(step=i)
    seconds = [row["seconds"] for row in read_rows(log.path)[1]]
    assert seconds == sorted(seconds)
    assert 0 <= seconds[0] < 60
