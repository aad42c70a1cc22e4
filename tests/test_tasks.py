"""One home for a task and for a reward: what is added to a table is trained, scored, logged, checked and evaluated without another line."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import recipes
import rewards
from support import run
import tasks
import train
from recipes import check, parse
from sample import TOY
from support.checkpoint import load_policy
from support.rows import by_tag, read_prompts, read_questions
from support.run import Ranks
from tasks import Source

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDING = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = ["--group_size", "4", "--eval_every", "0", "--save_every", "0", "--steps", "1"]


def snippet(title):
    """The Python lines that docs/adding.md shows under a heading."""
    return re.search(rf"^\*\*{title}\*\*.*?```python\n(.*?)```", ADDING, re.M | re.S)[1]


def records(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()][1:]


# ---- adding ----


def test_a_reward_is_added_in_two_places(tmp_path, monkeypatch):
    """The page's function and row; its flag, its score in the log and its weight in the advantage follow."""
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    monkeypatch.setattr(tasks, "REWARDS", rewards.REWARDS)
    monkeypatch.setattr(run, "REWARDS", rewards.REWARDS)
    before = {*rewards.REWARDS}
    exec(snippet("A reward"), vars(rewards))
    (name,) = {*rewards.REWARDS} - before
    assert snippet("A reward").count("\n") <= 8
    train.train(parse([*SMALL, "--draw", "2", "--think", "0", "--ask", "0", "--edit", "0", f"--{name}", "2", "--out", str(tmp_path)]), ALONE)
    row = records(tmp_path)[0]
    assert 0 <= row[f"draw/rewards/{name}/mean"] <= 1 and f"draw/advantage_share/{name}" in row
    with pytest.raises(ValueError, match=f"--{name} 2.0 would score nothing: it reads images, which no sample of ask has"):
        check(parse(["--draw", "0", "--think", "0", "--edit", "0", f"--{name}", "2"]), ALONE)


def test_a_task_is_added_in_two_places(tmp_path, monkeypatch):
    """The page's rows and entry; its flag, its plan, its rewards, its truth and its check follow."""
    monkeypatch.setattr(tasks, "TASKS", tasks.TASKS)
    before = dict(tasks.TASKS)
    try:
        exec(snippet("A task"), vars(tasks))
        (name,) = tasks.TASKS.keys() - before.keys()
        assert snippet("A task").count("\n") <= 12
        train.train(parse([*SMALL, "--draw", "0", "--think", "0", "--ask", "0", "--edit", "0", f"--{name}", "3", "--accuracy", "1", "--out", str(tmp_path)]), ALONE)
    finally:
        tasks.TASKS.pop(name)
    row = records(tmp_path)[0]
    assert 0 <= row[f"{name}/truth"] == pytest.approx(row[f"{name}/rewards/accuracy/mean"]) and f"{name}/text/ratio/mean" in row


def test_a_recipe_is_added_as_one_dict(monkeypatch):
    before = set(recipes.RECIPES)
    monkeypatch.setattr(recipes, "RECIPES", dict(recipes.RECIPES))
    exec(snippet("A recipe"), vars(recipes))
    (name,) = recipes.RECIPES.keys() - before
    cfg = parse(["--recipe", name])
    assert cfg.rows["ask"] > 0 and cfg.text_clip_high == 0.28 and name in recipes.recipe_table("toy")


# ---- recipes ----

@pytest.mark.parametrize("sets, said", [
    (dict(text_clip_hig=(0.3, "o")), "recipe mine sets text_clip_hig, which is no task, reward or setting"),
    (dict(ask=(4, "o"), sem=0.5), r"recipe mine: sem=0.5 must be a pair of value and source, such as \(0.5, \"o\"\)")])
def test_a_recipe_that_cannot_be_is_refused_in_one_line(monkeypatch, sets, said):
    monkeypatch.setitem(recipes.RECIPES, "mine", sets)
    with pytest.raises(ValueError, match=said):
        parse(["--recipe", "mine"])


def test_a_choice_is_checked_wherever_it_comes_from(monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "mine", dict(ask=(4, "o"), accuracy=(1.0, "o"), advantage=("grop", "o")))
    with pytest.raises(ValueError, match="--advantage grop: must be one of group, batch, none"):
        check(parse(["--recipe", "mine"]), Ranks(0, 1, torch.device("cpu")))


def test_a_reward_cannot_take_a_name_that_is_taken(monkeypatch):
    monkeypatch.setattr(rewards, "REWARDS", rewards.REWARDS | {"draw": rewards.REWARDS["ins"]})
    with pytest.raises(ValueError, match="--draw is the name of two things"):
        parse([])


def test_words_that_the_policy_was_never_taught_are_said(tmp_path, capsys):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\na dog on a skateboard\n")
    Source(parse(["--prompts", str(path), "--draw", "2", "--think", "0", "--ins", "0"]), load_policy(TOY))
    assert "1 of 2 prompts hold words that the policy was never taught, such as 'a dog on a skateboard'" in capsys.readouterr().err


def test_the_readme_shows_the_recipes_as_they_are():
    assert recipes.recipe_table("toy") in README and recipes.recipe_table("bagel") in (ROOT / "docs" / "bagel.md").read_text(encoding="utf-8")


def test_the_later_source_of_a_setting_wins():
    """Config's default, the scale, the recipe, its part for the scale, the flag."""
    assert parse([]).ema == recipes.Config.ema and parse([]).group_size == recipes.SCALES["toy"]["group_size"]
    assert parse(["--recipe", "unigrpo"]).text_average == "sequence" and parse([]).image_clip == 1e-3
    assert parse(["--scale", "bagel"]).image_clip == 1e-6 and parse(["--scale", "bagel", "--image_clip", "0.5"]).image_clip == 0.5
    assert parse(["--scale", "bagel", "--recipe", "unigrpo"]).weights["pref"] == 1.0 and parse(["--recipe", "unigrpo"]).weights["pref"] == 0.0


def test_every_setting_of_a_recipe_and_a_scale_exists_and_says_whose_it_is():
    known = {f.name for f in dataclasses.fields(recipes.Config)} | {*tasks.TASKS} | {*rewards.REWARDS}
    for recipe in recipes.RECIPES:
        for scale in recipes.SCALES:
            settings = recipes.settings_of(recipe, scale)
            assert settings.keys() <= known
            assert all(whose in ("p", "o") or whose.startswith("d: ") for _, whose in settings.values())
    assert all(scale.keys() <= known for scale in recipes.SCALES.values())


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    flags = re.split(r"\n  (?=--)", capsys.readouterr().out)[1:]
    assert len(flags) > 60
    for flag in flags:
        assert re.search(r"\s{2,}\w", flag), flag


def test_a_run_says_what_it_resolved_to():
    told = recipes.resolved(parse(["--draw", "5", "--sem", "0.5", "--lora", "7"]))
    assert all(word in told for word in ("lvrpo:", "draw=5", "sem=0.5", "lora=7", "sampler=cps")) and max(map(len, told.split("\n"))) <= 120


@pytest.mark.parametrize("more", [
    ["--text_clip_high", "0.28"], ["--text_average", "constant"], ["--text_ratio", "sequence"], ["--text_delta", "1.5"], ["--kl_correction"],
    ["--std", "unbiased"], ["--advantage", "batch", "--adv_clamp", "5"], ["--advantage", "none"], ["--sampler", "sde"], ["--sampler", "dance"],
    ["--density", "sum"], ["--no-scaled"], ["--mse_reduce", "sum", "--mse_weight", "1e-4"], ["--image_clip_high", "0.1"], ["--ratio_norm"]])
def test_what_the_losses_can_do_is_a_flag_that_changes_the_update(tmp_path, more, plain):
    """DAPO, Dr. GRPO, GSPO, two-sided clipping, other spreads, samplers and densities: each moves the weights elsewhere."""
    assert not torch.equal(moved(tmp_path, *more), plain)


def moved(out, *more):
    """The understanding and generation experts' query weights after one batch of three updates, with clips that act."""
    tight = ["--text_clip", "0.001", "--image_clip", "1e-6", "--epochs", "3", "--lr_understanding", "1e-2", "--lr_generation", "1e-2"]
    run = train.begin(parse([*SMALL, "--draw", "0", "--think", "4", "--ask", "0", "--edit", "0", "--sem", "0", "--kn", "0", *tight, "--out", str(out), *more]), ALONE)
    train.one_step(run, 2)
    return torch.cat([expert.q.weight.detach().flatten() for expert in run.policy.blocks[0].experts])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    return moved(tmp_path_factory.mktemp("plain"))


# ---- rewards that score nothing, tasks that learn nothing ----


def test_a_weight_that_no_task_can_use_is_refused_where_it_was_asked_for_and_dropped_where_a_recipe_has_it():
    assert parse(["--ask", "0"]).weights["accuracy"] == 0.0
    with pytest.raises(ValueError, match="--accuracy 1.0 would score nothing: it reads texts and answers, which no sample of draw, think, edit has"):
        check(parse(["--ask", "0", "--accuracy", "1"]), ALONE)


def test_a_reward_that_cannot_be_built_stops_the_run(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n")
    with pytest.raises(ValueError, match="--ins reads GenEval's include and exclude, which 1 rows"):
        train.begin(parse(["--prompts", str(tmp_path / "p.txt"), "--ins", "1", "--kn", "0", "--out", str(tmp_path / "out")]), ALONE)


def test_a_task_without_a_signal_says_so_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rewards, "answer_accuracy", lambda samples, **how: torch.ones(len(samples.prompts)))
    args = [*SMALL, "--draw", "0", "--think", "0", "--ask", "2", "--edit", "0", "--kn", "0", "--steps", "8", "--out", str(tmp_path)]
    train.train(parse(args), ALONE)
    assert capsys.readouterr().err.count("--ask learned nothing for three steps") == 1


# ---- rows ----


def test_choosing_from_many_prompts_walks_them_once():
    class Counted(list):
        walks = 0

        def __iter__(self):
            Counted.walks += 1
            return super().__iter__()

    pool = by_tag(Counted({"prompt": str(i), "tag": str(i % 3)} for i in range(1000)))
    for step in range(5):
        assert len(pool((0, step, 0), 24, range(24))) == 24
    assert Counted.walks == 1


def test_every_tag_has_its_turn():
    pool = by_tag([{"prompt": f"{tag}{i}", "tag": tag} for tag, n in (("a", 1), ("b", 50)) for i in range(n)])
    tags = [row.metadata["tag"] for step in range(100) for row in pool((0, step, 0), 4, range(4))]
    assert 0.4 < tags.count("a") / len(tags) < 0.6


def test_ranks_share_rows_and_groups():
    """Every (row, sample) falls to one rank, and what ranks gather comes back in its place."""
    for world in (1, 2, 4, 6):
        for count, G in ((12, 4), (3, 12), (1, 12)):
            ranks = [Ranks(rank, world, torch.device("cpu")) for rank in range(world)]
            owned = [(i, g) for r in ranks for i in r.share(count, G)[0] for g in r.share(count, G)[1]]
            assert sorted(owned) == [(i, g) for i in range(count) for g in range(G)]
            whole = torch.arange(count * G).view(count, G)
            assert torch.cat([r.own(whole) for r in ranks]).tolist() == [i * G + g for i, g in owned]


# ---- files ----


def write(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return str(path)


RED = '{"prompt": "a red circle"}'


@pytest.mark.parametrize("name, content, encoding", [
    ("p.jsonl", RED, "utf-8"), ("p.jsonl", RED, "utf-8-sig"), ("p.json", f"{RED}\r\n\r\n", "utf-8-sig"), ("p.txt", "a red circle\r\n", "utf-8-sig"),
    ("p", "  a red circle \n", "utf-8"), ("p.ndjson", f"\n{RED}\n", "utf-8")])
def test_prompts_are_read_as_their_files_name_says(tmp_path, name, content, encoding):
    assert read_prompts(write(tmp_path / name, content, encoding)) == [{"tag": "", "include": [], "prompt": "a red circle"}]


@pytest.mark.parametrize("name, content, encoding, words", [
    ("p.txt", RED, "utf-8", "p.txt:1: JSON in a file that its name calls plain text"),
    ("p", f"a circle\n[{RED}]", "utf-8-sig", "p:2: JSON in a file"), ("p.txt", "[\n  " + RED + "\n]", "utf-8", "p.txt:1: JSON"),
    ("p.json", f"[{RED}, {RED}]", "utf-8", "p.json:1: must be an object .*one a line"), ("p.json", "[\n" + RED + "\n]", "utf-8", "p.json:1: not a JSON"),
    ("p.csv", "prompt\na red circle", "utf-8", "its ending .csv says neither .jsonl .* nor .txt"),
    ("p.txt", "a red circle", "utf-16", "UTF-16 or binary"), ("p.jsonl", RED, "utf-16-le", "UTF-16 or binary"),
    ("p.txt", "ein Stück", "latin-1", "not UTF-8 text"), ("p.jsonl", '{"prompt": "  "}', "utf-8", r"lacks \['prompt'\]")])
def test_a_format_is_never_guessed(tmp_path, name, content, encoding, words):
    with pytest.raises(ValueError, match=words):
        read_prompts(write(tmp_path / name, content, encoding))


def questions(tmp_path, *answers, image="i.png"):
    Image.new("RGB", (16, 16)).save(tmp_path / "i.png")
    rows = [dict(image=image, question="what ?", answer=answer) for answer in answers]
    return write(tmp_path / "q.jsonl", "\n".join(map(json.dumps, rows)))


def test_an_answer_in_its_tags_is_taken_out_of_them(tmp_path):
    rows = read_questions(questions(tmp_path, "<think> two </think><answer> 3 </answer>", "red"))
    assert [row["answer"] for row in rows] == [" 3 ", "red"]


@pytest.mark.parametrize("answer", ["?!", "<answer></answer>", "a </answer> b", "<think>", "<answer> <answer> 3 </answer>"])
def test_an_answer_that_no_text_can_earn_is_refused_when_it_is_read(tmp_path, answer):
    with pytest.raises(ValueError, match="so that no text can earn it"):
        read_questions(questions(tmp_path, "red", answer))


def test_an_answer_longer_than_what_may_be_written_is_refused(tmp_path):
    cfg = parse(["--questions", questions(tmp_path, "red " * 9), "--answer_tokens", "8"])
    with pytest.raises(ValueError, match="has 9 tokens, and --answer_tokens lets 8 be written"):
        tasks.Source(cfg, load_policy(TOY))


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "text.png"])
def test_every_image_of_a_questions_file_is_decoded_before_the_run(tmp_path, name):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    if name == "text.png":
        (tmp_path / name).write_text("no image")
    else:
        noise.save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-300])
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read_questions(questions(tmp_path, "red", image=name))


def test_a_file_of_long_prompts_is_checked_without_a_table_of_them(tmp_path):
    """The check pads nothing: its memory is that of the file."""
    import tracemalloc
    policy = load_policy(TOY)
    policy.config.llm["max_position_embeddings"] = 32768
    path = write(tmp_path / "p.txt", "a red circle\n" * 3000 + "red " * 10000 + "\n")
    cfg, widest = parse(["--prompts", path, "--ins", "0"]), []
    pad = torch.nn.utils.rnn.pad_sequence
    torch.nn.utils.rnn.pad_sequence = lambda rows, *a, **k: widest.append(sum(map(len, rows))) or pad(rows, *a, **k)
    try:
        tracemalloc.start()
        tasks.Source(cfg, policy)
        grown = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        torch.nn.utils.rnn.pad_sequence = pad
    assert grown < 50e6 and not [n for n in widest if n > 20000]
