"""Acting and learning walk one trajectory: replay is rollout, sharing is the plain way, and no
sample depends on its batch."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from plain_walks import plain_replay

import flow_grpo
from policy import Guidance, guided_velocity
from sample import (
    TOY, Draw, Read, Reader, See, Text, Write, images_of, join, main, replay_rollout,
    sample_plan, subset, texts_of)
from support.checkpoint import load_policy

SIZE = (16, 32)
DRAW = Draw(SIZE, flow_grpo.time_grid(6, 2.0), (1, 4), 0.8, "cps")
GUIDED = Guidance(3.0, 2.0, "text_channel", 0.0, (0.0, 1.0))
PROMPTS = ["a red circle", "a blue square above a red circle", "a triangle"]
CHANGES = ["make the circle red", "remove the square", "add a blue circle"]
SIZES = [(16, 32), (32, 32), (32, 16)]          # of the given images
LAYOUTS = ["question", "text to image", "think, draw", "edit", "think, edit", "rounds"]


@pytest.fixture(scope="module")
def policy():
    return load_policy(TOY)


def plan_of(layout, rows=range(3), draw=DRAW):
    noise = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=noise) * 2 - 1 for size in SIZES]
    images = [images[i] for i in rows]
    prompts, changes = (Read([texts[i] for i in rows]) for texts in (PROMPTS, CHANGES))
    return {
        "question": [See(images), prompts, Write(5)], "text to image": [prompts, draw],
        "think, draw": [prompts, Write(5, 0.9), draw], "edit": [See(images, images), changes, draw],
        "think, edit": [See(images, images), changes, Write(4), draw],
        "rounds": [prompts, draw, changes, Write(4), draw]}[layout]


def walk(policy, layout, rows=range(3), *, draw=DRAW, **settings):
    settings = dict(seed=1, step=2, index=list(rows), G=2) | settings
    return sample_plan(policy, plan_of(layout, rows, draw), **settings)


def logp_of(scored):
    return scored.logp if scored.flow is None else scored.flow.logp


def assert_near(a, b, atol=2e-5):
    assert torch.allclose(a, b, atol=atol)


# ---- rollout and replay ----


@pytest.mark.parametrize("guidance", [None, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_replay_with_unchanged_weights_gives_the_log_probs_of_the_rollout(policy, layout, guidance):
    rollout = walk(policy, layout, guidance=guidance)
    replay = replay_rollout(policy, rollout)
    assert [scored.segment for scored in replay] == [s for s in rollout.segments if not s.is_given]
    for scored in replay:
        segment = scored.segment
        kept = segment if isinstance(segment, Text) else segment.drawn
        assert_near(logp_of(scored), kept.logp)


def test_sharing_what_was_read_is_the_plain_way_in_values_and_gradients(policy):
    plan = [Read(PROMPTS), Write(5), DRAW]
    rollout = sample_plan(policy, plan, seed=1, step=0, index=[0, 1, 2], G=3)
    found = []
    for values in (map(logp_of, replay_rollout(policy, rollout)), plain_replay(policy, rollout)):
        text, image = values
        policy.zero_grad()
        (text.sum() + (image * torch.arange(3)).sum()).backward()
        gradients = {
            name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
        found.append((text, image, gradients))
    (text, image, shared), (plain_text, plain_image, plain) = found
    assert_near(text, plain_text)
    assert_near(image, plain_image)
    assert shared.keys() == plain.keys()
    for name in plain:
        assert (shared[name] - plain[name]).norm() <= 1e-4 * plain[name].norm() + 1e-5, name


def test_a_replay_calls_the_velocity_once_for_all_noisy_steps_of_an_image(policy, monkeypatch):
    rollout, calls, velocity = walk(policy, "rounds"), [], policy.velocity

    def count_calls(context, x, t, size):
        calls.append(len(x))
        return velocity(context, x, t, size)

    monkeypatch.setattr(policy, "velocity", count_calls)
    replay_rollout(policy, rollout)
    assert calls == [6 * 3, 6 * 3]


def test_an_image_without_a_noisy_step_cannot_be_replayed(policy):
    rollout = walk(policy, "text to image", draw=Draw(SIZE, DRAW.times))
    with pytest.raises(ValueError, match="no noisy step"):
        replay_rollout(policy, rollout)


def test_a_truncated_text_is_closed_and_only_sampled_tokens_are_chosen(policy):
    plan = [Read(PROMPTS), Write(4, temperature=2.0)]
    text = sample_plan(policy, plan, seed=0, step=0, index=[0, 1, 2], G=8).segments[-1]
    assert (text.tokens[:, 0] == policy.start).all()
    assert (text.logp[~text.chosen] == 0).all()
    for tokens, mask, chosen in zip(text.tokens, text.mask, text.chosen):
        read = tokens[mask]
        assert read[-1] == policy.end
        assert (read[1:-1] != policy.end).all()
        assert (chosen <= mask).all()
        assert not chosen[0]
        assert chosen.sum() in (4, len(read) - 1)               # cut off, or it wrote its own end


@pytest.mark.parametrize("part", ["pixels", "latents"])
def test_a_drawn_image_is_read_back_by_its_pixels_and_by_its_latents(policy, part):
    rollout = walk(policy, "rounds")
    prompt, first, *rest = rollout.segments
    if part == "pixels":
        changed = replace(first, pixels=[-image for image in first.pixels])
    else:
        changed = replace(first, drawn=replace(first.drawn, data=-first.drawn.data))
    other = replace(rollout, segments=(prompt, changed, *rest))
    second, changed_second = (replay_rollout(policy, r)[-1].flow.v for r in (rollout, other))
    assert (second - changed_second).abs().max() > 1e-3


def test_an_image_that_is_read_back_carries_no_gradient_to_what_drew_it(policy):
    """The head that draws latents gets none from the text that is written about them."""
    _, text, _ = replay_rollout(policy, walk(policy, "rounds"))
    policy.zero_grad()
    text.logp.sum().backward()
    assert policy.latent_out.weight.grad is None
    assert policy.embed.weight.grad.norm() > 0


# ---- random numbers ----


def test_a_sample_depends_on_its_own_seed_step_prompt_and_number_alone(policy):
    whole = walk(policy, "think, draw", index=[7, 8, 9], G=4)
    alone = walk(policy, "think, draw", [1], index=[8], first_sample=2)
    same = subset(whole, range(1, 2), range(2, 4))
    assert texts_of(policy, same) == texts_of(policy, alone)
    assert_near(same.segments[-1].drawn.data, alone.segments[-1].drawn.data)


@pytest.mark.parametrize(
    "change", [dict(seed=2), dict(step=3), dict(index=[1]), dict(first_sample=2)]
)
def test_another_seed_step_prompt_or_number_gives_another_sample(policy, change):
    settings = dict(seed=1, step=2, index=[0], first_sample=0)
    one, other = (walk(policy, "text to image", [0], **(settings | more)) for more in ({}, change))
    assert (one.segments[-1].drawn.latents - other.segments[-1].drawn.latents).abs().max() > 1e-2


def test_sampling_leaves_the_global_generator_alone(policy):
    before = torch.get_rng_state()
    walk(policy, "think, draw")
    assert torch.equal(before, torch.get_rng_state())


def test_shared_noise_is_that_of_a_prompts_own_first_sample(policy):
    draw = replace(DRAW, window=(0, 2))
    own, shared = (
        walk(policy, "text to image", draw=replace(draw, shared_noise=is_shared), G=4)
        .segments[-1]
        .drawn.latents[:, 0]
        for is_shared in (False, True)
    )
    assert torch.equal(shared, own[::4].repeat_interleave(4, 0))


def test_every_step_has_noise_of_its_own(policy):
    draw = replace(DRAW, size=(32, 32), window=(0, 2))
    flow = walk(policy, "text to image", draw=draw, G=8).segments[-1].drawn
    steps = (flow.latents[:, 1:] - flow.means) / flow.std.view(1, -1, 1, 1)
    noises = torch.stack([flow.latents[:, 0], steps[:, 0], steps[:, 1]]).flatten(1)
    assert noises.shape[1] > 1000
    assert (torch.corrcoef(noises) - torch.eye(3)).abs().max() < 0.15


# ---- parts of rollouts ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_of_a_rollout_is_replayed_as_in_the_whole(policy, layout):
    rollout = walk(policy, layout, G=3)
    part = replay_rollout(policy, subset(rollout, range(1, 3), range(1, 3)))
    for ours, whole in zip(part, replay_rollout(policy, rollout)):
        assert_near(logp_of(ours), logp_of(whole)[[4, 5, 7, 8]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rollouts_of_some_prompts_join_to_the_rollout_of_all(policy, layout):
    whole = walk(policy, layout)
    joint = join([walk(policy, layout, rows) for rows in ([0, 1], [2])])
    assert joint.B == 3
    if layout != "question":
        assert_near(images_of(policy, joint), images_of(policy, whole), 1e-4)
    for ours, theirs in zip(replay_rollout(policy, joint), replay_rollout(policy, whole)):
        width = min(logp_of(ours).shape[1], logp_of(theirs).shape[1])
        assert_near(logp_of(ours)[:, :width], logp_of(theirs)[:, :width])


def test_pictures_are_the_decoded_pixels_brought_from_minus_one_to_one_into_zero_to_one(policy):
    rollout = walk(policy, "text to image")
    pixels = policy.decode(rollout.segments[-1].drawn.data, SIZE)
    images = images_of(policy, rollout)
    assert images.shape == (6, 3, *SIZE)
    assert_near(images, (pixels.clamp(-1, 1) + 1) / 2, 1e-6)
    assert texts_of(policy, rollout) is None
    assert images_of(policy, rollout, last=2) is None


# ---- guidance ----


def test_guidance_goes_without_the_last_given_text_or_without_the_images(policy):
    """BAGEL's contexts: all that was read; all up to the last given text; the given texts alone.
    What the policy wrote is in the first."""
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    system, prompt, thought = (policy.encode_text([text]) for text in PROMPTS)
    x = torch.randn(1, 2, policy.config.latent_features, generator=torch.Generator().manual_seed(2))

    def read(image, *texts):
        context = policy.append_image(policy.empty(1), pixels=pixels) if image else policy.empty(1)
        for text in texts:
            _, context = policy.append_text(context, *text)
        return context

    reader = Reader(policy, 1, GUIDED)
    with torch.no_grad():
        reader.image(pixels, None, (32, 32))
        reader.text(*system)
        reader.text(*prompt)
        reader.text(*thought, chosen=True)
        plain = read(True, system, prompt, thought), read(True, system), read(False, system, prompt)
        wanted = guided_velocity(policy, x, 0.5, SIZE, *plain, GUIDED)
        assert_near(reader.velocity(SIZE)(x, torch.tensor(0.5)), wanted)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_gradient_of_a_guided_replay_is_that_of_finite_differences(float64):
    policy = load_policy(TOY).double()
    rollout = walk(policy, "edit", [0], guidance=GUIDED)
    weight = policy.blocks[1].experts[1].v.weight

    def value():
        return logp_of(replay_rollout(policy, rollout)[0]).sum()

    value().backward()
    direction, step = (
        weight.grad / weight.grad.norm(), 1e-3)  # norms are fp32 inside, so the step is large
    with torch.no_grad():
        weight += step * direction
        above = value()
        weight -= 2 * step * direction
        below = value()
    assert weight.grad.norm().item() == pytest.approx(
        ((above - below) / (2 * step)).item(), rel=1e-3)


# ---- the command line ----


def test_the_command_line_draws_thinks_edits_and_answers(tmp_path, capsys):
    out = str(tmp_path / "s.png")
    few = ["--steps", "2", "--out", out]
    main(["a red circle left of a blue square", "--n", "3", *few])
    assert Image.open(out).size[0] == 3 * 130 - 2
    main(["as many circles as a triangle has sides", "--think", "--n", "1", *few])
    assert "<think>" in capsys.readouterr().out
    guidance = ["--guidance", "2", "--image_guidance", "1.5"]
    main(["make the circle red", "--edit", out, "--n", "2", *guidance, *few])
    assert Image.open(out).size[0] == 2 * 130 - 2
    main(["how many circles ?", "--question", out])
    assert capsys.readouterr().out.split()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--policy", "nowhere"], "policy folder nowhere does not exist"), (["--n", "0"], "--n"),
        (["--out", "nowhere/x.png"], "in a folder that exists"),
        (["--out", "x.xyz"], "must be a .png file"), (["--question", "missing.png"], "missing.png"),
        (["--question", "a", "--edit", "b"], "not allowed with argument --question")],
)
def test_bad_input_ends_in_one_line(more, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["x", *more])
    line = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.strip()
    assert words in line
    assert "\n" not in line
