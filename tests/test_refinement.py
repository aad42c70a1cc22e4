"""AlphaGRPO's refinement: a picture is drawn, looked at, diagnosed and drawn again, in training and
afterwards.
"""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import ALONE, settings, words

import flow_grpo
import train
from rewards import Samples
from grpo import group_advantage
from sample import Draw, Picture, Rollout, Text, Write, refine
from studies import refinement
from support.rows import prompt_row
from tasks import (
    TASKS, WORDING, Choices, choices_of, draw_of, first_pictures, keep_first, truth_and_variety)
from toy import shapes, world

PROMPTS = [shapes.prompts_by_tag("train")[tag][0] for tag in ("position", "counting", "colors")]
REFLECT = settings("--recipe alphagrpo_reflect --reflect 2 --group_size 4 --stop 0")


def brightness_of(images):
    return images.mean((1, 2, 3))


# ---- the first picture ----


def test_the_first_picture_of_least_value_is_refined(policy):
    rows, seen = [prompt_row(metadata) for metadata in PROMPTS], []

    def brightness(samples):
        seen.append(samples.images)
        return brightness_of(samples.images)

    cfg = settings()
    choices = choices_of(cfg, "toy", draw_of(cfg, "toy", 0))
    begun, least = first_pictures(
        policy, rows, choices, seed=0, step=1, index=[4, 5, 6], n=3, value=brightness)
    values = brightness_of(seen[0]).view(3, 3)
    assert torch.equal(least, values.amin(1))
    for b, row in enumerate(begun):
        assert torch.allclose(row.source, seen[0][3 * b + values[b].argmin()], atol=1e-6)
        assert torch.allclose(row.full * 0.5 + 0.5, row.source)
        assert (row.text, row.metadata) == (PROMPTS[b]["prompt"], PROMPTS[b])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("reflect"))
    return train.begin(replace(REFLECT, initial=2, out=out), ALONE)


def test_first_pictures_drawn_in_parts_are_those_drawn_at_once(run):
    (batch,) = run.source.batches(0, ALONE)
    whole = train.draw_first_pictures(run, batch)
    parts = train.draw_first_pictures(replace(run, cfg=replace(run.cfg, rollout_batch=2)), batch)
    assert torch.allclose(whole.initial, parts.initial, atol=1e-5)
    for a, b in zip(whole.rows, parts.rows, strict=True):
        assert torch.allclose(a.full, b.full, atol=1e-5)


# ---- what a refinement earns ----


def compare_refinements(scores, initial, kept=None, **settings):
    batch = SimpleNamespace(task=TASKS["reflect"], initial=torch.tensor(initial))
    part = train.Part(batch, None, None, {"dvreward": torch.tensor(scores)}, {})
    part.kept = None if kept is None else torch.tensor(kept)
    train.compare([part], replace(REFLECT, **settings), ALONE)
    return part


@pytest.mark.parametrize("how", ["group", "initial"])
def test_a_refinement_that_is_no_better_than_its_first_picture_is_never_favoured(how):
    scores = [0.2, 0.3, 0.9, 0.4, 0.1, 0.6, 0.3, 0.35]
    part = compare_refinements(scores, [0.5, 0.5], rectify=how)
    better = torch.tensor(scores) > 0.5
    assert (part.adv[~better] <= 0).all()
    assert (part.adv[better] > 0).all()
    assert (part.group_stats["initial"], part.group_stats["improved"]) == (0.5, 2 / 8)
    assert part.group_stats["reward"] == pytest.approx(sum(scores) / 8)  # logged as it was earned
    assert not part.skip


@pytest.mark.parametrize("how, is_skipped", [("group", True), ("initial", True), ("off", False)])
def test_a_task_in_which_nothing_improves_is_passed_over(how, is_skipped):
    part = compare_refinements([0.2, 0.3, 0.9, 0.4] * 2, [0.9, 0.95], rectify=how)
    assert part.skip == is_skipped


def test_a_step_in_which_nothing_improves_moves_no_weight_by_momentum_either(run, monkeypatch):
    scores = torch.arange(8) / 8
    values = iter([scores[:4] * 0, scores, scores[:4] * 0 + 1, scores])  # first pictures, then others
    monkeypatch.setitem(run.rewards, "dvreward", lambda samples: next(values))
    start = run.policy.latent_out.weight.detach().clone()
    assert train.one_step(run, 0)["reflect/improved"] > 0
    before = copy.deepcopy(run.policy.state_dict())
    assert not torch.equal(before["latent_out.weight"], start)
    assert train.one_step(run, 1)["reflect/improved"] == 0
    torch.testing.assert_close(run.policy.state_dict(), before, rtol=0, atol=0)


# ---- permission to stop ----


SAYS = [f"<think> {said} </think> so" for said in (shapes.RIGHT, "make it red", shapes.RIGHT, "no")]


def test_a_diagnosis_that_nothing_needs_to_change_keeps_the_first_picture():
    white, black = torch.ones(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)
    samples = Samples(["p"] * 4, [{}] * 4, texts=SAYS, images=white, sources=black)
    kept, samples = keep_first(samples, TASKS["reflect"], WORDING["toy"])
    assert kept.tolist() == [True, False, True, False]
    assert samples.images.amax((1, 2, 3)).tolist() == [0, 1, 0, 1]


def test_what_keeps_the_first_picture_is_compared_by_its_worth_and_teaches_no_image(run):
    part = compare_refinements([0.5, 0.9, 0.5, 0.2] * 2, [0.5, 0.5], kept=[True, False] * 4)
    assert part.adv[1] > part.adv[0] == part.adv[2] > part.adv[3]     # not lowered to the least
    segments = (Text(None, None, chosen=True), Picture((2, 2), drawn=True))
    columns = train.segment_advantages(replace(part, rollout=Rollout(segments, 2, 4)))
    assert torch.equal(columns[:, 0], part.adv)
    assert torch.equal(columns[:, 1], part.adv.masked_fill(part.kept, 0.0))


def test_a_share_of_the_prompts_refines_its_best_first_picture(policy):
    rows = [prompt_row(metadata) for metadata in PROMPTS] * 2
    options = dict(seed=0, step=1, index=range(4, 10), n=3, value=lambda s: brightness_of(s.images))
    choices = Choices(None, None, Draw((32, 32), flow_grpo.time_grid(2)), WORDING["toy"])
    values = {best: first_pictures(policy, rows, choices, best=best, **options)[1] for best in (0, 0.5, 1)}
    assert (values[0] < values[1]).all()
    assert torch.equal(values[0.5][0::2], values[0][0::2])
    assert torch.equal(values[0.5][1::2], values[1][1::2])


def test_rounds_earn_their_own_gain_or_what_the_last_is_worth():
    first, last = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.9])
    batch = SimpleNamespace(task=TASKS["rounds"], initial=None)
    written, drawn = Text(None, None, chosen=True), Picture((2, 2), drawn=True)
    segments = (written, drawn, Text(None, None), written, drawn)
    cfg, columns = settings("--recipe unigrpo_rounds --rounds 1 --group_size 4"), {}
    for credit, earlier in (("last", None), ("gain", {"ins": first})):
        part = train.Part(batch, Rollout(segments, 1, 4), None, {"ins": last}, {}, earlier)
        train.compare([part], replace(cfg, credit=credit), ALONE)
        columns[credit] = train.segment_advantages(part).T
    expected = [group_advantage(value, 4) for value in (last, first, last - first)]
    assert torch.allclose(columns["last"], expected[0].expand(4, 4))
    assert torch.allclose(columns["gain"], torch.stack([expected[1]] * 2 + [expected[2]] * 2))


# ---- what is logged and evaluated ----


@pytest.mark.parametrize("name, field", [("reflect", "sources"), ("rounds", "earlier")])
def test_repaired_and_spoiled_pictures_are_counted_against_the_first(name, field):
    metadata = shapes.prompts_by_tag("train")["counting"][0]
    right = shapes.sample_scene(metadata, np.random.default_rng(0))
    before = world.render_pixels([right, (), (), ()]) * 0.5 + 0.5
    after = world.render_pixels([(), right, right, ()]) * 0.5 + 0.5
    samples = Samples([metadata["prompt"]] * 4, [metadata] * 4, images=after, **{field: before})
    logged = truth_and_variety(TASKS[name], samples, world.detect, 4)
    found = [logged[key] for key in ("truth", "initial", "repaired", "spoiled")]
    assert found == [0.5, 0.25, 0.5, 0.25]


def test_a_diagnosis_is_right_if_it_names_what_is_wrong_with_the_picture():
    rng, metadata = np.random.default_rng(0), PROMPTS[0]
    wrong = shapes.sample_scene(shapes.wrong_metadata(metadata, rng), rng)
    sources = world.render_pixels([wrong] * 2) * 0.5 + 0.5
    texts = []
    for diagnosis in (shapes.critique(metadata, shapes.discrete(wrong)), shapes.RIGHT):
        texts.append(f"<think> {diagnosis} </think> {shapes.explicit(metadata)}")
    samples = Samples(["p"] * 2, [metadata] * 2, texts=texts, sources=sources)
    found = world.right_diagnoses([prompt_row(metadata)] * 2, samples, [], 1)
    assert found == {"diagnosis": [1.0, 0.0]}


# ---- refinement after training ----


def refine_six(policy, select, value, rounds=2, stop=""):
    draw = Draw((32, 32), flow_grpo.time_grid(4, 2.0))
    return refine(
        policy, [metadata["prompt"] for metadata in PROMPTS] * 2, rounds, select, value,
        Write(24, 0.0), draw, look=WORDING["toy"].look, seed=0, stop=stop)


def test_the_policy_keeps_a_picture_that_it_finds_right(policy):
    stop = refine_six(policy, "always", brightness_of, rounds=1)[1].texts[0].lower()
    first, second = refine_six(policy, "self", brightness_of, rounds=1, stop=stop)
    said = [stop in text.lower() for text in second.texts]
    assert set(said) == {True, False}
    for n, stopped in enumerate(said):
        assert torch.equal(second.kept[n], (first if stopped else second).drawn[n])


def test_the_judge_keeps_what_it_prefers(policy):
    rounds = refine_six(policy, "judge", brightness_of)
    for old, new in zip(rounds, rounds[1:]):
        assert torch.equal(new.value, torch.maximum(old.value, new.worth))
        assert torch.allclose(brightness_of(new.kept), new.value)
        assert len(new.texts) == 6


def test_always_takes_the_new(policy):
    for each in refine_six(policy, "always", brightness_of):
        assert torch.equal(each.kept, each.drawn)
        assert torch.equal(each.worth, each.value)


def test_the_oracle_leaves_what_is_right_and_replaces_what_is_wrong(policy):
    answers = iter([torch.tensor([1.0, 0, 0, 1, 0, 0]), torch.tensor([0.0, 1, 0, 0, 1, 0])])
    first, second = refine_six(policy, "oracle", lambda images: next(answers), rounds=1)
    assert second.value.tolist() == [1, 1, 0, 1, 1, 0]
    for n, is_right in enumerate((True, False, False, True, False, False)):
        assert torch.equal(second.kept[n], (first if is_right else second).drawn[n])


def test_refinement_is_compared_with_drawing_as_many_pictures(policy, monkeypatch):
    monkeypatch.setattr(world, "PROMPTS_PER_TAG", 1)
    table = refinement.refinement_table(policy, rounds=1, samples=2)
    ways = [f"refine, {select}" for select in ("always", "self", "judge", "oracle")]
    assert list(table) == [*ways, "best, judge", "best, oracle"]
    for way in ways:
        assert len(table[way]) == 2
        assert table[way][0] == table[ways[0]][0]               # all draw the same first pictures
    assert table["best, oracle"][1][0] >= table["best, judge"][1][0]
    assert table["refine, oracle"][1][0] >= table["refine, oracle"][0][0]
    assert refinement.print_refinement(table).count("\n") == 3


def test_the_command_line_draws_the_rounds_and_says_what_they_are_worth(tmp_path, capsys):
    few = words("--select judge --rounds 1 --n 2 --out", tmp_path / "r.png")
    refinement.main(["two squares", *few])
    assert "round 0: mean" in capsys.readouterr().out
    assert Image.open(tmp_path / "r.png").width > 200
