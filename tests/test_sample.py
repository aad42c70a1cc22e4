"""Acting and learning walk one trajectory: replay is rollout, sharing is the plain way, samples do not depend on their batch."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from sample import main
import flow_grpo
from policy import Guidance, guided_velocity
from sample import (TOY, Draw, Picture, Read, Reader, See, Text, Write, generators, images_of,
    join, replay_rollout, sample_plan, subset, texts_of)
from studies.bench import plain_replay, plain_text
from support.checkpoint import load_policy
from support.pictures import read_picture, save_grid

GOLDEN = Path(__file__).parent / "golden" / "bagel_tiny"
DRAW = Draw((16, 24), flow_grpo.time_grid(6, 2.0), (1, 4), 0.8, "cps")
PROMPTS = ["a red cat", "a blue dog on the box", "x"]
GUIDED = Guidance(3.0, 2.0, "channel", 0.0, (0.0, 1.0))


@pytest.fixture(scope="module")
def policy():
    return load_policy(GOLDEN)


def plans():
    pixels = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"question": [See(pixels), Read(PROMPTS), Write(5)],
            "text to image": [Read(PROMPTS), DRAW],
            "think, draw": [Read(PROMPTS), Write(5, 0.9), DRAW],
            "edit": [See(pixels, pixels), Read(PROMPTS), DRAW],
            "think, edit": [See(pixels, pixels), Read(PROMPTS), Write(4), DRAW],
            "several rounds": [Read(PROMPTS), DRAW, Read(["make it red", "no", "more dogs than cats"]), Write(4), DRAW]}


@pytest.mark.parametrize("guidance", [None, GUIDED])


@pytest.mark.parametrize("layout", plans())
def test_replay_with_unchanged_weights_gives_the_log_probs_of_the_rollout(policy, layout, guidance):
    r = sample_plan(policy, plans()[layout], seed=1, step=2, prompts=[0, 1, 2], G=4, guidance=guidance)
    scored = replay_rollout(policy, r)
    chosen = [s for s in r.segments if (s.chosen if isinstance(s, Text) else s.flow) is not None]
    assert [s.segment for s in scored] == chosen and chosen
    for s in scored:
        if s.logp is not None:
            assert torch.allclose(s.logp, s.segment.logp, atol=2e-5)
        else:
            assert torch.allclose(s.flow.logp, s.segment.flow.logp, atol=2e-5)


def test_sharing_the_prefix_is_the_plain_way_values_and_gradients(policy):
    r = sample_plan(policy, plans()["think, draw"][:1] + [Write(5), DRAW], seed=1, step=0, prompts=[0, 1, 2], G=3)
    grads = []
    for scored in ([s.logp if s.logp is not None else s.flow.logp for s in replay_rollout(policy, r)], plain_replay(policy, r)):
        policy.zero_grad()
        (scored[0].sum() + (scored[1] * torch.arange(3)).sum()).backward()
        grads.append(([x.detach() for x in scored], {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}))
    (values, ours), (plain_values, plain) = grads
    for a, b in zip(values, plain_values):
        assert torch.allclose(a, b, atol=2e-5)
    assert ours.keys() == plain.keys()
    for n in plain:
        assert (ours[n] - plain[n]).norm() <= 1e-4 * plain[n].norm() + 1e-5, n


def test_a_replay_calls_the_velocity_once_for_all_noisy_steps_of_an_image(policy, monkeypatch):
    r, calls, velocity = sample_plan(policy, plans()["several rounds"], seed=0, step=0, prompts=[0, 1, 2], G=2), [], policy.velocity
    monkeypatch.setattr(policy, "velocity", lambda context, x, t, size: calls.append(tuple(x.shape[:1])) or velocity(context, x, t, size))
    replay_rollout(policy, r)
    assert calls == [(6 * 3,), (6 * 3,)]


@pytest.mark.parametrize("size", [(16, 24), [(16, 24), (8, 8), (24, 16)]])
def test_an_image_without_a_noisy_step_cannot_be_replayed(policy, size):
    r = sample_plan(policy, [Read(PROMPTS), Draw(size, flow_grpo.time_grid(3))], seed=0, step=0, prompts=[0, 1, 2], G=1)
    with pytest.raises(ValueError, match="no noisy step"):
        replay_rollout(policy, r)


def test_cached_writing_is_full_recomputation(policy):
    with torch.no_grad():
        _, context = policy.append_text(policy.empty(3), *policy.encode_text(PROMPTS))
        uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(3))
        tokens, mask, _ = policy.sample_text(context, uniforms)
        plain = plain_text(policy, context, uniforms)[:, :tokens.shape[1]]
    assert torch.equal(tokens[mask], plain[mask])


def test_a_sample_depends_on_its_seed_step_prompt_and_place_alone(policy):
    plan = lambda prompts: [Read(prompts), Write(5), DRAW]
    whole = sample_plan(policy, plan(PROMPTS), seed=1, step=2, prompts=[7, 8, 9], G=4)
    part = sample_plan(policy, plan(PROMPTS[1:2]), seed=1, step=2, prompts=[8], G=4)
    a, b = subset(whole, range(1, 2)), part
    assert texts_of(policy, a) == texts_of(policy, b)
    assert torch.allclose(a.segments[-1].flow.data, b.segments[-1].flow.data, atol=2e-5)
    for change in (dict(seed=2, step=2, prompts=[8]), dict(seed=1, step=3, prompts=[8]), dict(seed=1, step=2, prompts=[7])):
        other = sample_plan(policy, plan(PROMPTS[1:2]), G=4, **change)
        assert not torch.allclose(other.segments[-1].flow.data, b.segments[-1].flow.data)


def test_sampling_leaves_the_global_generator_alone(policy):
    before = torch.get_rng_state()
    sample_plan(policy, [Read(PROMPTS), Write(3), DRAW], seed=1, step=0, prompts=[0, 1, 2], G=2)
    assert torch.equal(before, torch.get_rng_state())


def test_micro_batches_are_slices_of_the_whole(policy):
    r = sample_plan(policy, plans()["think, edit"], seed=1, step=0, prompts=[0, 1, 2], G=4)
    whole = replay_rollout(policy, r)
    for i in range(3):
        for a, b in zip(replay_rollout(policy, subset(r, range(i, i + 1))), whole):
            rows = slice(4 * i, 4 * i + 4)
            if a.logp is not None:
                assert torch.allclose(a.logp, b.logp[rows], atol=2e-5)
            else:
                assert torch.allclose(a.flow.logp, b.flow.logp[rows], atol=2e-5)


def test_shared_noise_starts_a_group_from_one_point(policy):
    plan = [Read(PROMPTS), Draw((16, 24), flow_grpo.time_grid(4), (0, 2), 0.5, "cps", shared_noise=True)]
    start = sample_plan(policy, plan, seed=0, step=0, prompts=[0, 1, 2], G=4).segments[-1].flow.latents[:, 0].view(3, 4, -1)
    assert (start == start[:, :1]).all() and not torch.equal(start[0], start[1])


def test_a_truncated_thought_is_closed_and_only_sampled_tokens_are_chosen(policy):
    r = sample_plan(policy, [Read(PROMPTS), Write(4)], seed=0, step=0, prompts=[0, 1, 2], G=8)
    s = r.segments[-1]
    assert (s.tokens[:, 0] == policy.start).all() and not s.chosen[:, 0].any()
    for tokens, mask, chosen, logp in zip(s.tokens, s.mask, s.chosen, s.logp):
        read = tokens[mask]
        assert read[-1] == policy.end and (read[1:-1] != policy.end).all()
        assert chosen.sum() in (4, mask.sum() - 1) and (chosen <= mask).all() and (logp[~chosen] == 0).all()


def test_the_thought_is_read_by_the_image(policy):
    """The image behind a thought differs from the image without it, under the same noise."""
    r = sample_plan(policy, [Read(PROMPTS), Write(5), DRAW], seed=0, step=0, prompts=[0, 1, 2], G=2)
    bare = r.segments[0], r.segments[2]
    v = replay_rollout(policy, r)[1].flow.v
    assert not torch.allclose(replay_rollout(policy, type(r)(bare, r.B, r.G))[0].flow.v, v, atol=1e-3)


def test_a_given_image_comes_first(policy):
    pixels = torch.zeros(3, 3, 40, 40)
    with pytest.raises(ValueError, match="put it first"):
        sample_plan(policy, [Read(PROMPTS), Write(3), See(pixels)], seed=0, step=0, prompts=[0, 1, 2], G=2)


def test_what_was_drawn_is_read_back_clean(policy):
    """The second image of several rounds depends on the first, through its latents and through its pixels."""
    r = sample_plan(policy, plans()["several rounds"], seed=1, step=0, prompts=[0, 1, 2], G=2)
    first, v = r.segments[1], replay_rollout(policy, r)[-1].flow.v
    assert len(first.pixels) == 6 and first.pixels[0].shape[0] == 3
    for change in (dict(pixels=[-x for x in first.pixels]), dict(flow=dataclasses.replace(first.flow, data=-first.flow.data))):
        other = dataclasses.replace(r, segments=(r.segments[0], dataclasses.replace(first, **change), *r.segments[2:]))
        assert not torch.allclose(replay_rollout(policy, other)[-1].flow.v, v, atol=1e-3)


@pytest.mark.parametrize("shared_noise", [False, True])
def test_a_group_in_parts_is_the_group(policy, shared_noise):
    plan = [Read(PROMPTS), Write(5), dataclasses.replace(DRAW, shared_noise=shared_noise)]
    whole = sample_plan(policy, plan, seed=1, step=2, prompts=[0, 1, 2], G=4)
    part = sample_plan(policy, plan, seed=1, step=2, prompts=[0, 1, 2], G=2, first=2)
    a, b = subset(whole, range(3), range(2, 4)), part
    assert a.G == b.G == 2 and texts_of(policy, a) == texts_of(policy, b)
    assert torch.allclose(a.segments[-1].flow.data, b.segments[-1].flow.data, atol=2e-5)


@pytest.mark.parametrize("layout", plans())
def test_rollouts_of_parts_join_to_the_whole(policy, layout):
    def walk(rows):
        rows = list(rows)
        short = lambda x: x[rows] if isinstance(x, torch.Tensor) else [x[i] for i in rows]
        plan = [type(item)(*(short(x) if isinstance(x, (list, torch.Tensor)) else x for x in vars(item).values()))
                if isinstance(item, (Read, See)) else item for item in plans()[layout]]
        return sample_plan(policy, plan, seed=1, step=0, prompts=rows, G=2)

    whole, parts = walk(range(3)), join([walk(range(2)), walk([2])])
    assert parts.B == 3 and len(parts.segments) == len(whole.segments)
    assert images_of(policy, whole) is None or torch.allclose(images_of(policy, parts), images_of(policy, whole), atol=1e-4)
    for a, b in zip(replay_rollout(policy, parts), replay_rollout(policy, whole)):
        ours, theirs = (s.logp if s.logp is not None else s.flow.logp for s in (a, b))
        assert torch.allclose(ours, theirs[:, :ours.shape[1]], atol=2e-5)


def test_images_of_several_sizes_are_drawn_as_alone(policy):
    """Editing in one batch, each image at its own size, is editing one by one."""
    g = torch.Generator().manual_seed(5)
    sizes = [(16, 24), (8, 8), (24, 16)]
    sources = [torch.rand(3, *s, generator=g) * 2 - 1 for s in sizes]
    seen = [torch.rand(3, 20, 30, generator=g), torch.rand(3, 10, 10, generator=g), torch.rand(3, 50, 20, generator=g)]
    times = flow_grpo.time_grid(4, 2.0)
    batch = sample_plan(policy, [See(seen, sources), Read(PROMPTS), Draw(sizes, times)], seed=3, step=0, prompts=[0, 1, 2], G=2, guidance=GUIDED)
    images = images_of(policy, batch)
    for i in range(3):
        plan = [See([seen[i]], [sources[i]]), Read(PROMPTS[i:i + 1]), Draw(sizes[i], times)]
        alone = images_of(policy, sample_plan(policy, plan, seed=3, step=0, prompts=[i], G=2, guidance=GUIDED))
        assert torch.allclose(alone, torch.stack(images[2 * i:2 * i + 2]), atol=2e-4)
    with pytest.raises(ValueError, match="several sizes cannot share noisy steps"):
        sample_plan(policy, [Read(PROMPTS), Draw(sizes, times, (0, 1), 0.5)], seed=0, step=0, prompts=[0, 1, 2], G=1)


def test_pictures_come_out_in_range_and_grids_are_written(policy, tmp_path):
    r = sample_plan(policy, [Read(PROMPTS), DRAW], seed=0, step=0, prompts=[0, 1, 2], G=2)
    images = images_of(policy, r)
    assert images.shape == (6, 3, 16, 24) and 0 <= images.min() and images.max() <= 1
    save_grid(images, str(tmp_path / "grid.png"), columns=4)
    assert Image.open(tmp_path / "grid.png").size == (4 * 26 - 2, 2 * 18 - 2)
    assert isinstance(r.segments[-1], Picture) and texts_of(policy, r) is None


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_an_unreadable_image_is_named_in_one_line(policy, tmp_path, content):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="picture.png cannot be read") as error:
        read_picture(str(path), policy)
    assert "\n" not in str(error.value)


def test_the_command_line_draws_thinks_and_answers(tmp_path, capsys):
    out = str(tmp_path / "s.png")
    main(["a red circle left of a blue square", "--n", "3", "--out", out])
    assert Image.open(out).size[0] == 3 * 130 - 2
    main(["as many circles as a triangle has sides", "--think", "--n", "1", "--out", out])
    assert "<think>" in capsys.readouterr().out
    main(["make it red", "--edit", out, "--n", "2", "--guidance", "2", "--image_guidance", "1.5", "--renorm", "channel", "--out", out])
    assert Image.open(out).size[0] == 2 * 130 - 2
    main(["how many circles ?", "--question", out])
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("argv, said", [
    (["x", "--policy", "nowhere"], "policy folder nowhere does not exist"), (["x", "--n", "0"], "--n 0: must be"),
    (["x", "--guidance", "nan"], "--guidance nan: must be a finite number"), (["x", "--size", "0"], "--size 0"), (["x", "--seed", "-1"], "--seed -1"),
    (["x", "--out", "nowhere/x.png"], "in a folder that exists"), (["x", "--out", "x.xyz"], "must be a .png file"),
    (["x", "--question", "missing.png"], "image missing.png does not exist"), (["x", "--question", "a", "--edit", "b"], "give one of them")])
def test_bad_input_ends_in_one_line(argv, said):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert said in str(stop.value.code) and "\n" not in str(stop.value.code)


def test_an_unknown_flag_ends_in_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["x", "--unknown", "3"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --unknown 3; see --help\n")


def test_guidance_goes_without_the_last_given_text_or_without_the_images(policy):
    """BAGEL's three contexts: all that was read; all up to the last given text; the given texts alone. A thought is in the first."""
    pixels = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    system, prompt, thought = (policy.encode_text([t]) for t in ("think", "a red cat", "it sits"))
    reader, x = Reader(policy, 1, GUIDED), torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(2))

    def read(image, *texts):
        context = policy.append_image(policy.empty(1), pixels=pixels) if image else policy.empty(1)
        for text in texts:
            _, context = policy.append_text(context, *text)
        return context

    with torch.no_grad():
        reader.text(*system)
        assert reader.no_text.valid.shape[1] == 0
        reader = Reader(policy, 1, GUIDED)
        reader.image(pixels, None, (20, 20))
        assert reader.no_text is reader.full and reader.no_image.valid.shape[1] == 0
        reader.text(*system)
        reader.text(*prompt)
        reader.text(*thought, chosen=True)
        contexts = read(True, system, prompt, thought), read(True, system), read(False, system, prompt)
        for ours, plain in zip((reader.full, reader.no_text, reader.no_image), contexts):
            assert torch.equal(ours.position, plain.position)
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours.keys, plain.keys))
        v = guided_velocity(policy, x, 0.5, (16, 24), *contexts, GUIDED)
        assert torch.allclose(reader.velocity((16, 24))(x, torch.tensor(0.5)), v, atol=2e-5)


def test_no_two_samples_share_a_generator():
    seeds = {g.initial_seed() for seed in range(3) for step in range(3) for g in generators(seed, step, [0, 1, 2], range(3))}
    assert len(seeds) == 81


def test_shared_noise_is_that_of_a_prompts_own_first_sample(policy):
    def start(shared):
        draw = Draw((16, 24), flow_grpo.time_grid(4), (0, 2), 0.5, "cps", shared)
        return sample_plan(policy, [Read(PROMPTS), draw], seed=0, step=0, prompts=[4, 5, 6], G=4).segments[-1].flow.latents[:, 0]

    assert torch.equal(start(True), start(False)[::4].repeat_interleave(4, 0))


def test_the_noise_of_a_step_is_not_the_noise_before_it(policy):
    draw = Draw((16, 24), flow_grpo.time_grid(4), (0, 2), 0.5, "cps")
    flow = sample_plan(policy, [Read(PROMPTS), draw], seed=0, step=0, prompts=[0, 1, 2], G=4).segments[-1].flow
    steps = (flow.latents[:, 1:] - flow.means) / flow.std.view(1, -1, 1, 1)
    noises = torch.stack([flow.latents[:, 0], steps[:, 0], steps[:, 1]]).flatten(1)
    assert (torch.corrcoef(noises) - torch.eye(3)).abs().max() < 0.15


def test_micro_batches_of_images_of_several_sizes_are_slices_of_the_whole():
    policy, g = load_policy(TOY), torch.Generator().manual_seed(4)
    pixels = [torch.rand(3, h, w, generator=g) * 2 - 1 for h, w in ((16, 32), (32, 32), (32, 32))]
    plan = [See(pixels, pixels), Read(["a red circle"] * 3), Draw((16, 32), flow_grpo.time_grid(4), (0, 2), 0.5, "cps")]
    r = sample_plan(policy, plan, seed=1, step=0, prompts=[0, 1, 2], G=2)
    whole = replay_rollout(policy, r)[0].flow.logp
    for first, last in ((0, 1), (0, 2), (2, 3)):
        assert torch.allclose(replay_rollout(policy, subset(r, range(first, last)))[0].flow.logp, whole[2 * first:2 * last], atol=2e-5)


def test_pictures_are_the_decoded_pixels_from_minus_one_to_one_brought_to_zero_to_one(policy):
    r = sample_plan(policy, [Read(PROMPTS), DRAW], seed=0, step=0, prompts=[0, 1, 2], G=2)
    pixels = policy.decode(r.segments[-1].flow.data, (16, 24))
    assert torch.allclose(images_of(policy, r), (pixels.clamp(-1, 1) + 1) / 2, atol=1e-6)


def test_a_picture_is_brought_to_the_autoencoders_size_and_then_to_the_vits(policy, tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "i.png")
    pixels, source = read_picture(str(tmp_path / "i.png"), policy)
    assert policy.config.vae_resize == (48, 24, 8) and policy.config.vit_resize == (50, 50, 10)
    assert source.shape == (3, 24, 48) and pixels.shape == (3, 20, 50)
