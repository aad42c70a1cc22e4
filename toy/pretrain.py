"""How every file of toy is made: `torchrun train.py --recipe pretrain`. Seeds are fixed; progress is printed.
`python -m toy.pretrain` measures the referees.

    tokenizer    the closed vocabulary of shapes.py, one word one token, and BAGEL's four markers
    autoencoder  diffusers' AutoencoderKL, 32x32x3 pixels to 4x4x4, which the policy reads as 4 tokens of 16 features
    base         the policy, by text cross-entropy and flow matching jointly, on pictures whose captions are partly wrong
    siglip       the alignment referee: transformers' SiglipModel, sigmoid contrastive loss, right captions
    judge        the yes/no referee: PaliGemmaForConditionalGeneration, cross-entropy on yes and no, right captions

The base is taught wrong on purpose, as web captions teach: WRONG_CAPTIONS of the pictures contradict their caption in one attribute,
WRONG_THOUGHTS of the thoughts state a wrong fact and follow it, and WRONG_COUNTS of the counting questions are answered by the next word
(four by zero). Imitation cannot repair what its data says; a reward can. Further pretraining on the same data is the control that the
README shows beside it.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import referees as models
from checkpoint import save_policy
from policy import MARKERS, Policy, PolicyConfig, build_autoencoder, declare_torchvision_ops
from toy import shapes
from toy.tiny import build_judge, build_siglip
from tasks import rendered

WRONG_CAPTIONS, WRONG_THOUGHTS, WRONG_COUNTS = 0.5, 0.5, 0.65
SIZE, QUESTIONS = (32, 32), 4                                   # pixels; questions about each scene of the corpus
ROUNDS = ((2200, 2e-3, 2, 24), (2000, 1.5e-3, 3, 24), (1000, 1e-3, 4, 64))              # steps, lr, seed, scenes asked about per step
CONFIG = PolicyConfig(
    llm=dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=128, intermediate_size=256, num_hidden_layers=4,
             num_attention_heads=4, num_key_value_heads=2, vocab_size=0, rope_theta=10000.0, rms_norm_eps=1e-6, hidden_act="silu",
             max_position_embeddings=128, tie_word_embeddings=False),
    vit=dict(model_type="siglip_vision_model", hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
             num_channels=3, patch_size=8, image_size=32, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh"),
    bagel=dict(latent_patch_size=2, max_latent_size=2, vit_max_num_patch_per_side=4, connector_act="gelu_pytorch_tanh",
               vae_resize=[32, 32, 16], vit_resize=[32, 32, 8]),
    ae=dict(resolution=32, in_channels=3, downsample=8, ch=8, out_ch=3, ch_mult=[1, 2, 4, 4], num_res_blocks=1, z_channels=4,
            norm_groups=8, scale_factor=1.0, shift_factor=0.0))


def build_tokenizer():
    """Words of shapes.VOCABULARY and the markers; <pad> is id 0 and never read."""
    declare_torchvision_ops()
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<unk>", *MARKERS, *shapes.VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>",
                                   additional_special_tokens=list(MARKERS), clean_up_tokenization_spaces=False)


def schedule(optimizer, step: int, steps: int, lr: float) -> None:
    """Linear warm-up over 5% of the steps, then a cosine to 2% of lr."""
    warm, done = 0.05 * steps, step / steps
    rate = lr * min((step + 1) / max(warm, 1), 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def train_autoencoder(autoencoder, steps: int = 5000, batch: int = 48, seed: int = 0) -> None:
    """Fit the autoencoder to rendered scenes.

    Loss: MSE + 0.1 L1 + 5e-4 KL; the latent is disturbed by a quarter of its size so that decoding forgives a policy's errors.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    # Held-out pairs too: the autoencoder knows no words, and what it cannot draw no policy could be blamed for.
    pool = rendered([shapes.random_scene(rng, split) for _ in range(6000) for split in ("train", "eval")])
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=3e-3, weight_decay=1e-4)
    autoencoder.train()
    for step in range(steps):
        schedule(optimizer, step, steps, 3e-3)
        x = pool[torch.randint(len(pool), (batch,), generator=generator)]
        posterior = autoencoder.encode(x).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        z = z + 0.25 * posterior.mean.detach().std() * torch.randn(z.shape, generator=generator)
        y = autoencoder.decode(z).sample
        loss = F.mse_loss(y, x) + 0.1 * (y - x).abs().mean() + 5e-4 * posterior.kl().mean() / z[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        if step % 500 == 0:
            print(f"autoencoder {step:5d}  loss {loss.item():.4f}", flush=True)


class Corpus:
    """What the base learns from, drawn once: captions, thoughts and questions, wrong as often as the constants above say."""

    def __init__(self, policy: Policy, seed: int = 1, pictures: int = 18000, thoughts: int = 6000, scenes: int = 16000):
        rng = np.random.default_rng(seed)
        by_tag = {tag: [m for m in shapes.prompts("train") if m["tag"] == tag] for tag in shapes.TAGS}
        captions = [shapes.pick(rng, by_tag[tag]) for _ in range(pictures // len(by_tag)) for tag in by_tag]
        self.captions = policy.encode_text([m["prompt"] for m in captions])
        self.pictures = self.latents(policy, captions, rng)
        implicit = [shapes.pick(rng, shapes.implicit_prompts("train")) for _ in range(thoughts)]
        wrong = rng.random(thoughts) < WRONG_THOUGHTS
        texts = [shapes.wrong_thought(m, rng) if w else m["thought"] for m, w in zip(implicit, wrong)]
        meaning = {shapes.explicit(m): m for split in ("train", "eval") for m in shapes.prompts(split)}
        self.implicit = policy.encode_text([m["prompt"] for m in implicit])
        self.thoughts = policy.encode_text(texts)
        self.thought_pictures = self.latents(policy, [meaning[t.split("</think> ")[1]] for t in texts], rng)
        scenes = [shapes.random_scene(rng) for _ in range(scenes)]
        asked = [shapes.make_question(scene, rng) for scene in scenes for _ in range(QUESTIONS)]
        wrong = [q["kind"] == "count" and rng.random() < WRONG_COUNTS for q in asked]
        self.seen = rendered(scenes)
        self.questions = policy.encode_text([q["question"] for q in asked])
        self.answers = policy.encode_text([shapes.wrong_answer(q) if w else q["answer"] for q, w in zip(asked, wrong)])

    @staticmethod
    def latents(policy: Policy, captions: list[dict], rng) -> torch.Tensor:
        """Clean latents (N, 4, 16) of pictures for the captions, WRONG_CAPTIONS of them of a contradicting caption."""
        scenes = [shapes.sample_scene(shapes.wrong_metadata(m, rng) if rng.random() < WRONG_CAPTIONS else m, rng) for m in captions]
        return torch.cat([policy.encode(rendered(scenes[i:i + 500])) for i in range(0, len(scenes), 500)])


def flow_loss(policy: Policy, context, data: torch.Tensor, generator) -> torch.Tensor:
    """Flow matching: mean of (v - (noise - data))^2; half of the times are drawn high, where the layout is decided."""
    t = torch.randn(len(data), generator=generator) + 1.2 * (torch.rand(len(data), generator=generator) < 0.5)
    t, noise = torch.sigmoid(t).to(data.device), torch.randn(data.shape, generator=generator).to(data.device)
    x = (1 - t[:, None, None]) * data + t[:, None, None] * noise
    return F.mse_loss(policy.velocity(context, x, t, SIZE), noise - data)


def text_loss(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1][mask[:, 1:]], tokens[:, 1:][mask[:, 1:]])


def base_loss(policy: Policy, corpus: Corpus, generator, batch: int = 64, draws: int = 3, scenes: int = 24) -> dict[str, torch.Tensor]:
    """One step's losses: pictures of captions, thoughts and their pictures, answers; each prompt is read once for `draws` times t."""
    N = len(corpus.pictures)
    pick = lambda n, size: torch.randint(n, (size,), generator=generator)
    i = pick(N, batch)
    _, context = policy.append_text(policy.empty(batch), corpus.captions[0][i], corpus.captions[1][i], logits=False)
    losses = {"picture": flow_loss(policy, context.repeat(draws), corpus.pictures[i].repeat_interleave(draws, 0), generator)}
    i = pick(len(corpus.thought_pictures), batch // 2)
    _, context = policy.append_text(policy.empty(len(i)), corpus.implicit[0][i], corpus.implicit[1][i], logits=False)
    logits, context = policy.append_text(context, corpus.thoughts[0][i], corpus.thoughts[1][i])
    losses["thought"] = text_loss(logits, corpus.thoughts[0][i], corpus.thoughts[1][i])
    losses["thought_picture"] = 0.5 * flow_loss(policy, context, corpus.thought_pictures[i], generator)
    i = pick(len(corpus.seen), scenes)
    context = policy.append_image(policy.empty(len(i)), pixels=corpus.seen[i]).repeat(QUESTIONS)
    i = (i[:, None] * QUESTIONS + torch.arange(QUESTIONS)).flatten()
    _, context = policy.append_text(context, corpus.questions[0][i], corpus.questions[1][i], logits=False)
    logits, _ = policy.append_text(context, corpus.answers[0][i], corpus.answers[1][i])
    losses["answer"] = text_loss(logits, corpus.answers[0][i], corpus.answers[1][i])
    return losses


def new_base(tokenizer, seed: int) -> Policy:
    """A policy at CONFIG's sizes with xavier matrices; small initialisations never learn where things are."""
    config = PolicyConfig({**CONFIG.llm, "vocab_size": len(tokenizer)}, CONFIG.vit, CONFIG.bagel, dict(CONFIG.ae))
    torch.manual_seed(seed)
    policy = Policy(config, tokenizer)
    for name, p in policy.named_parameters():
        if name.startswith("autoencoder."):
            continue
        if p.ndim == 2 and "embed" not in name:
            nn.init.xavier_uniform_(p)
        elif name.endswith(".bias"):
            nn.init.zeros_(p)
    nn.init.zeros_(policy.latent_out.weight)
    return policy


def train_base(policy: Policy, corpus: Corpus, steps: int, lr: float, seed: int, scenes: int) -> None:
    """One round: text cross-entropy and flow matching in one loss, AdamW, a cosine; `scenes` pictures are asked about per step."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    begun = time.time()
    for step in range(steps):
        schedule(optimizer, step, steps, lr)
        losses = base_loss(policy, corpus, generator, scenes=scenes)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            told = "  ".join(f"{k} {v.item():.3f}" for k, v in losses.items())
            print(f"base {step:5d}  {told}  {time.time() - begun:5.0f} s", flush=True)


def xavier(model) -> None:
    """Xavier matrices, as the base has; the published classes' small normal initialisation hardly starts to learn at these widths."""
    for name, p in model.named_parameters():
        if p.ndim == 2 and "embed" not in name:
            nn.init.xavier_uniform_(p)
        elif "position_embedding" in name:
            nn.init.normal_(p, std=0.5)


def train_siglip(encoder, steps: int = 2500, batch: int = 64, lr: float = 1e-3, seed: int = 3) -> None:
    """SigLIP's pairwise sigmoid loss; a pair is positive where the picture satisfies the caption, whoever's caption it is."""
    rng, model = np.random.default_rng(seed), encoder.model.train().requires_grad_(True)
    xavier(model)
    pool = [m for split in ("train", "eval") for m in shapes.prompts(split) + shapes.implicit_prompts(split)]
    nn.init.constant_(model.logit_scale, math.log(10.0))        # SigLIP's initial temperature and bias (arXiv:2303.15343, Sec. 3.2)
    nn.init.constant_(model.logit_bias, -10.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        schedule(optimizer, step, steps, lr)
        asked = [shapes.pick(rng, pool) for _ in range(batch)]
        asked[batch // 2:] = [shapes.wrong_metadata(m, rng) for m in asked[:batch // 2]]         # hard negatives
        scenes = [shapes.sample_scene(m, rng, training=False) for m in asked]
        images = rendered(scenes) * 0.5 + 0.5
        image = F.normalize(model.vision_model(pixel_values=encoder.pixels(images)).pooler_output, dim=-1)
        text = F.normalize(model.text_model(input_ids=encoder.tokens([m["prompt"] for m in asked])).pooler_output, dim=-1)
        right = torch.tensor([[1.0 if shapes.satisfies(m, shapes.discrete(s)) else -1.0 for m in asked] for s in scenes])
        loss = -F.logsigmoid(right * (image @ text.T * model.logit_scale.exp() + model.logit_bias)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 300 == 0 or step == steps - 1:
            print(f"siglip {step:5d}  loss {loss.item():.3f}", flush=True)
    model.eval().requires_grad_(False)


def judge_batch(rng, batch: int, pool: list[dict]):
    """(scenes, asked, right): odd rows ask whether a prompt of `pool` is true, even rows whether an answer is right; half are."""
    scenes, asked, right = [], [], []
    for i in range(batch):
        if i % 2:
            m = shapes.pick(rng, pool)
            other = m if rng.random() < 0.5 else shapes.wrong_metadata(m, rng)
            scenes.append(shapes.sample_scene(other, rng, training=False))
            asked.append(f"is this {m['prompt']} ?")
            right.append(shapes.satisfies(m, shapes.discrete(scenes[-1])))
        else:
            scenes.append(shapes.random_scene(rng, shapes.pick(rng, ("train", "eval"))))
            q = shapes.make_question(scenes[-1], rng, training=False)
            options = {"count": shapes.COUNTS, "color": tuple(shapes.COLORS), "shape": shapes.SHAPES}.get(q["kind"], ("yes", "no"))
            wrong = shapes.pick(rng, [o for o in options if o != q["answer"]])
            right.append(bool(rng.random() < 0.5))
            asked.append(f"{q['question']} is the answer {q['answer'] if right[-1] else wrong} ?")
    return scenes, asked, right


def train_judge(judge, steps: int = 4500, batch: int = 64, lr: float = 5e-4, seed: int = 4) -> None:
    """Cross-entropy on yes and no."""
    rng, model = np.random.default_rng(seed), judge.model.train().requires_grad_(True)
    xavier(model)
    pool = [m for split in ("train", "eval") for m in shapes.prompts(split) + shapes.implicit_prompts(split)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        schedule(optimizer, step, steps, lr)
        scenes, asked, right = judge_batch(rng, batch, pool)
        logits = judge.logits(rendered(scenes) * 0.5 + 0.5, asked)
        loss = F.cross_entropy(logits, torch.tensor([0 if r else 1 for r in right]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 300 == 0 or step == steps - 1:
            said = (logits.argmax(1) == 0).tolist()
            print(f"judge {step:5d}  loss {loss.item():.3f}  right {np.mean([a == b for a, b in zip(said, right)]):.2f}", flush=True)
    model.eval().requires_grad_(False)


class Imitation:
    """Further pretraining in the training loop: the control of a reinforcement run, with its optimiser, learning rates and clip."""

    def __init__(self, policy: Policy, seed: int, grad_clip: float):
        self.policy, self.seed, self.grad_clip, self.corpus = policy, seed, grad_clip, Corpus(policy, seed=1)

    def step(self, step: int, optimizer) -> dict:
        losses = base_loss(self.policy, self.corpus, torch.Generator().manual_seed(10**6 * (self.seed + 1) + step))
        optimizer.zero_grad()
        if not all(torch.isfinite(v) for v in losses.values()):
            raise FloatingPointError(f"the control's losses are {[v.item() for v in losses.values()]}")
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self.grad_clip)
        optimizer.step()
        return {"loss": sum(losses.values()).item()} | {f"control/{k}": v.item() for k, v in losses.items()}


def referees(folder, n: int = 600, seed: int = 11) -> str:
    """How right the referees in `folder` are on `n` new ground-truth pictures each of the evaluation's prompts: one line with shares."""
    rng, siglip, judge = np.random.default_rng(seed), models.load_siglip(str(folder / "siglip")), models.load_judge(str(folder / "judge"))
    pool = shapes.prompts("eval") + shapes.implicit_prompts("eval")
    asked = [shapes.pick(rng, pool) for _ in range(n)]
    texts = siglip.embed_texts([m["prompt"] for m in asked])                                         # (n, D)
    cosine = lambda scenes: (siglip.embed_images(rendered(scenes) * 0.5 + 0.5) * texts).sum(-1)     # (n,)
    above = (cosine([shapes.sample_scene(m, rng, training=False) for m in asked])
             > cosine([shapes.sample_scene(shapes.wrong_metadata(m, rng), rng, training=False) for m in asked])).float().mean()
    scenes, questions, right = judge_batch(rng, 2 * n, pool)
    agree = (judge.yes_probability(rendered(scenes) * 0.5 + 0.5, questions) > 0.5) == torch.tensor(right)
    share = lambda hits: f"{hits:.3f} +- {(hits * (1 - hits) / n) ** 0.5:.3f}"
    return (f"siglip ranks the right picture above a contradicting one: {share(above)}; "
            f"judge right on prompts: {share(agree[1::2].float().mean())}, on answers: {share(agree[0::2].float().mean())}")


def latent_statistics(policy: Policy, scenes: int = 1000) -> None:
    """Set the config's scale and shift so that the policy's latents are unit normal."""
    rng = np.random.default_rng(0)
    x = rendered([shapes.random_scene(rng, split) for _ in range(scenes) for split in ("train", "eval")])
    with torch.no_grad():
        z = torch.cat([policy.autoencoder.encode(part).latent_dist.mean for part in x.split(500)])
    policy.config.ae.update(scale_factor=1 / z.std().item(), shift_factor=z.mean().item())


def main(folder) -> None:
    """Make everything in `folder` (toy): policy/, siglip/, judge/."""
    begun = time.time()
    say = lambda what: print(f"{what} done after {time.time() - begun:.0f} s", flush=True)
    torch.manual_seed(0)
    autoencoder = build_autoencoder(CONFIG.ae).to(memory_format=torch.channels_last)
    train_autoencoder(autoencoder)
    say("autoencoder")
    policy = new_base(build_tokenizer(), seed=0)
    policy.autoencoder.load_state_dict(autoencoder.state_dict())
    policy.autoencoder.eval().requires_grad_(False)
    latent_statistics(policy)
    corpus = Corpus(policy)
    for steps, lr, seed, scenes in ROUNDS:
        train_base(policy, corpus, steps, lr, seed, scenes)
    save_policy(policy.eval(), folder / "policy")
    say("base")
    torch.manual_seed(5)
    build_siglip(folder / "siglip", shapes.VOCABULARY)
    encoder = models.load_siglip(str(folder / "siglip"))
    train_siglip(encoder)
    encoder.model.save_pretrained(folder / "siglip")
    say("siglip")
    torch.manual_seed(6)
    build_judge(folder / "judge", (*shapes.VOCABULARY, "this", "answer"))
    judge = models.load_judge(str(folder / "judge"))
    train_judge(judge)
    judge.model.save_pretrained(folder / "judge")
    say(f"all of {folder}")
    print(referees(folder))


if __name__ == "__main__":
    print(referees(Path(__file__).parent))
