"""Settings: where each comes from, what is refused before anything is loaded, and that
every recipe learns.
"""

import re
import sys
from pathlib import Path

import pytest
from tiny_runs import ALONE, settings, small, words

import train
from recipes import (
    RECIPES, SCALES, SETTINGS, TOKEN_SCALES, Config, check, describe, recipe_table, settings_of)
from rewards import REWARDS
from tasks import TASKS

ROOT = Path(train.__file__).parent


# ---- the recipes ----


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_run_that_can_be_at_every_scale(recipe, scale):
    if recipe == "unifpo" and scale in TOKEN_SCALES:
        with pytest.raises(ValueError, match="--recipe unifpo is of flow steps"):
            settings("--recipe", recipe, "--scale", scale)
        return
    cfg = settings("--recipe", recipe, "--scale", scale)
    check(cfg, 1)
    assert sum(cfg.rows.values()) > 0
    assert cfg.steps > 0


def test_the_toys_captioner_compares_by_rule_however_its_path_is_written(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert settings("--captioner toy/captioner").cycles_by_rule
    assert not settings("--captioner toy/judge").cycles_by_rule


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_of_every_recipe_learn_and_log_every_task_reward_and_loss(tiny, recipe):
    finished = tiny(recipe)
    cfg = finished.run.cfg
    assert [row["step"] for row in finished.rows] == [0, 1]
    row = finished.rows[1]
    for task in finished.run.source.tasks:
        name = task.name
        assert 0 <= row[f"{name}/truth"] <= 1
        assert 0 <= row[f"{name}/frac_reward_zero_std"] <= 1
        if task.draws and cfg.matches:
            assert row[f"{name}/image/shift"] > 0
        elif task.draws:
            assert row[f"{name}/image/ratio/mean"] == pytest.approx(1, abs=0.2)
        if task.writes:
            assert row[f"{name}/text/ratio/mean"] == pytest.approx(1, abs=0.2)
            assert row[f"{name}/completions/mean_length"] >= 1
    for name in (name for name, weight in cfg.weights.items() if weight):
        logged = [key for key in row if key.endswith(f"/rewards/{name}/mean")]
        assert logged
    assert any(row["grad_norm"] > 0 for row in finished.rows)


def test_a_recipe_that_sets_what_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setitem(RECIPES, "mine", dict(ask=(4, "o"), text_clip_hig=(0.3, "o")))
    with pytest.raises(TypeError, match="text_clip_hig"):
        settings("--recipe mine")


@pytest.mark.parametrize("scale", SCALES)
def test_the_table_has_a_column_a_recipe_and_every_value_with_its_source(scale):
    lines = recipe_table(scale).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["switch", *RECIPES]
    assert {len(row) for row in cells} == {1 + len(RECIPES)}
    for place, recipe in enumerate(RECIPES, 1):
        column = {row[0]: row[place] for row in cells}
        for name, (value, source) in settings_of(recipe, scale).items():
            assert f"{value} ({source})" in column.get(f"`{name}`", column["alone"])


# ---- where a setting comes from ----


def test_the_later_source_of_a_setting_wins():
    """Config's default, the scale, the recipe, its part for the scale, the flag."""
    toy, large = "--recipe unigrpo", "--recipe unigrpo --scale bagel"
    assert settings().ema == Config.ema
    assert settings().group_size == SCALES["toy"]["group_size"]
    assert settings(toy).text_average == "sequence"
    assert settings(toy).lr_understanding == 5e-5
    assert settings(large).lr_understanding == 1e-6
    assert settings(large).denoise_steps == 25
    assert settings(large, "--denoise_steps 7").denoise_steps == 7
    assert not settings(large, "--no-checkpointing").checkpointing
    assert settings(large).weights["pref"] == 1.0
    assert settings(toy).weights["pref"] == 0.0


def test_the_scale_follows_the_width_of_the_policy(tmp_path):
    (tmp_path / "llm_config.json").write_text('{"hidden_size": 3584}')
    assert settings("--policy", tmp_path).resolution == SCALES["bagel"]["resolution"]
    assert settings().resolution == SCALES["toy"]["resolution"]


def test_tasks_without_a_file_are_left_out_where_another_has_one():
    rows = settings("--prompts p.jsonl").rows
    assert {name for name, count in rows.items() if count} == {"draw", "think"}
    rows = settings("--questions q.jsonl").rows
    assert {name for name, count in rows.items() if count} == {"ask"}


def test_a_reward_that_no_task_can_earn_is_dropped_from_a_recipe_and_refused_as_a_flag():
    assert settings("--ask 0").weights["accuracy"] == 0.0
    cfg = settings("--ask 0 --accuracy 1")
    with pytest.raises(ValueError, match="--accuracy 1.0 would score nothing"):
        check(cfg, 1)


def test_every_setting_is_read_somewhere():
    folders = [ROOT, ROOT / "support", ROOT / "referees"]
    paths = [
        path for folder in folders for path in folder.glob("*.py") if path.name != "recipes.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in paths)
    by_name = {task.file for task in TASKS.values()}            # read by the task's own name for it
    for name in {f.name for f in SETTINGS} - by_name:
        assert re.search(rf"\bcfg\.{name}\b", source), name


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        settings("--help")
    flags = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    assert len(flags) >= len(TASKS) + len(REWARDS) + len(SETTINGS)
    for flag in flags:
        assert re.search(r"\s{2,}\w", flag), flag


def test_a_run_says_its_settings_in_lines_that_fit():
    text = describe(settings("--draw 5 --sem 0.5 --lora 7"))
    for word in ("lvrpo:", "draw=5", "sem=0.5", "lora=7", "image_loss=nft"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


# ---- what is refused ----


def test_a_matching_loss_goes_without_what_a_recipe_sets_of_noisy_steps():
    settings_of_loss = {
        "awm": (False, "none", 1e-3), "fpo": (False, "none", 0.05), "grpo": (True, "dt", 1e-3)}
    for loss, noisy in settings_of_loss.items():
        cfg = settings("--recipe unigrpo --image_loss", loss)
        assert (cfg.shared_noise, cfg.step_weights, cfg.image_clip) == noisy
        check(cfg, 1)


def test_the_control_has_the_tasks_of_lvrpo_at_the_rates_of_the_scale():
    control, lvrpo = settings("--recipe control"), settings("--recipe lvrpo")
    assert control.rows == lvrpo.rows
    assert (control.lr_generation, control.old_decay, control.grad_clip) == (5e-4, 0, 1)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--learning_rate 1", "unrecognized arguments: --learning_rate"),
        ("--epoch 2", "unrecognized arguments: --epoch"),       # flags are written in full
        ("--recipe ppo", "argument --recipe: invalid choice: 'ppo'"),
        ("--advantage foo", "argument --advantage: invalid choice: 'foo'"),
        ("--seed 1.5", "argument --seed: invalid int value: '1.5'"),
        ("--group_size 1", "--group_size: 1: must be at least 2"),
        ("--micro -1", "--micro: -1: must be at least 0"),
        ("--grad_clip nan", "--grad_clip: nan: must be a finite number"),
        ("--noise_level 0", "--noise_level: 0: must be above 0"),
        ("--policy nowhere", "nowhere"),
        ("--prompts nowhere.jsonl --ins 0", "nowhere.jsonl"),
    ],
)
def test_bad_flags_end_in_one_line_that_names_them(tmp_path, monkeypatch, capsys, flags, said):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["train.py", *words(flags, "--out", out)])
    with pytest.raises(SystemExit) as left:
        train.main()
    line = left.value.code if isinstance(left.value.code, str) else capsys.readouterr().err.strip()
    assert line.startswith("train.py: ")
    assert said in line
    assert "\n" not in line
    assert not (out / "log.jsonl").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--draw 0 --think 0 --ask 0", "nothing to learn from"),
        ("--sem 0 --ins 0 --kn 0", "--draw 2 has no reward: give one of --sem"),
        ("--image_loss grpo --window_high 6", "does not fit in 5 noisy steps"),
        ("--image_loss grpo --noise_level 2", "--noise_level 2.0: must be below 2 for cps"),
        ("--image_loss grpo --old_decay 0.5", "--old_decay 0.5 is of a matching loss"),
        ("--image_loss awm --sampler cps", "--sampler cps is of noisy steps"),
        ("--image_loss fpo --step_weights flat", "--step_weights flat is of noisy steps"),
        ("--image_loss nft --old_decay 1", "--old_decay 1.0: must be below 1"),
        ("--reflect 2 --credit gain", "--credit gain is for two rounds"),
        ("--reflect 2 --normalise each", "--normalise each"),
        ("--rectify group", "no task of this run refines"),
        ("--image_loss ratio_norm --step_weights flat", "--step_weights flat is for plain ratios"),
        ("--stop 0.5", "no task of this run does so"),
        ("--reflect 2 --stop 1.5", "must be a share, at most 1"),
        ("--normalise each --advantage none", "--advantage none has no effect"),
        ("--ema 1", "--ema 1.0: must be below 1"), ("--lr_understanding 0", "set --ask 0"),
        ("--train_referee 1e-4 --sem 0", "which no reward of this run asks"),
        ("--train_referee 1e-4 --bf16", "leave out --shard, and give --no-bf16"),
        ("--shard", "start with torchrun"), ("--out toy", "give another --out")],
)
def test_settings_that_cannot_work_together_are_refused(tmp_path, monkeypatch, flags, said):
    monkeypatch.delenv("RANK", raising=False)
    cfg = small(tmp_path, flags)
    with pytest.raises(ValueError, match=said) as error:
        check(cfg, 1)
    assert "\n" not in str(error.value)


def test_prompts_that_do_not_divide_over_the_ranks_are_refused(tmp_path):
    cfg = small(tmp_path, "--draw 10 --think 0 --ask 0")
    with pytest.raises(ValueError, match="--draw 10 prompts do not divide over 4 ranks"):
        check(cfg, 4)
    check(cfg, 5)


def test_the_toy_world_has_one_resolution_which_is_checked_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="--resolution 16: must be 32, the toy world"):
        train.begin(small(tmp_path, "--resolution 16"), ALONE)
    assert not list(tmp_path.iterdir())
