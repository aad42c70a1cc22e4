"""At any size the policy computes what the plain way computes: widths, heads, layers, patches, ragged texts and image shapes at random."""

import tempfile
from pathlib import Path

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from plain_bagel import Plain

from policy import Guidance, Policy, PolicyConfig, guided_velocity
from support.checkpoint import load_policy, save_policy

GOLDEN = Path(__file__).parent / "golden" / "bagel_tiny"
N = 3


@st.composite
def configs(draw):
    """A configuration of any proportions; what the files would leave out is drawn too."""
    one = lambda *values: draw(st.sampled_from(values))
    kv, group, d = one(1, 2, 3), one(1, 2, 3), one(4, 8, 16)
    patch, side, vit_head = one(3, 4, 7, 10), one(3, 5), one(4, 6)
    vit_heads, levels = one(1, 2, 3), one(1, 2, 3)
    return PolicyConfig(
        llm=dict(hidden_size=kv * group * d, intermediate_size=one(12, 50), num_hidden_layers=one(1, 2, 3), num_attention_heads=kv * group,
                 num_key_value_heads=kv, vocab_size=one(290, 333), rope_theta=one(1e2, 1e4, 1e6), rms_norm_eps=one(1e-6, 1e-3)),
        vit=dict(hidden_size=vit_heads * vit_head, intermediate_size=one(9, 40), num_hidden_layers=one(1, 2, 3), num_attention_heads=vit_heads,
                 patch_size=patch, image_size=side * patch + one(0, 1, 2 * patch), layer_norm_eps=one(1e-6, 1e-3)),
        bagel=dict(latent_patch_size=one(1, 2, 3), max_latent_size=one(3, 6), vit_max_num_patch_per_side=side),
        ae=dict(in_channels=3, out_ch=3, ch=8, ch_mult=[1] * levels, num_res_blocks=1, z_channels=one(1, 4), downsample=2 ** (levels - 1),
                norm_groups=4, scale_factor=0.5, shift_factor=0.1))


def random_policy(config, folder, generator):
    """A policy of `config` with no weight at its usual start, saved and read again."""
    policy = Policy(config, load_policy(GOLDEN).tokenizer)
    with torch.no_grad():
        for name, x in policy.state_dict().items():
            noise = torch.randn(x.shape, generator=generator)
            x.copy_(1 + 0.2 * noise if x.ndim == 1 and name.endswith("weight") else noise / max(1, x[0].numel()) ** 0.5 if x.ndim > 1
                    else 0.2 * noise)
        policy.embed.weight.mul_(config.llm["hidden_size"] ** 0.5)
    save_policy(policy, folder)
    return load_policy(folder)


def near(ours, plain):
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() <= 5e-5 * max(1.0, plain.abs().max())


@settings(max_examples=12, phases=[Phase.generate])             # to shrink a policy would take minutes
@given(configs(), st.integers(0, 10**6), st.booleans())
def test_logits_velocities_and_guidance_of_ragged_batches_are_the_plain_ones(config, seed, several_sizes):
    g = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high + 1, (), generator=g))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        policy = random_policy(config, folder, g)
        plain = Plain(folder, (policy.start, policy.end, policy.image_start, policy.image_end))
        patch, side, stride = config.vit["patch_size"], config.bagel["vit_max_num_patch_per_side"], config.stride
        sizes = [(stride * number(1, 3), stride * number(1, 3)) for _ in range(N)]
        sizes = sizes if several_sizes else sizes[:1] * N
        latents, noisy = ([torch.randn(h // stride * (w // stride), config.latent_features, generator=g) for h, w in sizes] for _ in "ab")
        pixels = [2 * torch.rand(3, patch * number(1, side), patch * number(1, side), generator=g) - 1 for _ in range(N)]
        texts = [[torch.randint(0, 285, (number(1, 9),), generator=g) for _ in range(N)] for _ in range(2)]
        pad = lambda rows: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        read = lambda context, rows: policy.append_text(context, pad(rows), pad([torch.ones(len(r), dtype=torch.bool) for r in rows]))
        t = 0.25 + 0.5 * number(0, 1)

        _, context = read(policy.empty(N), texts[0])
        no_text = policy.append_image(context, pixels=pixels, latents=pad(latents), size=sizes)
        logits, full = read(no_text, texts[1])
        _, no_image = read(context, texts[1])
        v = policy.velocity(full, pad(noisy), t, sizes)
        told = [("text", texts[0][i].tolist()) for i in range(N)]
        shown = [[told[i], ("latents", latents[i], 0.0, sizes[i]), ("vit", pixels[i])] for i in range(N)]
        asked = [("text", texts[1][i].tolist()) for i in range(N)]
        for i in range(N):
            near(logits[i, :len(texts[1][i])], plain.logits([*shown[i], asked[i]]))
            near(v[i, :len(noisy[i])], plain.velocity([*shown[i], asked[i]], noisy[i], t, sizes[i]))
        for renorm, scales in (("global", (4.0, 1.0)), ("channel", (3.0, 1.5)), ("text_channel", (4.0, 2.0))):
            how = Guidance(*scales, renorm, 0.1, (0.2, 0.8))
            guided = guided_velocity(policy, pad(noisy), t, sizes, full, no_text, no_image, how)
            for i in range(N):
                near(guided[i, :len(noisy[i])], plain.guided([*shown[i], asked[i]], shown[i], [told[i], asked[i]], noisy[i], t, sizes[i], how))
