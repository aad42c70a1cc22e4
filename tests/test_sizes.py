"""At any size, of model, text and image, the policy computes what the plain way computes."""

import tempfile
from pathlib import Path

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from plain_bagel import Plain
from torch.nn.utils.rnn import pad_sequence

from policy import Policy, PolicyConfig
from support.checkpoint import load_policy, save_policy

GOLDEN = Path(__file__).parent / "golden" / "bagel_tiny"
N = 3


@st.composite
def configs(draw):
    """A configuration of any proportions; what the files would leave out is drawn too."""

    def one(*values):
        return draw(st.sampled_from(values))

    kv, group, width = one(1, 2, 3), one(1, 2, 3), one(4, 8, 16)
    patch, side, vit_heads, levels = one(3, 4, 7, 10), one(3, 5), one(1, 2, 3), one(1, 2, 3)
    llm = dict(
        hidden_size=kv * group * width, intermediate_size=one(12, 50),
        num_hidden_layers=one(1, 2, 3), num_attention_heads=kv * group, num_key_value_heads=kv,
        vocab_size=one(290, 333), rope_theta=one(1e2, 1e4, 1e6), rms_norm_eps=one(1e-6, 1e-3))
    vit = dict(
        hidden_size=vit_heads * one(4, 6), intermediate_size=one(9, 40),
        num_hidden_layers=one(1, 2, 3), num_attention_heads=vit_heads, patch_size=patch,
        image_size=side * patch + one(0, 1, 2 * patch), layer_norm_eps=one(1e-6, 1e-3))
    bagel = dict(
        latent_patch_size=one(1, 2, 3), max_latent_size=one(3, 6), vit_max_num_patch_per_side=side)
    ae = dict(
        in_channels=3, out_ch=3, ch=8, ch_mult=[1] * levels, num_res_blocks=1, z_channels=one(1, 4),
        downsample=2 ** (levels - 1), norm_groups=4, scale_factor=0.5, shift_factor=0.1)
    return PolicyConfig(llm, vit, bagel, ae)


def random_policy(config, folder, generator):
    """A policy of `config` with no weight at its usual start, saved and read again."""
    policy = Policy(config, load_policy(GOLDEN).tokenizer)
    for name, x in policy.state_dict().items():
        noise = torch.randn(x.shape, generator=generator)
        if x.ndim > 1:
            x.copy_(noise / max(1, x[0].numel()) ** 0.5)
        else:
            x.copy_(0.2 * noise + name.endswith("weight"))
    policy.embed.weight.mul_(config.llm["hidden_size"] ** 0.5)
    save_policy(policy, folder)
    return load_policy(folder)


def check_near(ours, plain):
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() <= 5e-5 * max(1.0, plain.abs().max())


@settings(max_examples=12, phases=[Phase.generate])  # to shrink a policy would take minutes
@given(configs(), st.integers(0, 10**6), st.booleans())
@torch.no_grad()
def test_logits_and_velocities_of_ragged_batches_are_the_plain_ones(config, seed, several_sizes):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def random_latents():
        tokens = [height * width // config.stride**2 for height, width in sizes]
        return [torch.randn(count, config.latent_features, generator=generator) for count in tokens]

    def read(context, rows):
        mask = pad_sequence(
            [torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return policy.append_text(context, pad_sequence(rows, batch_first=True), mask)

    with tempfile.TemporaryDirectory() as folder:
        policy = random_policy(config, folder, generator)
        plain = Plain(folder, (policy.start, policy.end, policy.image_start, policy.image_end))
    patch, side, stride = (
        config.vit["patch_size"], config.bagel["vit_max_num_patch_per_side"], config.stride)
    sizes = [(stride * number(1, 3), stride * number(1, 3)) for _ in range(N)]
    if not several_sizes:
        sizes = sizes[:1] * N
    latents, noisy, t = random_latents(), random_latents(), 0.25 + 0.5 * number(0, 1)
    pixels = [
        2 * torch.rand(3, patch * number(1, side), patch * number(1, side), generator=generator) - 1
        for _ in range(N)
    ]
    first, second = (
        [torch.randint(0, 285, (number(1, 9),), generator=generator) for _ in range(N)]
        for _ in range(2)
    )
    padded, x = (pad_sequence(rows, batch_first=True) for rows in (latents, noisy))

    _, context = read(policy.empty(N), first)
    context = policy.append_image(context, pixels=pixels, latents=padded, size=sizes)
    logits, context = read(context, second)
    velocity = policy.velocity(context, x, t, sizes)
    for i in range(N):
        image = [("latents", latents[i], 0.0, sizes[i]), ("vit", pixels[i])]
        segments = [("text", first[i].tolist()), *image, ("text", second[i].tolist())]
        L, M = len(second[i]), len(noisy[i])
        check_near(logits[i, :L], plain.logits(segments))
        check_near(velocity[i, :M], plain.velocity(segments, noisy[i], t, sizes[i]))
