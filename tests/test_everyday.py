"""What an ordinary day does to a run: closed pipes and sessions, signals, two runs in one folder, other settings on resume, torn logs."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import sample
import train
from recipes import parse
from support.run import Log, Owner, Ranks, differences, read_rows, signals
from support.terminal import Terminal, one_line

ROOT = Path(train.__file__).parent
ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = ["--draw", "2", "--think", "0", "--ask", "0", "--edit", "0", "--kn", "0", "--sem", "0", "--group_size", "4", "--eval_every", "0"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def run(out, *more):
    train.train(parse([*SMALL, "--out", str(out), *map(str, more)]), ALONE)


def rows(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def steps(out):
    return [row["step"] for row in rows(out)[1:] if "loss" in row]


# ---- the terminal ----


def test_a_closed_pipe_costs_a_run_nothing(tmp_path):
    """The reader goes at once, as `| head` does; the run goes on to its end, saves and exports."""
    command = f"{sys.executable} train.py {' '.join(SMALL)} --steps 3 --out {tmp_path} 2>&1 | head -c 1; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT, env=ENV, capture_output=True).returncode == 0
    assert steps(tmp_path) == [0, 1, 2] and (tmp_path / "checkpoint.safetensors").exists() and (tmp_path / "policy" / "ema.safetensors").exists()


class Broken(io.StringIO):
    def __init__(self, error, file):
        super().__init__()
        self.error, self.file = error, file

    def write(self, text):
        raise self.error

    flush = write

    def fileno(self):
        return self.file.fileno()


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), OSError(28, "No space left on device")])
def test_a_write_that_fails_is_dropped_and_so_is_what_follows(tmp_path, error):
    with (tmp_path / "gone").open("w") as file:
        terminal = Terminal(Broken(error, file))
        assert terminal.write("a line") == 6
        file.write("nobody sees this")
        file.flush()
    assert (tmp_path / "gone").read_text() == ""                # it went to the null device


def test_a_terminal_that_knows_no_umlauts_gets_them_spelled():
    held = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Terminal(held).write("ein Stück")
    held.flush()
    assert held.buffer.getvalue() == b"ein St\\xfcck"


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "interrupted"), (ValueError("a\nb"), "x.py: a", None), (FloatingPointError("nan"), "x.py: nan", None),
    (UnicodeEncodeError("ascii", "é", 0, 1, "no"), "x.py: 'ascii' codec can't encode", None), (RecursionError(""), "x.py: RecursionError", None)])
def test_what_a_person_can_mend_ends_in_one_line(error, status, words, capsys):
    with pytest.raises(SystemExit) as left:
        with one_line("x.py"):
            raise error
    assert left.value.code == status if isinstance(status, int) else str(left.value.code).startswith(status) and "\n" not in left.value.code
    assert words is None or f"x.py: {words}\n" in capsys.readouterr().err


def test_what_nobody_expected_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), one_line("x.py"):
        1 / 0


@pytest.mark.parametrize("program, words", [("sample.py", [b"a red \xff circle"]), ("train.py", [b"--out", b"o\xff"])])
def test_odd_bytes_on_the_command_line_are_one_line(program, words):
    done = subprocess.run([sys.executable.encode(), program.encode(), *words], cwd=ROOT, env=ENV, capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"is not UTF-8 text" in done.stderr


def test_ctrl_c_while_a_program_loads_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sample, "load_policy", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    old = signal.signal(signal.SIGINT, signal.default_int_handler)      # a job in the background may ignore it
    try:
        with pytest.raises(SystemExit) as left:
            sample.main(["a red circle"])
    finally:
        signal.signal(signal.SIGINT, old)
    assert left.value.code == 130 and capsys.readouterr().err == "sample.py: interrupted\n"


# ---- signals ----


def test_every_signal_that_ends_a_session_is_noted_and_the_old_handlers_come_back():
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP
    old = [signal.getsignal(n) for n in numbers]
    with signals() as caught:
        for n in numbers:
            signal.raise_signal(n)
    assert caught == ["SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP"] and [signal.getsignal(n) for n in numbers] == old


def test_nohup_is_respected():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals() as caught:
            signal.raise_signal(signal.SIGHUP)
        assert caught == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_hangup_saves(tmp_path):
    process = subprocess.Popen([sys.executable, "train.py", *SMALL, "--steps", "400", "--out", str(tmp_path)], cwd=ROOT, env=ENV,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "log.jsonl").exists() or len(rows(tmp_path)) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0
    assert int(load_file(tmp_path / "checkpoint.safetensors")["step"]) == len(steps(tmp_path))


def test_a_signal_during_the_evaluation_saves_too(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda policy: signal.raise_signal(signal.SIGTERM) or {"draw": (0.5, 0.1)})
    run(tmp_path, "--steps", 5, "--eval_every", 5)
    assert int(load_file(tmp_path / "checkpoint.safetensors")["step"]) == 1


# ---- the folder ----


def test_a_folder_has_one_owner_at_a_time(tmp_path):
    first = Owner(tmp_path)
    with pytest.raises(ValueError, match=f"--out {tmp_path} is in use by another run"):
        train.begin(parse([*SMALL, "--out", str(tmp_path)]), ALONE)
    first.close()
    Owner(tmp_path).close()
    assert not list(tmp_path.iterdir())                         # nothing is left behind


def test_a_killed_owner_leaves_the_folder_free(tmp_path):
    code = "import sys, time, pathlib, run\nheld = run.Owner(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=ENV, stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(ValueError, match="in use"):
        Owner(tmp_path)
    process.kill()
    process.wait()
    Owner(tmp_path).close()


def test_a_run_that_fails_at_its_first_step_leaves_the_older_run_to_resume(tmp_path, monkeypatch):
    run(tmp_path, "--steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(train, "act", lambda *a: (_ for _ in ()).throw(ValueError("no")))
        with pytest.raises(ValueError, match="no"):
            run(tmp_path, "--steps", 2, "--seed", 1)
    run(tmp_path, "--steps", 3, "--resume")
    assert steps(tmp_path) == [0, 1, 2] and not (tmp_path / "previous").exists()


def test_a_log_that_cannot_be_written_costs_no_step(tmp_path, monkeypatch):
    write, calls = Log.__call__, []

    def full(self, **record):
        calls.append(record)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(self, **record)

    monkeypatch.setattr(Log, "__call__", full)
    with pytest.raises(OSError, match="No space"):
        run(tmp_path, "--steps", 9)
    assert int(load_file(tmp_path / "checkpoint.safetensors")["step"]) == 3


def test_a_rollout_that_is_not_finite_keeps_no_batch_of_the_step_before(tmp_path, monkeypatch):
    whole, calls = train.act, []

    def breaks(*args):
        calls.append(args)
        if len(calls) == 2:
            raise FloatingPointError("text logits are not finite")
        return whole(*args)

    monkeypatch.setattr(train, "act", breaks)
    with pytest.raises(FloatingPointError, match="step 1: text logits are not finite; stopped. Last good checkpoint: none yet"):
        run(tmp_path, "--steps", 2)
    assert not [k for k in load_file(tmp_path / "bad_step_0.safetensors") if k.startswith("draw.")]


# ---- resuming ----


def test_a_resumed_run_says_and_logs_what_differs(tmp_path, capsys):
    run(tmp_path, "--steps", 1)
    run(tmp_path, "--steps", 2, "--resume", "--seed", 9, "--lr_generation", 0.01, "--ins", 2, "--save_every", 7)
    (row,) = [row for row in rows(tmp_path) if "resumed" in row]
    assert row["resumed"] == {"ins": [1.0, 2.0], "lr_generation": [5e-4, 0.01], "seed": [0, 9]} and row["step"] == 1
    assert "resumes with other settings: ins 1.0 -> 2.0, lr_generation 0.0005 -> 0.01, seed 0 -> 9" in capsys.readouterr().err


def test_a_run_resumed_as_it_was_adds_nothing(tmp_path, capsys):
    run(tmp_path, "--steps", 1)
    run(tmp_path, "--steps", 2, "--resume", "--micro", 4)
    assert not [row for row in rows(tmp_path) if "resumed" in row] and "other settings" not in capsys.readouterr().err


def test_versions_commits_and_ranks_are_settings_too():
    head = dict(config=dict(recipe="lvrpo", rows=dict(draw=1)), versions=dict(torch="2"), commit="a", world=1)
    other = dict(config=dict(recipe="lvrpo", rows=dict(draw=2), out="x"), versions=dict(torch="3"), commit="b", world=2)
    assert differences(head, other) == {"commit": ["a", "b"], "draw": [1, 2], "torch": ["2", "3"], "world": [1, 2]}
    assert differences({}, {}) == {}


@pytest.mark.parametrize("damage, kept", [
    (lambda lines: [*lines[:2], lines[2][:30], *lines[3:]], [0, 2, 3]),                     # torn in the middle
    (lambda lines: ["\x00" * 9, "", *lines[1:], ""], [0, 1, 2, 3]),                         # blank lines, a lost head
    (lambda lines: [], []), (lambda lines: None, [])])                                      # a power cut; deleted
def test_a_damaged_or_missing_log_stops_no_resume_and_loses_no_other_row(tmp_path, damage, kept):
    run(tmp_path, "--steps", 4, "--save_every", 0)
    lines = damage((tmp_path / "log.jsonl").read_text().splitlines())
    (tmp_path / "log.jsonl").unlink() if lines is None else (tmp_path / "log.jsonl").write_text("\n".join(lines))
    run(tmp_path, "--steps", 5, "--resume")
    assert steps(tmp_path) == [*kept, 4] and "config" in rows(tmp_path)[0] and not (tmp_path / "previous").exists()


def test_a_log_that_is_deleted_while_a_run_goes_begins_anew_with_its_head(tmp_path):
    log = Log(tmp_path, {"seed": 3}, True, 1)
    log(step=0, loss=1.0)
    log.path.unlink()
    log(step=1, loss=1.0)
    head, others = read_rows(log.path)
    assert head["config"] == {"seed": 3} and [row["step"] for row in others] == [1]


def test_seconds_come_from_a_clock_that_is_never_set_back(tmp_path, monkeypatch):
    log = Log(tmp_path, {}, True, 1)
    for i in range(3):
        monkeypatch.setattr(time, "time", lambda i=i: -1e6 * i)
        log(step=i)
    seconds = [row["seconds"] for row in read_rows(log.path)[1]]
    assert seconds == sorted(seconds) and 0 <= seconds[0] < 60


def test_files_are_utf8_whatever_the_locale(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle", "tag": "größe"}\n', encoding="utf-8")
    env = ENV | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    command = [sys.executable, "train.py", *SMALL, "--sem", "1", "--ins", "0", "--prompts", str(tmp_path / "p.jsonl"), "--steps", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "größe")], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    assert "draw/reward" in rows(tmp_path / "größe")[1]
