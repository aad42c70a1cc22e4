"""The toy's loop on a folder of the released layout: sharded or not, adapters or all weights, one rank or two, there and back."""

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import sample
import train
from policy import Policy, PolicyConfig, adapters, add_lora
from recipes import parse
from sample import Draw, Read, images_of, sample_plan
from studies.bench import release_on_meta
from support.checkpoint import (freeze, load_adapters, load_policy, merged_state, release_name,
    save_policy, save_tensors)
from support.memory import check_memory, memory, peak
from support.run import Ranks

ROOT = Path(train.__file__).parent
GOLDEN = Path(__file__).parent / "golden" / "bagel_tiny"
ALONE = Ranks(0, 1, torch.device("cpu"))
RELEASE_LLM = dict(architectures=["Qwen2ForCausalLM"], hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                   num_key_value_heads=4, vocab_size=152064, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=32768)
RELEASE_VIT = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, patch_size=14, image_size=980, num_hidden_layers=27,
                   num_channels=3, layer_norm_eps=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random BAGEL of other sizes than the golden one, as a release is laid out, with prompts and questions beside it."""
    from PIL import Image
    path = tmp_path_factory.mktemp("release")
    llm = RELEASE_LLM | dict(hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, vocab_size=293)
    vit = RELEASE_VIT | dict(hidden_size=32, intermediate_size=40, num_attention_heads=2, patch_size=8, image_size=64, num_hidden_layers=2)
    ae = dict(in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1], num_res_blocks=1, z_channels=4, downsample=2, scale_factor=0.3611, shift_factor=0.1159)
    torch.manual_seed(1)
    config = PolicyConfig(llm, vit, dict(latent_patch_size=2, max_latent_size=8, vit_max_num_patch_per_side=8), ae)
    save_policy(Policy(config, load_policy(GOLDEN).tokenizer), path)
    (path / "p.txt").write_text("a red cat\na blue dog on the box\nx\na tree\n")
    Image.new("RGB", (30, 20), (200, 30, 0)).save(path / "i.png")
    Image.new("RGB", (16, 40), (0, 30, 200)).save(path / "j.png")
    rows = [dict(image=i, question=q, answer="a") for i, q in (("i.png", "what ?"), ("j.png", "how many ?"), ("j.png", "which one is it ?"))]
    (path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def arguments(folder, out, recipe, *more):
    """Two steps at the scale of BAGEL, shrunk to this folder."""
    tasks = {"lvrpo": ["--draw", 2, "--think", 2, "--ask", 2], "unigrpo": ["--think", 4], "unigrpo_rounds": ["--rounds", 2],
             "alphagrpo_reflect": ["--reflect", 2, "--dvreward", 0, "--window", 3, "--window_high", 5]}[recipe]
    toy = sample.TOY
    return [str(x) for x in ("--recipe", recipe, "--scale", "bagel", "--policy", folder, "--prompts", folder / "p.txt", "--questions",
                             folder / "q.jsonl", *tasks, "--siglip", toy / "siglip", "--judge", toy / "judge", "--resolution", 16,
                             "--think_tokens", 5, "--answer_tokens", 3, "--group_size", 4, "--denoise_steps", 6, "--epochs", 1, "--steps", 2,
                             "--save_every", 1, "--eval_every", 0, "--micro", 8, "--rollout_batch", 4, "--no-bf16", "--no-system_prompt",
                             "--lr_understanding", 1e-5, "--lr_generation", 1e-5, "--sem", 1, *(["--pref", 0] if recipe.startswith("unigrpo") else []),
                             "--no-referee_bf16", "--image_weight", 1,
                             "--image_clip", 1e-2, "--out", out, *more)]


@contextmanager
def launched(world, runs):
    """Several runs by `world` ranks of one torchrun, which starts once, beside what the with-block does."""
    script = Path(runs[0][runs[0].index("--out") + 1]).parent / f"several_{world}.py"
    script.write_text("import json, run, sys, train\nfor argv in json.loads(sys.argv[1]):\n    train.train(recipes.parse(argv), run.setup())\n"
                      "train.dist.destroy_process_group()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(script), json.dumps(runs)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        yield
    finally:
        _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]


def records(out):
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()][1:]
    return [row for row in rows if "resumed" not in row]        # the number of ranks, where it differs


def same_run(a, b, keys=("loss", "grad_norm", "think/reward")):
    for x, y in zip(records(a), records(b), strict=True):
        for k in keys:
            assert x[k] == pytest.approx(y[k], rel=2e-3, abs=2e-5), (k, x["step"])


def checkpoint(out):
    """The tensors of a run's checkpoint, whole, whatever wrote it."""
    single = Path(out) / "checkpoint.safetensors"
    if single.exists():
        return load_file(single)
    reader = dcp.HuggingFaceStorageReader(str(Path(out) / "checkpoint"))
    tensors = {k: torch.zeros(v.size) for k, v in reader.read_metadata().state_dict_metadata.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def same_gradients(a, b):
    """AdamW's first moment is a running mean of the gradients; every tensor of it agrees, relative to its norm."""
    ours, theirs = checkpoint(a), checkpoint(b)
    assert ours.keys() == theirs.keys() and int(ours["step"]) == int(theirs["step"]) == 2
    moments = [k for k in ours if k.startswith("adamw.exp_avg.")]
    assert sum(ours[k].norm() > 0 for k in moments) > 20
    for k in moments:
        assert (ours[k] - theirs[k]).norm() <= 1e-2 * theirs[k].norm() + 1e-7, k


VARIANTS = {"lvrpo-adapters": ("lvrpo", "--lora", 4), "lvrpo-whole": ("lvrpo", "--lora", 0),
            "unigrpo-adapters": ("unigrpo", "--lora", 4, "--experts", "generation", "--micro", 3),
            "unigrpo-whole": ("unigrpo", "--lora", 0, "--experts", "generation"),
            "reflect-adapters": ("alphagrpo_reflect", "--lora", 4, "--micro", 4, "--rectify", "off"),     # with guidance by text and image
            "rounds-whole": ("unigrpo_rounds", "--lora", 0)}


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """Every variant by one process whole, and by two ranks sharded; and one that changes its number of ranks in the middle."""
    out = tmp_path_factory.mktemp("runs")
    cut = lambda steps, name, *more: arguments(folder, out / name, *VARIANTS["lvrpo-whole"], "--shard", "--steps", steps, *more)
    with launched(1, [cut(1, "one-then-two")]):
        for name, (recipe, *more) in VARIANTS.items():
            train.train(parse(arguments(folder, out / f"one-{name}", recipe, *more)), ALONE)
    with launched(2, [arguments(folder, out / f"two-{name}", recipe, *more, "--shard") for name, (recipe, *more) in VARIANTS.items()]
                  + [cut(1, "two-bf16", "--bf16"), cut(1, "two-then-one"), cut(1, "two-then-whole"), cut(2, "one-then-two", "--resume"),
                     arguments(folder, out / "split", "lvrpo", "--lora", 4, "--draw", 1, "--ask", 0, "--eval_every", 2)]):
        pass
    with launched(1, [cut(2, "two-then-one", "--resume")]):
        pass
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_two_sharded_ranks_give_the_run_of_one_whole_process(runs, name):
    task = {"reflect-adapters": "reflect", "rounds-whole": "rounds"}.get(name, "think")
    same_run(runs / f"one-{name}", runs / f"two-{name}", ("loss", "grad_norm", f"{task}/reward"))
    same_gradients(runs / f"one-{name}", runs / f"two-{name}")
    if task != "reflect":                                       # whose recipe has no penalty
        assert records(runs / f"one-{name}")[1][f"{task}/image/velocity_mse"] > 0


def test_sharded_bf16_starts_as_sharded_fp32(runs):
    ours, plain = records(runs / "two-bf16")[0], records(runs / "two-lvrpo-whole")[0]
    for k in ("draw/reward", "think/reward", "ask/reward"):
        assert ours[k] == pytest.approx(plain[k], abs=0.1), k
    assert math.isfinite(ours["loss"]) and ours["grad_norm"] > 0


def test_ranks_agree_whether_parameters_stay_gathered(folder, tmp_path):
    """Room for them on one rank alone would leave the other waiting for gathers that never come."""
    code = ("import sys, torch, torch.distributed as dist\nfrom checkpoint import gathered, load_policy, shard\ndist.init_process_group('gloo')\n"
            "policy = load_policy(sys.argv[1], prepare=shard)\n"
            "with torch.no_grad(), gathered(policy, 1e12 if dist.get_rank() == 0 else 0):\n"
            "    for _ in range(3):\n        policy.append_text(policy.empty(1), torch.arange(4)[None])\ndist.barrier()\n"
                "dist.destroy_process_group()\n")
    (tmp_path / "agree.py").write_text(code)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "agree.py"), str(folder)],
                   cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, timeout=240)


def test_the_newest_of_two_kinds_of_checkpoints_is_resumed(folder, runs, tmp_path):
    """As a kill between two kinds of saves leaves them."""
    shutil.copytree(runs / "one-then-two", tmp_path / "run")
    shutil.copy(runs / "one-lvrpo-whole" / "checkpoint.safetensors", tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "checkpoint.safetensors")
    for step in (1, 3):
        save_tensors(tensors | {"step": torch.tensor(step)}, tmp_path / "run" / "checkpoint.safetensors")
        run = train.begin(parse(arguments(folder, tmp_path / "run", *VARIANTS["lvrpo-whole"], "--resume", "--steps", 9)), ALONE)
        assert run.start == max(step, 2)
        run.log.owned.close()


def test_a_damaged_sharded_checkpoint_is_refused(folder, runs, tmp_path):
    shutil.copytree(runs / "one-then-two", tmp_path / "run")
    part = sorted((tmp_path / "run" / "checkpoint").iterdir())[0]
    part.write_bytes(part.read_bytes()[:400])
    with pytest.raises((ValueError, OSError), match="checkpoint"):
        train.begin(parse(arguments(folder, tmp_path / "run", *VARIANTS["lvrpo-whole"], "--resume")), ALONE)


@pytest.mark.parametrize("name, content, words", [("adapter_config.json", "{}", "lacks the numbers"),
                                                  ("adapter_config.json", "[]", "must hold a JSON object"),
                                                  ("adapter_config.json", None, "adapter_config.json is missing")])
def test_a_bad_folder_of_adapters_is_refused(folder, runs, tmp_path, name, content, words):
    shutil.copytree(runs / "one-lvrpo-adapters" / "adapter", tmp_path / "a")
    (tmp_path / "a" / name).unlink() if content is None else (tmp_path / "a" / name).write_text(content)
    with pytest.raises((ValueError, OSError), match=words):
        load_policy(folder, adapter=tmp_path / "a")


@pytest.mark.parametrize("name", ["two-then-one", "one-then-two"])
def test_a_sharded_checkpoint_resumes_at_another_number_of_ranks(runs, name):
    same_run(runs / "one-lvrpo-whole", runs / name)
    same_gradients(runs / "one-lvrpo-whole", runs / name)


def test_a_sharded_checkpoint_resumes_without_sharding_and_holds_no_pickle(folder, runs):
    files = [p.name for p in (runs / "two-then-whole" / "checkpoint").iterdir()]
    assert files and all(f.endswith(".safetensors") for f in files)
    train.train(parse(arguments(folder, runs / "two-then-whole", *VARIANTS["lvrpo-whole"], "--resume")), ALONE)
    same_gradients(runs / "one-lvrpo-whole", runs / "two-then-whole")
    assert not (runs / "two-then-whole" / "checkpoint").exists() and (runs / "two-then-whole" / "checkpoint.safetensors").exists()


def test_ranks_split_groups_where_prompts_are_few(folder, runs):
    """One prompt drawn by two ranks, half of its group each, is the prompt drawn by one process."""
    out = runs / "split-alone"
    train.train(parse(arguments(folder, out, "lvrpo", "--lora", 4, "--draw", 1, "--ask", 0)), ALONE)
    same_run(runs / "split", out, ("loss", "grad_norm", "draw/reward", "draw/reward_std", "draw/advantage_share/sem"))
    same_gradients(runs / "split", out)
    assert sorted(p.name for p in (runs / "split" / "samples").iterdir()) == ["000000.png", "000002.png"]


@pytest.mark.parametrize("name", ["one-lvrpo-adapters", "two-lvrpo-adapters"])
def test_adapters_alone_and_merged_are_the_same_policy(folder, runs, name):
    exported, base = load_file(runs / name / "policy" / "ema.safetensors"), load_file(folder / "ema.safetensors")
    merged = {release_name(k): v for k, v in merged_state(load_policy(folder, adapter=runs / name / "adapter"))}
    assert all(torch.allclose(v, merged[k], atol=1e-7) for k, v in exported.items())
    assert sum(not torch.equal(v, base[k]) for k, v in exported.items()) == 3 * 2 * 7
    plan = [Read(["a red cat"]), Draw((16, 24), torch.linspace(1, 0, 4))]
    a, b = (images_of(p, sample_plan(p, plan, seed=0, step=0, prompts=[0], G=2)) for p in (
        load_policy(runs / name / "policy"), load_policy(folder, adapter=runs / name / "adapter")))
    assert torch.allclose(a, b, atol=1e-5)


def test_adapters_are_stored_as_peft_stores_them(runs):
    tensors = load_file(runs / "one-unigrpo-adapters" / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.language_model.model.layers.2.self_attn.q_proj_moe_gen.lora_A.weight"].shape == (4, 48)
    assert tensors["base_model.model.language_model.model.layers.0.mlp_moe_gen.down_proj.lora_B.weight"].shape == (48, 4)
    assert all("_moe_gen" in k for k in tensors)
    config = json.loads((runs / "one-unigrpo-adapters" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    modules = {k.removeprefix("base_model.model.").split(".lora_")[0] for k in tensors}
    assert all(any(m.endswith("." + t) for t in config["target_modules"]) for m in modules)


def test_adapters_of_another_policy_are_refused(runs):
    with pytest.raises(ValueError, match="adapter_model.safetensors: .*(missing|shape)"):
        load_adapters(load_policy(GOLDEN), runs / "one-lvrpo-adapters" / "adapter")


def test_training_one_expert_leaves_the_other_as_it_was(folder, runs):
    before, after = (load_file(p / "ema.safetensors") for p in (folder, runs / "one-unigrpo-whole" / "policy"))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    generation = ("_moe_gen", "vae2llm", "llm2vae", "time_embedder")
    assert changed and all(any(g in k for g in generation) for k in changed)


def test_checkpointing_changes_memory_alone(folder, tmp_path, runs):
    train.train(parse(arguments(folder, tmp_path, *VARIANTS["lvrpo-adapters"], "--no-checkpointing")), ALONE)
    same_gradients(runs / "one-lvrpo-adapters", tmp_path)


def test_bf16_trains_and_stays_near_fp32(folder, tmp_path, runs):
    train.train(parse(arguments(folder, tmp_path, *VARIANTS["lvrpo-adapters"], "--bf16", "--steps", 1)), ALONE)
    ours, plain = records(tmp_path)[0], records(runs / "one-lvrpo-adapters")[0]
    assert ours["think/reward"] == pytest.approx(plain["think/reward"], abs=0.1)
    assert all(v < 0.2 for k, v in ours.items() if k.startswith("self_check/"))


def test_a_bf16_release_stays_bf16_and_trains_in_fp32(folder, tmp_path):
    for name in ("llm_config.json", "vit_config.json", "bagel_config.json", "ae_config.json", "ae.safetensors",
                 *[p.name for p in folder.glob("*token*")], "vocab.json", "merges.txt"):
        if (folder / name).exists():
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_tensors({k: v.bfloat16() for k, v in load_file(folder / "ema.safetensors").items()}, tmp_path / "ema.safetensors")
    run = train.begin(parse(arguments(tmp_path, tmp_path / "out", "unigrpo", "--lora", 0, "--experts", "generation", "--prompts", folder / "p.txt",
                                      "--questions", "", "--bf16")), ALONE)
    assert run.policy.blocks[0].experts[1].q.weight.dtype == torch.float32 and run.policy.blocks[0].experts[0].q.weight.dtype == torch.bfloat16
    train.one_step(run, 0)
    save_policy(run.policy, tmp_path / "policy")
    assert {v.dtype for v in load_file(tmp_path / "policy" / "ema.safetensors").values()} == {torch.bfloat16}


# ---- settings ----


def test_the_scale_follows_the_width_and_tasks_without_data_are_left_out(tmp_path):
    assert (scale_of(128), scale_of(3584)) == ("toy", "bagel")
    (tmp_path / "llm_config.json").write_text(json.dumps(RELEASE_LLM))
    cfg = parse(["--recipe", "unigrpo", "--policy", str(tmp_path), "--prompts", "prompts.jsonl"])
    assert (cfg.resolution, cfg.lora, cfg.weights["ins"], cfg.weights["pref"], cfg.rows["think"]) == (512, 64, 0.0, 1.0, 32)
    cfg = parse(["--policy", str(tmp_path), "--prompts", "prompts.jsonl"])
    assert {name: n for name, n in cfg.rows.items() if n} == {"draw": 24, "think": 8}
    assert parse(["--policy", str(tmp_path), "--questions", "q.jsonl"]).rows["draw"] == 0 and parse([]).resolution == 32


@pytest.mark.parametrize("more, words", [
    (["--experts", "generation", "--ask", "2"], "set --ask 0"),
    (["--shard"], "start with torchrun")])
def test_settings_that_cannot_work_are_refused(folder, tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        train.begin(parse(arguments(folder, tmp_path, "unigrpo", *more)), ALONE)


def release(cfg):
    policy = release_on_meta(load_policy(GOLDEN).tokenizer)
    freeze(policy, cfg.experts, cfg.lora, cfg.checkpointing)
    return policy


def test_memory_counts_what_a_run_of_the_release_holds(tmp_path):
    """The 7B: 29.2 GB of bf16 weights under adapters; fp32 masters, gradients, two moments and the average of all weights."""
    cfg = parse(["--scale", "bagel", "--recipe", "unigrpo", "--prompts", "p"])
    need = memory(release(cfg), cfg, 8)
    adapted = 2 * 28 * 64 * (2 * 3584 + 2 * (3584 + 512) + 2 * 3584 + 3 * (3584 + 18944))
    assert need["gradients"] == pytest.approx(adapted * 4 / 1e9) and need["AdamW"] == pytest.approx(2 * need["gradients"])
    assert need["weights"] == pytest.approx((14.607e9 + 0.084e9) * 2 / 1e9 + adapted * 4 / 1e9, rel=0.01)
    assert need["reference"] == 0 and peak(need) < 80
    one = memory(release(cfg), replace(cfg, window=1), 8)       # two noisy steps less: 28 block inputs a token, and one block of adapters
    block, mask = (5 * 18944 + 8 * 3584) * 2, 3 * 7 * (64 + 160 + 256 + 1026)
    assert need["replay"] - one["replay"] == pytest.approx(4 * 2 * 1026 * (28 * 3584 * 4 + block + mask) / 1e9)
    cfg = parse(["--scale", "bagel", "--recipe", "unigrpo", "--prompts", "p", "--lora", "0"])
    need = memory(release(cfg), cfg, 8)
    assert need["reference"] > 29 and peak(need) > 250
    cut = memory(release(cfg), replace(cfg, shard=True), 8)
    assert cut["AdamW"] == pytest.approx(need["AdamW"] / 8)


def test_too_little_memory_is_said_before_anything_is_read_with_what_would_fit(monkeypatch, tmp_path):
    small = type("Properties", (), {"total_memory": 60e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    cfg = parse(["--scale", "bagel", "--recipe", "unigrpo", "--prompts", "p", "--micro", "24", "--rollout_batch", "200"])
    with pytest.raises(ValueError, match=r"needs about \d+ GB on each GPU, which has 60: weights 3\d.*try --micro 1") as error:
        check_memory(release(cfg), cfg, Ranks(0, 1, torch.device("cuda")))
    assert "\n" not in str(error.value)
    cfg = parse(["--scale", "bagel", "--recipe", "unigrpo", "--prompts", "p", "--lora", "0"])
    with pytest.raises(ValueError, match="--lora 64"):
        check_memory(release(cfg), cfg, Ranks(0, 1, torch.device("cuda")))


def test_every_adapter_has_a_release_name(folder):
    policy = add_lora(load_policy(folder), 2, 4.0)
    names = {release_name(f"{n}.weight") for n in adapters(policy)}
    assert len(names) == 3 * 2 * 7 and names <= load_file(folder / "ema.safetensors").keys()
