"""What an advantage is: rewards compared within their group, refinements rectified, components weighed."""

import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from grpo import group_advantage, normalise_each, rectify, variance_share

SCALES, STDS = ("group", "batch", "none"), ("population", "unbiased")
seeds = st.integers(0, 2**31)
scales, stds = st.sampled_from(SCALES), st.sampled_from(STDS)
numbers = st.floats(-3, 3, allow_subnormal=False)
groups = st.integers(2, 6).flatmap(
    lambda G: st.lists(st.lists(numbers, min_size=G, max_size=G, unique=True), min_size=1, max_size=4))


def random_rewards(seed, N=12):
    return torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the advantage of a group ----


@given(groups, scales, stds, st.sampled_from([1e-4, 0.5]))
def test_advantage_is_the_distance_from_the_groups_mean_in_units_of_the_spread(rewards, scale, std, eps):
    spread = {"population": statistics.pstdev, "unbiased": statistics.stdev}[std]
    everything = [r for group in rewards for r in group]
    expected = []
    for group in rewards:
        unit = {"group": spread(group) + eps, "batch": spread(everything) + eps, "none": 1.0}[scale]
        expected += [(r - statistics.mean(group)) / unit for r in group]
    reward = torch.tensor(everything, dtype=torch.float64)
    adv = group_advantage(reward, len(rewards[0]), scale=scale, std=std, eps=eps)
    torch.testing.assert_close(adv, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@given(seeds, st.integers(2, 6))
def test_advantages_of_a_group_have_population_variance_one_by_default(seed, G):
    adv = group_advantage(random_rewards(seed, 3 * G), G, eps=0)
    torch.testing.assert_close(adv.view(3, G).var(1, correction=0), torch.ones(3, dtype=torch.float64))


@given(seeds, st.sampled_from(["group", "batch"]), st.floats(0.01, 100))
def test_without_eps_the_unit_of_the_reward_does_not_matter(seed, scale, factor):
    reward = random_rewards(seed)
    adv = group_advantage(reward, 4, scale=scale, eps=0)
    torch.testing.assert_close(group_advantage(reward * factor, 4, scale=scale, eps=0), adv)


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 33), scales, stds, st.sampled_from([0.0, 1e-8, 1e-4]))
def test_a_tied_group_gets_exactly_zero_at_every_constant_and_size(constant, G, scale, std, eps):
    reward = torch.full((2 * G,), constant, dtype=torch.float32)
    assert (group_advantage(reward, G, scale=scale, std=std, eps=eps) == 0).all()
    reward[0] += 1 + abs(constant)
    adv = group_advantage(reward, G, scale=scale, std=std, eps=eps)
    assert (adv[G:] == 0).all()
    assert adv[0] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("scale", SCALES)
def test_every_dtype_is_computed_in_fp32_at_least(dtype, scale):
    reward = torch.tensor([1, 0, 0, 1, 1, 1]).to(dtype)
    adv = group_advantage(reward, 3, scale=scale)
    assert adv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(adv, group_advantage(reward.double(), 3, scale=scale).to(adv.dtype))


@given(seeds, scales, st.floats(0.01, 2))
def test_clamp_bounds_the_advantage_on_both_sides_and_leaves_the_rest(seed, scale, bound):
    reward = random_rewards(seed)
    adv = group_advantage(reward, 4, scale=scale)
    assert torch.equal(group_advantage(reward, 4, scale=scale, clamp=bound), adv.clamp(-bound, bound))


@pytest.mark.parametrize("reward, G, options, words", [
    ([1.0, 2.0], 1, {}, "at least 2"),
    ([1.0, 2.0, 3.0], 2, {}, "multiple of G"),
    ([], 2, {}, "multiple of G"),
    ([[1.0, 2.0]], 2, {}, r"\(1, 2\)"),
    ([1.0, math.nan], 2, {}, r"\[1\] is not finite"),
    ([1.0, 2.0], 2, {"scale": "rank"}, "rank"),
    ([1.0, 2.0], 2, {"std": "sample"}, "sample")])
def test_an_impossible_group_is_refused_in_one_line(reward, G, options, words):
    with pytest.raises(ValueError, match=words) as error:
        group_advantage(torch.tensor(reward), G, **options)
    assert "\n" not in str(error.value)


# ---- refinements: false positives are rectified ----

four_rewards = st.lists(st.floats(0, 1).map(lambda x: round(x, 3)), min_size=4, max_size=4).map(torch.tensor)


@given(four_rewards, st.floats(0, 1), st.sampled_from(["group", "initial"]))
def test_a_refinement_that_does_not_improve_never_gets_a_positive_advantage(reward, initial, how):
    first = torch.full((4,), round(initial, 3))
    adv = group_advantage(rectify(reward, first, 4, how), 4)
    failed = reward <= first
    assert (adv[failed] <= 1e-6).all()
    if failed.all():
        assert (adv == 0).all()
    else:
        assert (adv[failed] < 0).all()


@given(st.lists(st.booleans(), min_size=4, max_size=4), st.floats(0.05, 0.5))
def test_both_rectifications_agree_if_all_that_improve_have_one_reward(better, gain):
    reward = torch.where(torch.tensor(better), 0.5 + gain, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    initial = torch.full((4,), 0.5)
    paper, code = (rectify(reward, initial, 4, how) for how in ("group", "initial"))
    paper, code = (group_advantage(rewards, 4, eps=0) for rewards in (paper, code))
    torch.testing.assert_close(paper, code, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how, expected", [
    ("group", [0.5, 0.5, 0.9, 0.95]), ("initial", [0.8, 0.8, 0.9, 0.95]), ("off", [0.5, 0.6, 0.9, 0.95])])
def test_a_refinement_that_does_not_improve_takes_the_floor(how, expected):
    reward, initial = torch.tensor([0.5, 0.6, 0.9, 0.95]), torch.full((4,), 0.8)
    assert rectify(reward, initial, 4, how).tolist() == pytest.approx(expected)


def test_an_unknown_rectification_is_refused():
    with pytest.raises(ValueError, match='how is "min"'):
        rectify(torch.zeros(4), torch.zeros(4), 4, "min")


# ---- several components ----


def components(seed):
    """A reward that is all or nothing, and one that hardly varies."""
    g = torch.Generator().manual_seed(seed)
    return {"binary": torch.rand(12, generator=g).round(), "cosine": 0.6 + 0.03 * torch.rand(12, generator=g)}


@given(seeds, stds)
def test_normalising_each_component_is_the_advantage_of_each(seed, std):
    for name, reward in components(seed).items():
        expected = group_advantage(reward, 4, std=std)
        each = normalise_each({name: reward}, 4, std)[name]
        torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-3)
        assert torch.equal(each == 0, expected == 0)


@given(seeds, st.floats(0.1, 3), st.floats(0.1, 3))
def test_variance_shares_add_up_to_one_and_a_weight_of_zero_has_none(seed, a, b):
    parts = components(seed)
    assume(parts["binary"].view(3, 4).std(1).max() > 0)
    assert sum(variance_share(parts, {"binary": a, "cosine": b}, 4).values()) == pytest.approx(1.0)
    alone = variance_share(parts, {"binary": a, "cosine": 0.0}, 4)
    assert alone == pytest.approx({"binary": 1.0, "cosine": 0.0})


def test_in_a_plain_sum_the_component_that_varies_most_decides_and_normalised_ones_share_equally():
    parts = {"binary": torch.tensor([0.0, 1, 0, 1]), "cosine": torch.tensor([0.60, 0.60, 0.63, 0.63])}
    weights = {"binary": 1.0, "cosine": 1.0}
    shares = variance_share(parts, weights, 4)
    assert shares["binary"] == pytest.approx(0.25 / (0.25 + 0.015**2), rel=1e-4)
    equal = variance_share(normalise_each(parts, 4), weights, 4)
    assert equal == pytest.approx({"binary": 0.5, "cosine": 0.5}, abs=0.01)


def test_a_level_that_differs_between_prompts_has_no_share_of_the_variance():
    parts = {"level": torch.tensor([0.0, 0, 9, 9]), "within": torch.tensor([0.0, 1, 0, 1])}
    shares = variance_share(parts, {"level": 1.0, "within": 1.0}, 2)
    assert shares == pytest.approx({"level": 0.0, "within": 1.0})


@pytest.mark.parametrize("value", [0.01, 0.3, 1.2])
def test_a_constant_component_has_no_share_of_any_variance(value):
    assert variance_share({"a": torch.full((12,), value)}, {"a": 5.0}, 12) == {"a": 0.0}
