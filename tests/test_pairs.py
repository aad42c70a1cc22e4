"""CoRL's pairs: two halves of a row, a picture from text and a question, whose samples share an
advantage.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import ALONE, settings, write_rows

import rewards
import train
from grpo import group_advantage
from recipes import check
from tasks import TASKS, Source
from toy import world
from toy.world import drawn_truth

CORL = settings("--recipe corl --pair_image 3 --pair_text 3 --group_size 4")
SCORES = {"pair_image": ("recaption", "likeness", "tim"), "pair_text": ("accuracy", "format")}
BOTH = tuple(SCORES)


def compare_halves(cfg, seed=0, names=BOTH):
    """The halves by name, with the advantages of random rewards if they are named."""
    generator, parts = torch.Generator().manual_seed(seed), {}
    for name in BOTH:
        batch = SimpleNamespace(task=TASKS[name], initial=None)
        scores = {reward: torch.rand(12, generator=generator) for reward in SCORES[name]}
        parts[name] = train.Part(batch, None, None, scores, {})
    train.compare([parts[name] for name in names], cfg, ALONE)
    return parts


def total_of(part):
    return sum(part.rewards.values())


def compare_groups(total):
    return group_advantage(total, 4, std="unbiased")


def test_joint_halves_have_the_advantage_of_their_summed_reward():
    image, text = compare_halves(replace(CORL, pair="joint")).values()
    wanted = compare_groups(total_of(image) + train.TEXT_HALF * total_of(text))
    assert torch.allclose(image.adv, wanted, atol=1e-6)
    assert torch.equal(image.adv, text.adv)


def test_halves_under_sum_have_the_sum_of_their_advantages():
    image, text = compare_halves(replace(CORL, pair="sum")).values()
    wanted = compare_groups(total_of(image)) + train.TEXT_HALF * compare_groups(total_of(text))
    assert torch.allclose(image.adv, wanted, atol=1e-6)
    assert torch.equal(image.adv, text.adv)


@pytest.mark.parametrize(
    "sharing, names", [("none", BOTH), ("joint", ["pair_image"]), ("sum", ["pair_text"])])
def test_halves_that_share_nothing_and_a_half_by_itself_are_compared_by_themselves(sharing, names):
    parts = compare_halves(replace(CORL, pair=sharing), names=names)
    for name in names:
        assert torch.allclose(parts[name].adv, compare_groups(total_of(parts[name])), atol=1e-6)


def test_shares_of_a_joint_advantage_are_over_the_rewards_of_both_halves():
    for part in compare_halves(replace(CORL, pair="joint")).values():
        shares = {k: v for k, v in part.group_stats.items() if k.startswith("advantage_share/")}
        assert len(shares) == 5
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)


SHARINGS, ORDERS = st.sampled_from(["joint", "sum", "none"]), st.sampled_from(["sum", "each"])


@given(st.integers(0, 10**6), SHARINGS, ORDERS)
def test_the_order_of_the_halves_changes_nothing(seed, sharing, normalise):
    cfg = replace(CORL, pair=sharing, normalise=normalise)
    forth, back = compare_halves(cfg, seed), compare_halves(cfg, seed, names=BOTH[::-1])
    for name in BOTH:
        assert torch.allclose(forth[name].adv, back[name].adv, atol=1e-5)


def test_the_halves_of_a_row_are_about_one_picture_which_shows_the_prompt(policy):
    image, text = Source(CORL, policy).batches(3, ALONE)
    assert (image.task.name, text.task.name) == BOTH
    assert set(image.index).isdisjoint(text.index)
    for a, b in zip(image.rows, text.rows):
        assert torch.equal(a.real, b.source)
        assert (a.text, a.pixels) == (a.metadata["prompt"], None)
        samples = rewards.Samples([a.text], [a.metadata], images=a.real[None])
        assert drawn_truth(samples, world.detect(samples.images)) == 1


def test_a_row_of_a_file_with_a_caption_and_a_question_becomes_both_halves(policy, tmp_path):
    row = dict(
        caption="a red circle", question="what color is it ?", answer="(b)", options=["blue", "red"])
    cfg = replace(CORL, questions=write_rows(tmp_path / "pairs.jsonl", row))
    image, text = (batch.rows[0] for batch in Source(cfg, policy).batches(0, ALONE))
    assert image.text == "a red circle"
    assert torch.equal(image.real, text.source)
    assert (text.text, text.answer) == ("what color is it ? (a) blue (b) red", "(b)")


def test_halves_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match="halves of the same rows"):
        check(replace(CORL, rows=CORL.rows | {"pair_text": 4}), 1)
