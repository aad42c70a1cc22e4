"""The policy computes what the official BAGEL code computes: every case of golden/bagel_tiny, values and gradients."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flow_grpo import rollout, time_grid
from policy import (Guidance, grid_ids, guided_velocity, own_attention, patchify, sincos_table,
    unpatchify)
from support.checkpoint import load_policy, release_name
from support.pictures import fit_image, fit_size, to_tensor

GOLDEN = Path(__file__).parent / "golden" / "bagel_tiny"
CASES = json.loads((GOLDEN / "cases.json").read_text())
BY_NAME = {c["name"]: c for c in CASES["cases"]}
SINGLE, WHOLE, GRADIENT = 5e-5, 2e-4, 1e-4                      # golden/README: absolute, absolute, relative


def named(kind):
    return [c["name"] for c in CASES["cases"] if c["kind"] == kind]


@pytest.fixture(scope="module")
def policy():
    return load_policy(GOLDEN)


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "cases.safetensors")


def build(policy, tensors, name, grad=False):
    """The context `name` of cases.json -> (logits of its last text segment or None, context)."""
    context, logits = policy.empty(1), None
    with torch.set_grad_enabled(grad):
        for s in CASES["contexts"][name]["segments"]:
            if s["type"] == "text":
                logits, context = policy.append_text(context, torch.tensor([s["ids"]]))
            elif s["type"] == "vit":
                context = policy.append_image(context, pixels=tensors[s["image"]][None])
            else:
                pixels = tensors[s["image"]][None]
                context = policy.append_image(context, latents=policy.encode(pixels), size=tuple(pixels.shape[-2:]))
    assert context.valid.sum() == CASES["contexts"][name]["kv_len"]
    assert context.position.item() == CASES["contexts"][name]["next_position"]
    return logits, context


def velocity_of(policy, tensors, case, x=None, t=None, contexts=None):
    """The (guided) velocity of a case at x and t."""
    size, cfg = tuple(case["image_size"]), case["cfg"]
    x = tensors[case["inputs"]["x_t"]].unsqueeze(0) if x is None else x
    t = case["t"] if t is None else t
    get = contexts or (lambda name: build(policy, tensors, name)[1])
    full = get(case["context"])
    if cfg is None:
        return policy.velocity(full, x, t, size)
    guidance = Guidance(cfg["text_scale"], cfg["img_scale"], cfg["renorm_type"], cfg["renorm_min"], tuple(cfg.get("interval", (0.0, 1.0))))
    return guided_velocity(policy, x, t, size, full, get(cfg["text_context"]), get(cfg["img_context"] or case["context"]), guidance)


def close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance


def test_every_kind_of_case_is_covered():
    kinds = {c["kind"] for c in CASES["cases"]}
    assert kinds == {"text_logits", "velocity", "velocity_parts", "generation", "autoencoder", "greedy_text", "gradient", "indices", "resize"}


def test_tokenizer_agrees(policy):
    for case in CASES["tokenizer_cases"]:
        assert policy.tokenizer(case["text"]).input_ids == case["ids"]
        assert policy.tokenizer.decode(case["ids"]) == case["decoded"]
    ids = CASES["special_token_ids"]
    assert (policy.start, policy.end) == (ids["bos_token_id"], ids["eos_token_id"])
    assert (policy.image_start, policy.image_end) == (ids["start_of_image"], ids["end_of_image"])


@pytest.mark.parametrize("name", named("text_logits"))
def test_text_logits(policy, tensors, name):
    case = BY_NAME[name]
    logits, context = build(policy, tensors, case["context"])
    out = case["outputs"]
    close(logits[0], tensors[out["logits"]], SINGLE)
    if "next_logits" in out:
        step, _ = policy.append_text(context, torch.tensor([[policy.start]]))
        close(step.flatten(), tensors[out["next_logits"]].flatten(), SINGLE)
        image = next(s["image"] for s in CASES["contexts"][case["context"]]["segments"] if s["type"] == "vae")
        tokens = policy.encode(tensors[image][None])
        close(tokens[0], tensors[out["latent_tokens"]], SINGLE)
        h = tensors[image].shape[-2] // policy.config.stride
        close(unpatchify(tokens, 2, h)[0], tensors[out["latent"]], SINGLE)
    if "vit_hidden" in out:
        pixels = tensors[next(s["image"] for s in CASES["contexts"][case["context"]]["segments"] if s["type"] == "vit")]
        ids, mask = grid_ids([tuple(pixels.shape[-2:])], policy.config.vit["patch_size"], policy.config.bagel["vit_max_num_patch_per_side"])
        assert ids.flatten().tolist() == tensors[out["vit_position_ids"]].tolist()
        close(policy.vit(patchify(pixels[None], policy.config.vit["patch_size"]), ids, mask)[0], tensors[out["vit_hidden"]], SINGLE)
        close(policy.embed_pixels(pixels[None])[0][0], tensors[out["vit_embed"]], SINGLE)


@pytest.mark.parametrize("name", named("velocity"))
def test_velocity(policy, tensors, name):
    case = BY_NAME[name]
    with torch.no_grad():
        close(velocity_of(policy, tensors, case)[0], tensors[case["outputs"]["v"]], SINGLE)
    if "text_logits" in case["outputs"]:
        close(build(policy, tensors, case["context"])[0][0], tensors[case["outputs"]["text_logits"]], SINGLE)


@pytest.mark.parametrize("name", named("velocity"))
def test_velocity_under_bf16_autocast_stays_in_its_band(policy, tensors, name):
    """Relative to the fp32 golden velocity; the official code's own band is 5e-3 to 8e-3 without guidance, which amplifies it."""
    case = BY_NAME[name]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        v = velocity_of(policy, tensors, case)[0].float()
    golden = tensors[case["outputs"]["v"]]
    error = ((v - golden).norm() / golden.norm()).item()
    assert 1e-4 < error <= (8e-3 if case["cfg"] is None else 2.5e-2)


@pytest.mark.parametrize("name, contexts", [("e_parts", {"v_cond": "ctx07", "v_text_dropped": "ctx08"}),
                                            ("ee_parts", {"v_cond": "ctx09", "v_text_dropped": "ctx10", "v_img_dropped": "ctx11"})])
def test_velocity_parts(policy, tensors, name, contexts):
    case = BY_NAME[name]
    for part, context in contexts.items():
        v = policy.velocity(build(policy, tensors, context)[1], tensors[case["inputs"]["x_t"]][None], case["t"], tuple(case["image_size"]))
        close(v[0], tensors[case["outputs"][part]], SINGLE)


@pytest.mark.parametrize("name", named("generation"))
def test_generation(policy, tensors, name):
    case = BY_NAME[name]
    size, out = tuple(case["image_size"]), case["outputs"]
    times = time_grid(case["num_timesteps"] - 1, case["timestep_shift"])           # points, so one call fewer
    assert torch.allclose(times[:-1], torch.tensor(case["timesteps"]), atol=1e-6)
    names = {case["context"], case["cfg"]["text_context"], case["cfg"]["img_context"]}
    held = {n: build(policy, tensors, n)[1] for n in names}
    xs, vs = [], []

    def velocity(x, t):
        xs.append(x[0]), vs.append(velocity_of(policy, tensors, case, x, t, held.get)[0])
        return vs[-1][None]

    noise = tensors[case["inputs"]["noise"]]
    trajectory = rollout(velocity, noise[None], times, window=(0, 0), noise_level=0.0)
    close(torch.stack(xs), tensors[out["x_t_per_call"]], WHOLE)
    close(torch.stack(vs), tensors[out["v_per_call"]], WHOLE)
    close(trajectory.data[0], tensors[out["latent_tokens"]], WHOLE)
    close(unpatchify(trajectory.data, 2, size[0] // policy.config.stride)[0], tensors[out["latent_chw"]], WHOLE)
    pixels = policy.decode(trajectory.data, size)[0]
    close(pixels, tensors[out["pixels"]], WHOLE)
    image = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0)
    assert (image.int() - tensors[out["image_u8"]].int()).abs().max() <= 1         # truncation may tip over at 2e-4


def test_autoencoder(policy, tensors):
    case = BY_NAME["g1"]
    posterior = policy.autoencoder.encode(tensors[case["inputs"]["image"]][None]).latent_dist
    out, ae = {k: tensors[v] for k, v in case["outputs"].items()}, policy.config.ae
    close(posterior.mean[0], out["mean"].view_as(posterior.mean[0]), SINGLE)
    close(posterior.logvar[0], out["logvar"].view_as(posterior.logvar[0]), SINGLE)
    tokens = policy.encode(tensors[case["inputs"]["image"]][None])
    size = tuple(tensors[case["inputs"]["image"]].shape[-2:])
    close(unpatchify(tokens, 2, size[0] // policy.config.stride)[0], out["latent_from_mean"].view(posterior.mean[0].shape), SINGLE)
    sampled = posterior.mean + posterior.std * tensors[case["inputs"]["posterior_noise"]].view_as(posterior.mean)
    close(ae["scale_factor"] * (sampled - ae["shift_factor"])[0], out["latent_sampled"].view(posterior.mean[0].shape), SINGLE)
    close(policy.decode(tokens, size)[0], out["decoded_from_mean"].view(3, *size), WHOLE)


@pytest.mark.parametrize("name", named("greedy_text"))
def test_greedy_text(policy, tensors, name):
    case = BY_NAME[name]
    _, context = build(policy, tensors, case["context"])
    tokens, mask, _ = policy.sample_text(context, torch.zeros(1, case["max_length"]), temperature=0.0)
    assert tokens[mask].tolist() == case["argmax_per_step"]
    assert [policy.start] + case["argmax_per_step"][:-1] == case["tokens"]         # the official return value drops the last
    if "step_logits" in case["outputs"]:
        fed = torch.tensor([[policy.start] + case["argmax_per_step"][:-1]])
        logits, _ = policy.append_text(context, fed)
        close(logits[0], tensors[case["outputs"]["step_logits"]].view_as(logits[0]), SINGLE)


@pytest.mark.parametrize("name", named("gradient"))
def test_gradients(policy, tensors, name):
    case = BY_NAME[name]
    base = BY_NAME[case["of"]]
    policy.zero_grad()
    if name in ("k1", "k4"):                                    # the contexts are constants
        v = velocity_of(policy, tensors, base)[0]
        loss = (v * tensors[case["inputs"]["R"]]).sum()
    elif name in ("k2", "k3"):                                  # the prompt carries gradient too
        context = build(policy, tensors, base["context"], grad=True)[1]
        x = tensors[base["inputs"]["x_t"]][None]
        v = policy.velocity(context, x, base["t"], tuple(base["image_size"]))[0]
        flow = tensors[base["inputs"]["noise"]] - tensors[base["inputs"]["x0"]]
        loss = (v * tensors[case["inputs"]["R"]]).sum() if name == "k2" else (v - flow).square().mean()
    else:                                                       # cross entropy of the text, the ViT image included
        logits = build(policy, tensors, base["context"], grad=True)[0][0]
        ids = CASES["contexts"][base["context"]]["segments"][-1]["ids"]
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss_value"], rel=GRADIENT, abs=SINGLE)
    ours = {release_name(n): p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert {k for k, g in ours.items() if g.norm() > 0} == {k for k, n in case["grad_norms"].items() if n > 0}
    largest = max(case["grad_norms"].values())
    for key, norm in case["grad_norms"].items():
        if norm > 0:
            assert ours[key].norm().item() == pytest.approx(norm, rel=GRADIENT, abs=GRADIENT * 1e-2 * largest), key
    if "ce_per_token" in case["outputs"]:
        each = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        close(each, tensors[case["outputs"]["ce_per_token"]].view_as(each), SINGLE)
    for key, stored in case["outputs"].items():
        if not stored.startswith(f"{name}.grad."):
            continue
        theirs = tensors[stored]
        assert (ours[key] - theirs).norm() <= GRADIENT * max(theirs.norm(), 1e-2 * largest), key


def test_indices_and_masks(policy, tensors):
    case = BY_NAME["l1"]
    (h, w), (vh, vw), out = case["latent_image_size"], case["vit_image_size"], case["outputs"]
    side = policy.config.bagel["max_latent_size"]
    assert grid_ids([(h, w)], 8, side)[0].flatten().tolist() == tensors[out["latent_position_ids"]].tolist()
    vit_ids = grid_ids([(vh, vw)], 10, policy.config.bagel["vit_max_num_patch_per_side"])[0]
    assert vit_ids.flatten().tolist() == tensors[out["vit_position_ids"]].tolist()
    flat = torch.arange(4 * (h // 4) * (w // 4)).view(1, 4, h // 4, w // 4)
    tokens = patchify(flat, 2)
    assert torch.equal(tokens[0].int(), tensors[out["latent_patchify"]].int())
    index = torch.arange(tokens.numel()).view_as(tokens)
    assert torch.equal(unpatchify(index, 2, h // 8)[0].int(), tensors[out["latent_unpatchify"]].int())
    pixels = patchify(torch.arange(3 * vh * vw).view(1, 3, vh, vw), 10)[0]
    assert torch.equal(pixels[[0, 1, -1]].int(), tensors[out["vit_patchify"]].int())


def test_attention_over_a_context_is_the_official_training_mask(tensors):
    """Appending splits one after another, noise splits never cached, allows exactly what the official mask allows."""
    case = BY_NAME["l1"]
    mask, cached, start = tensors[case["outputs"]["mask"]].bool(), [], 0
    for length, mode in zip(case["splits"], case["modes"]):
        rows = slice(start, start + length)
        own = own_attention(torch.ones(1, length, dtype=torch.bool), causal=mode == "causal")[0, 0]
        ours = torch.zeros(length, mask.shape[1], dtype=torch.bool)
        ours[:, cached] = True
        ours[:, rows] = own
        assert torch.equal(mask[rows], ours)
        if mode != "noise":
            cached += range(start, start + length)
        start += length


def test_resize_rule_and_transform(tensors):
    case = BY_NAME["l2"]
    for longest, shortest, stride, w, h, new_w, new_h in case["rows"]:
        assert fit_size(w, h, longest, shortest, stride) == (new_w, new_h), (w, h)
    stored = tensors[case["inputs"]["image_u8"]]
    image = Image.fromarray(np.asarray(stored if stored.shape[-1] == 3 else stored.permute(1, 2, 0)))
    pixels = to_tensor(fit_image(image, longest=32, shortest=16, stride=8))
    theirs = tensors[case["outputs"]["pixels"]]
    close(pixels, theirs, 1e-6 + 0.0)


def test_system_prompts_are_the_official_ones():
    from sample import THINK_TO_ANSWER, THINK_TO_DRAW
    for ours, name in ((THINK_TO_ANSWER, "VLM_THINK_SYSTEM_PROMPT"), (THINK_TO_DRAW, "GEN_THINK_SYSTEM_PROMPT")):
        assert hashlib.sha256(ours.encode()).hexdigest() == CASES["system_prompts"][name]["sha256"]


def test_position_tables_are_the_official_ones(policy):
    stored = load_file(GOLDEN / "ema.safetensors")
    for key, side in (("latent_pos_embed.pos_embed", "max_latent_size"), ("vit_pos_embed.pos_embed", "vit_max_num_patch_per_side")):
        close(sincos_table(policy.config.bagel[side], policy.config.llm["hidden_size"]), stored[key], 1e-6)
