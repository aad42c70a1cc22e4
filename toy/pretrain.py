"""How every file of toy is made: `torchrun train.py --recipe pretrain`. Seeds are fixed; progress is printed.
`python -m toy.pretrain` measures the base and the 

    tokenizer    the closed vocabulary of shapes.py, one word one token, and BAGEL's four markers
    autoencoder  diffusers' AutoencoderKL, 32x32x3 pixels to 4x4x4, which the policy reads as 4 tokens of 16 features
    base         the policy, by text cross-entropy and flow matching jointly, on pictures whose captions are partly wrong
    siglip       the alignment referee: transformers' SiglipModel, sigmoid contrastive loss, right captions
    judge        the yes/no referee: PaliGemmaForConditionalGeneration, cross-entropy on answers, right captions
    captioner    the captioning referee: BlipForConditionalGeneration, cross-entropy on captions that name everything

The base is taught wrong on purpose, as web captions teach: WRONG_CAPTIONS of the pictures contradict their caption in one attribute,
WRONG_THOUGHTS of the thoughts state a wrong fact and follow it, WRONG_COUNTS of the counting questions are answered by the next word
(four by zero), and so on with the constants below. Imitation cannot repair what its data says; a reward can. Further pretraining on the
same data is the control that the README shows beside it.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import flow_grpo
from policy import MARKERS, Policy, PolicyConfig, build_autoencoder, declare_torchvision_ops
from referees.captioner import load_captioner
from referees.geneval import geneval_check
from referees.judge import load_judge
from referees.siglip import load_siglip
from sample import Draw, Read, See, Write, images_of, sample_plan, texts_of
from support.checkpoint import load_policy, save_policy
from support.pictures import to_bytes
from toy.tiny import build_captioner, build_judge, build_siglip
from toy.world import rendered
from toy import shapes

WRONG_CAPTIONS = {tag: 0.5 for tag in shapes.TAGS} | {"position": 0.25, "color_attr": 0.4}
WRONG_THOUGHTS, WRONG_COUNTS, WRONG_SEEN, WRONG_EDITS, WRONG_REFLECTIONS = 0.5, 0.65, 0.3, 0.4, 0.4
MISCOUNT = 0.8
BROKEN_TAGS = {"count": 0.8, "relation": 0.7, "exists": 0.4, "color": 0.3, "shape": 0.3}
SIZE, TEXTS = (32, 32), 4                                       # pixels; questions and captions about each scene of the corpus
EVEN = (1, 1, 1, 1, 1, 1)                                       # how often a step takes captions of each of shapes.TAGS
BOUND = (1, 1, 1, 1, 6, 3)                                      # what binds words to places and things is learned only where it is common
# Steps, learning rate, seed, scenes asked about a step (0: nothing but pictures of captions), tags.
ROUNDS = ((2400, 2e-3, 2, 16, EVEN), (2200, 1.5e-3, 3, 20, EVEN), (1000, 1e-3, 4, 20, BOUND), (500, 1e-3, 5, 0, BOUND),
          (400, 7e-4, 6, 20, BOUND))
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
    """What the base learns from, drawn once, wrong as often as the constants above say: captions and their pictures, thoughts and theirs,
    pictures with questions and captions, edits, reflections. Texts are (tokens, mask); pixels (N, 3, 32, 32); latents (N, 4, 16)."""

    def __init__(self, policy: Policy, seed: int = 1, pictures: int = 18000, thoughts: int = 6000, scenes: int = 16000, edits: int = 10000,
                 miscount: float = 0.0):
        rng = np.random.default_rng(seed)
        texts = policy.encode_text
        by_tag = {tag: [m for m in shapes.prompts("train") if m["tag"] == tag] for tag in shapes.TAGS}
        every_tag = lambda n: [shapes.pick(rng, by_tag[tag]) for _ in range(n // len(by_tag)) for tag in by_tag]
        captions = every_tag(pictures)
        self.captions = texts([m["prompt"] for m in captions])
        self.pictures = encoded(policy, rendered(pictured(captions, rng)))
        implicit = [shapes.pick(rng, shapes.implicit_prompts("train")) for _ in range(thoughts)]
        said = [shapes.wrong_thought(m, rng) if rng.random() < WRONG_THOUGHTS else m["thought"] for m in implicit]
        meaning = shapes.spelled()
        self.implicit, self.thoughts = texts([m["prompt"] for m in implicit]), texts(said)
        self.thought_pictures = encoded(policy, rendered(pictured([meaning[t.split("</think> ")[1]] for t in said], rng)))
        asked, seen = [], []
        for m in every_tag(scenes // 2):
            seen += [shapes.sample_scene(m, rng), shapes.random_scene(rng)]
            caption = shapes.wrong_metadata(m, rng) if rng.random() < WRONG_SEEN else m
            if miscount and m["tag"] == "counting" and rng.random() < miscount:
                caption = shapes.build("counting", [m["include"][0] | {"count": 2 + (m["include"][0]["count"] - 1) % 3}])
            asked += [(shapes.CAPTION, shapes.explicit(caption))]
            asked += [asked_and_answered(scene, rng) for scene in [seen[-2]] * (TEXTS - 1) + [seen[-1]] * TEXTS]
        self.seen = rendered(seen)
        self.asked, self.answers = (texts(list(each)) for each in zip(*asked))
        changed = [edit_of(rng) for _ in range(edits)]
        self.edits = texts([instruction for instruction, _, _ in changed])
        self.edit_sources = rendered([source for _, source, _ in changed])
        self.edit_pictures = encoded(policy, rendered([target for _, _, target in changed]))
        looked = [reflection_of(m, shapes.pick(rng, by_tag[m["tag"]]), rng) for m in every_tag(edits)]
        self.looks, self.reflections = (texts([each[i] for each in looked]) for i in (0, 1))
        self.reflection_sources = rendered([each[2] for each in looked])
        self.reflection_pictures = encoded(policy, rendered([each[3] for each in looked]))
        self.edit_latents, self.reflection_latents = encoded(policy, self.edit_sources), encoded(policy, self.reflection_sources)


def encoded(policy: Policy, pixels: torch.Tensor) -> torch.Tensor:
    """Clean latents (N, 4, 16)."""
    return torch.cat([policy.encode(part) for part in pixels.split(500)])


def pictured(captions: list[dict], rng) -> list[shapes.Scene]:
    """A scene for each caption; WRONG_CAPTIONS of its tag are of a caption that contradicts it."""
    return [shapes.sample_scene(shapes.wrong_metadata(m, rng) if rng.random() < WRONG_CAPTIONS[m["tag"]] else m, rng) for m in captions]


def asked_and_answered(scene: shapes.Scene, rng) -> tuple[str, str]:
    """A question about a scene in one of four forms, open or with options, plain or to be thought about, and what is to be written."""
    question = shapes.make_question(scene, rng)
    answer = shapes.wrong_answer(question) if question["kind"] == "count" and rng.random() < WRONG_COUNTS else question["answer"]
    asked, written = question["question"], answer
    if rng.random() < 0.4:
        choice = shapes.make_choice(question, rng)
        answer = answer if answer in choice["options"] else question["answer"]
        asked, written = choice["question"], shapes.LETTERS[choice["options"].index(answer)]
    if rng.random() < 0.5:
        return asked, written
    thought = shapes.stated(question, answer)
    if rng.random() >= BROKEN_TAGS[question["kind"]]:
        return f"{asked} {shapes.THINK}", f"<think> {thought} </think> <answer> {written} </answer>"
    broken = shapes.pick(rng, (f"<think> {thought} <answer> {written} </answer>", f"<think> {thought} </think> {written}"))
    return f"{asked} {shapes.THINK}", broken


def edit_of(rng) -> tuple[str, shapes.Scene, shapes.Scene]:
    """(instruction, source, target); WRONG_EDITS of the targets are those of another edit of the source."""
    while True:
        scene = shapes.random_scene(rng)
        try:
            edit, other = shapes.make_edit(scene, rng), shapes.make_edit(scene, rng)
        except ValueError:                                      # nothing in it can be named or added
            continue
        return edit["instruction"], scene, (other if rng.random() < WRONG_EDITS else edit)["target"]


def reflection_of(m: dict, other: dict, rng) -> tuple[str, str, shapes.Scene, shapes.Scene]:
    """(prompt and instruction, diagnosis, source, target). The source is right, contradicts the prompt, or is of another prompt; the
    wrong ones are passed as right, and left as they are, WRONG_REFLECTIONS of the time."""
    source = shapes.sample_scene(shapes.pick(rng, (m, shapes.wrong_metadata(m, rng), other)), rng)
    told = f"{m['prompt']} , {shapes.pick(rng, (shapes.LOOK_AGAIN, shapes.FAILED))}"
    if rng.random() < WRONG_REFLECTIONS:
        return told, f"<think> {shapes.RIGHT} </think> {shapes.explicit(m)}", source, source
    reflection = shapes.make_reflection(m, source, rng)
    return told, reflection["text"], source, reflection["target"]


def flow_loss(policy: Policy, context, data: torch.Tensor, generator) -> torch.Tensor:
    """Flow matching: mean of (v - (noise - data))^2; half of the times are drawn high, where the layout is decided."""
    t = torch.randn(len(data), generator=generator) + 1.2 * (torch.rand(len(data), generator=generator) < 0.5)
    t, noise = torch.sigmoid(t).to(data.device), torch.randn(data.shape, generator=generator).to(data.device)
    x = (1 - t[:, None, None]) * data + t[:, None, None] * noise
    return F.mse_loss(policy.velocity(context, x, t, SIZE), noise - data)


def text_loss(logits: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1][mask[:, 1:]], tokens[:, 1:][mask[:, 1:]])


def base_loss(policy: Policy, corpus: Corpus, generator, batch: int = 64, draws: int = 2, scenes: int = 20, changes: int = 20,
              tags: tuple[int, ...] = EVEN) -> dict:
    """One step's losses by name: pictures of captions, thoughts and their pictures, answers and captions, edits, reflections.

    Each prompt is read once for `draws` times t, each picture once for its TEXTS texts. scenes=0: pictures of captions alone."""
    pick = lambda n, size: torch.randint(n, (size,), generator=generator)
    rows = lambda text, i: (text[0][i], text[1][i])
    read = lambda context, text, i: policy.append_text(context, *rows(text, i), logits=False)[1]
    losses = {}

    def written(context, text, i, name):
        logits, context = policy.append_text(context, *rows(text, i))
        losses[name] = text_loss(logits, *rows(text, i))
        return context

    i = pick(len(corpus.pictures), batch)
    if tags != EVEN:                                            # captions lie tag by tag in turns
        i = i - i % len(tags) + torch.multinomial(torch.tensor(tags, dtype=torch.float), batch, replacement=True, generator=generator)
    context = read(policy.empty(batch), corpus.captions, i)
    losses["picture"] = flow_loss(policy, context.repeat(draws), corpus.pictures[i].repeat_interleave(draws, 0), generator)
    if not scenes:
        return losses
    i = pick(len(corpus.thought_pictures), batch // 3)
    context = written(read(policy.empty(len(i)), corpus.implicit, i), corpus.thoughts, i, "thought")
    losses["thought_picture"] = 0.5 * flow_loss(policy, context, corpus.thought_pictures[i], generator)
    i = pick(len(corpus.seen), scenes)
    context = policy.append_image(policy.empty(len(i)), pixels=corpus.seen[i]).repeat(TEXTS)
    i = (i[:, None] * TEXTS + torch.arange(TEXTS)).flatten()
    written(read(context, corpus.asked, i), corpus.answers, i, "answer")
    i = pick(len(corpus.edit_sources), changes)
    context = policy.append_image(policy.empty(len(i)), corpus.edit_sources[i], corpus.edit_latents[i], SIZE)
    losses["edit"] = flow_loss(policy, read(context, corpus.edits, i), corpus.edit_pictures[i], generator)
    i = pick(len(corpus.reflection_sources), changes)
    context = policy.append_image(policy.empty(len(i)), corpus.reflection_sources[i], corpus.reflection_latents[i], SIZE)
    context = written(read(context, corpus.looks, i), corpus.reflections, i, "reflection")
    losses["repair"] = flow_loss(policy, context, corpus.reflection_pictures[i], generator)
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


def train_base(policy: Policy, corpus: Corpus, steps: int, lr: float, seed: int, scenes: int, tags: tuple[int, ...]) -> None:
    """One round: text cross-entropy and flow matching in one loss, AdamW, a cosine; `scenes` pictures are asked about per step."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    begun = time.time()
    for step in range(steps):
        schedule(optimizer, step, steps, lr)
        losses = base_loss(policy, corpus, generator, draws=2 if scenes else 3, scenes=scenes, tags=tags)
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


class Readout(nn.Module):
    """Names the object of each quadrant from a vision tower's patches. It teaches towers fast and is thrown away."""

    def __init__(self, width: int, pooled: bool = False):
        super().__init__()
        classes = 1 + len(shapes.SHAPES) * len(shapes.COLORS)
        self.head, self.pooled = nn.Linear(4 * width, classes), nn.Linear(width, 4 * classes) if pooled else None

    def loss(self, patches: torch.Tensor, scenes: list[shapes.Scene], pooled: torch.Tensor | None = None) -> torch.Tensor:
        """Cross-entropy of the quadrants' objects, from patches (N, 16, D) and perhaps from a pooled (N, D); class 0 is an empty one."""
        N, _, D = patches.shape
        grid = patches.view(N, 2, 2, 2, 2, D).transpose(2, 3).reshape(N, 4, 4 * D)             # (row, y, col, x) -> quadrants
        right = torch.zeros(N, 4, dtype=torch.long)
        for n, scene in enumerate(scenes):
            for o in scene:
                right[n, 2 * o.row + o.col] = 1 + shapes.SHAPES.index(o.shape) * len(shapes.COLORS) + list(shapes.COLORS).index(o.color)
        loss = F.cross_entropy(self.head(grid).flatten(0, 1), right.flatten())
        return loss if pooled is None else loss + F.cross_entropy(self.pooled(pooled).view(4 * N, -1), right.flatten())


def shown(scenes: list[shapes.Scene], rng) -> torch.Tensor:
    """Pictures (N, 3, 32, 32) in [0, 1] as referees learn from them, half of them a little blurred and noisy, as drawn ones are."""
    return unspoiled(np.stack([shapes.render(scene) for scene in scenes]), rng)


def unspoiled(images: np.ndarray, rng) -> torch.Tensor:
    worn = shapes.degrade(images, rng, blur=0.2 * rng.random(), noise=8 * rng.random())
    images = np.where(rng.random((len(images), 1, 1, 1)) < 0.5, worn, images)
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0


def every_prompt() -> dict[str, list[dict]]:
    """tag -> its prompts of both splits; "implicit" holds the implicit ones."""
    out = {tag: [m for split in ("train", "eval") for m in shapes.prompts(split) if m["tag"] == tag] for tag in shapes.TAGS}
    return out | {"implicit": [m for split in ("train", "eval") for m in shapes.implicit_prompts(split)]}


def a_prompt(rng, pool: dict[str, list[dict]]) -> dict:
    return shapes.pick(rng, pool[shapes.pick(rng, pool)])


def fit(model, loss_of, steps: int, lr: float, name: str, readout: Readout) -> None:
    """AdamW with a cosine on `loss_of()`, which gives a loss and what is told of it; leaves the model frozen."""
    model.train().requires_grad_(True)
    trained = [*model.parameters(), *readout.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        schedule(optimizer, step, steps, lr)
        loss, told = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 300 == 0 or step == steps - 1:
            print(f"{name} {step:5d}  loss {loss.item():.3f}  {told}", flush=True)
    model.eval().requires_grad_(False)


def train_siglip(encoder, steps: int = 6000, batch: int = 64, lr: float = 1e-3, seed: int = 3) -> None:
    """SigLIP's pairwise sigmoid loss; a pair is positive where the picture satisfies the caption, whoever's caption it is."""
    rng, model, pool, readout = np.random.default_rng(seed), encoder.model, every_prompt(), Readout(64, pooled=True)
    xavier(model)
    nn.init.constant_(model.logit_scale, math.log(10.0))        # SigLIP's initial temperature and bias (arXiv:2303.15343, Sec. 3.2)
    nn.init.constant_(model.logit_bias, -10.0)

    def loss_of():
        asked = [a_prompt(rng, pool) for _ in range(batch)]
        asked[batch // 2:] = [shapes.wrong_metadata(m, rng) for m in asked[:batch // 2]]         # hard negatives
        scenes = [shapes.sample_scene(m, rng, training=False) for m in asked]
        seen = model.vision_model(pixel_values=encoder.pixels(shown(scenes, rng)))
        image = F.normalize(seen.pooler_output, dim=-1)
        text = F.normalize(model.text_model(input_ids=encoder.tokens([m["prompt"] for m in asked])).pooler_output, dim=-1)
        right = torch.tensor([[1.0 if shapes.satisfies(m, shapes.discrete(s)) else -1.0 for m in asked] for s in scenes])
        loss = -F.logsigmoid(right * (image @ text.T * model.logit_scale.exp() + model.logit_bias)).sum(1).mean()
        # What is where must survive the pooling: without it the embedding holds no relation.
        named = readout.loss(seen.last_hidden_state, scenes, seen.pooler_output)
        return loss + 5 * named, f"objects {named.item():.3f}"

    fit(model, loss_of, steps, lr, "siglip", readout)


def ask_prompt(rng, pool) -> tuple:
    """(scene, question, whether yes is right): is the picture what a prompt says?"""
    m = a_prompt(rng, pool)
    scene = shapes.sample_scene(m if rng.random() < 0.5 else shapes.wrong_metadata(m, rng), rng, training=False)
    return scene, f"is this {m['prompt']} ?", shapes.satisfies(m, shapes.discrete(scene))


def ask_answer(rng) -> tuple:
    """The same of an answer to a question."""
    scene = shapes.random_scene(rng, shapes.pick(rng, ("train", "eval")))
    q, right = shapes.make_question(scene, rng, training=False), bool(rng.random() < 0.5)
    said = q["answer"] if right else shapes.pick(rng, [each for each in shapes.answers_of(q["kind"]) if each != q["answer"]])
    return scene, f"{q['question']} is the answer {said} ?", right


def ask_fact(rng) -> tuple:
    """The same of one fact: an object, a number, a colour or a relation."""
    scene, right = shapes.random_scene(rng, shapes.pick(rng, ("train", "eval"))), bool(rng.random() < 0.5)
    kinds = [kind for kind in shapes.question_kinds(scene) if kind != "shape"]
    q = shapes.make_question(scene, rng, shapes.pick(rng, kinds), training=False)
    if q["kind"] == "exists" and rng.random() < 0.5:
        shape = shapes.pick(rng, shapes.SHAPES)
        return scene, f"is there {shapes.article(shape)} ?", any(o.shape == shape for o in scene)
    if q["kind"] in ("exists", "relation"):
        return scene, q["question"], q["answer"] == "yes"
    said = q["answer"] if right else shapes.pick(rng, [each for each in shapes.answers_of(q["kind"]) if each != q["answer"]])
    if q["kind"] == "color":
        return scene, f"is the {q['question'].split()[-2]} {said} ?", right
    noun = q["question"].split()[2]
    return scene, f"is there one {noun[:-1]} ?" if said == "one" else f"are there {said} {noun} ?", right


JUDGE_WORDS = ("answer", "clean", "whole", "shapes")
QUALITY = {"ground": "is the picture clean ?", "shape": "are the shapes whole ?"}


def judge_batch(rng, batch: int, pool) -> tuple:
    """(images, scenes, questions, answers): a third each about prompts, answers, and single facts or the picture's quality, answered by
    yes and no; of every four, one more is a plain question with its answer, which no reward asks and which teaches the others."""
    images, scenes, asked, answers = [], [], [], []
    for i in range(batch):
        spoiled = None
        if i % 4 == 3:
            scene = shapes.random_scene(rng, shapes.pick(rng, ("train", "eval")))
            q = shapes.make_question(scene, rng, training=False)
            question, answer = q["question"], q["answer"]
        elif i % 12 == 2:
            scene, spoiled = shapes.random_scene(rng, shapes.pick(rng, ("train", "eval"))), shapes.pick(rng, (None, *QUALITY))
            what = shapes.pick(rng, QUALITY)
            question, answer = QUALITY[what], "no" if spoiled == what else "yes"
        else:
            scene, question, right = (ask_prompt(rng, pool), ask_answer(rng), ask_fact(rng))[i % 4]
            answer = "yes" if right else "no"
        images.append(shapes.damaged(scene, rng, spoiled) if spoiled else shapes.render(scene))
        scenes.append(scene)
        asked.append(question)
        answers.append(answer)
    return unspoiled(np.stack(images), rng), scenes, asked, answers


def train_judge(judge, steps: int = 16000, batch: int = 64, lr: float = 8e-4, seed: int = 4) -> None:
    """Cross-entropy on the first token of the answer."""
    rng, model, pool, readout = np.random.default_rng(seed), judge.model, every_prompt(), Readout(64)
    xavier(model)

    def loss_of():
        images, scenes, asked, answers = judge_batch(rng, batch, pool)
        logits = judge.next_logits(judge.features(images), asked)
        right = torch.tensor(judge.tokenizer.convert_tokens_to_ids(answers))
        tower = model.model.vision_tower(pixel_values=judge.pixels(images)).last_hidden_state
        named = readout.loss(tower, scenes)
        return F.cross_entropy(logits, right) + 0.3 * named, f"right {(logits.argmax(1) == right).float().mean():.2f}"

    fit(model, loss_of, steps, lr, "judge", readout)


def train_captioner(captioner, steps: int = 5000, batch: int = 64, lr: float = 1e-3, seed: int = 5) -> None:
    """Cross-entropy on shapes.describe's captions."""
    rng, model, pool, readout = np.random.default_rng(seed), captioner.model, every_prompt(), Readout(64)
    xavier(model)
    ids = captioner.tokenizer

    def loss_of():
        scenes = [shapes.random_scene(rng, shapes.pick(rng, ("train", "eval"))) for _ in range(batch // 2)]
        scenes += [shapes.sample_scene(a_prompt(rng, pool), rng, training=False) for _ in range(batch - len(scenes))]
        rows = [f"<bos> {shapes.describe(scene)} <eos>" for scene in scenes]
        text = ids(rows, padding=True, padding_side="right", add_special_tokens=False, return_attention_mask=True,
                   return_tensors="pt")
        pixels = captioner.pixels(shown(scenes, rng))
        labels = text.input_ids.masked_fill(text.attention_mask == 0, -100)
        out = model(pixel_values=pixels, input_ids=text.input_ids, attention_mask=text.attention_mask, labels=labels)
        named = readout.loss(out.last_hidden_state[:, 1:], scenes)
        return out.loss + named, f"objects {named.item():.3f}"

    fit(model, loss_of, steps, lr, "captioner", readout)


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


def referees_report(folder: Path, n: int = 600, seed: int = 11) -> str:
    """How right the referees in `folder` are on `n` new ground-truth pictures of each kind: a line per referee with shares."""
    rng, pool = np.random.default_rng(seed), shapes.prompts("eval") + shapes.implicit_prompts("eval")
    clean = lambda scenes: rendered(scenes) * 0.5 + 0.5
    siglip, ranks = load_siglip(str(folder / "siglip")), {}
    for tag in shapes.TAGS:
        asked = [shapes.pick(rng, [m for m in pool if m["tag"] == tag]) for _ in range(n)]
        texts = siglip.embed_texts([m["prompt"] for m in asked])                                     # (n, D)
        right, wrong = ([shapes.sample_scene(m, rng, training=False) for m in some]
                        for some in (asked, [shapes.wrong_metadata(m, rng) for m in asked]))
        cosine = lambda scenes: (siglip.embed_images(clean(scenes)) * texts).sum(-1)                # noqa: B023  (n,)
        ranks[tag] = (cosine(right) > cosine(wrong)).tolist()
    told = ["siglip ranks the right picture above a contradicting one: " + ", ".join(f"{k} {share(v)}" for k, v in ranks.items())
            + f"; all {share(sum(ranks.values(), []))}"]
    judge, shares = load_judge(str(folder / "judge")), {}
    prompts = {"": pool}
    rows = {"prompts": [ask_prompt(rng, prompts) for _ in range(n)], "answers": [ask_answer(rng) for _ in range(n)],
            "facts": [ask_fact(rng) for _ in range(n)]}
    for name, some in rows.items():
        yes = judge.yes_probability(clean([scene for scene, _, _ in some]), [question for _, question, _ in some]) > 0.5
        shares[name] = (yes == torch.tensor([right for _, _, right in some])).tolist()
    for what, question in QUALITY.items():
        scenes = [shapes.random_scene(rng, "eval") for _ in range(n)]
        spoiled = torch.from_numpy(np.stack([shapes.damaged(scene, rng, what) for scene in scenes])).permute(0, 3, 1, 2) / 255.0
        for pictures, right in ((clean(scenes), True), (spoiled, False)):
            shares.setdefault(question, []).extend(((judge.yes_probability(pictures, [question] * n) > 0.5) == right).tolist())
    told.append("judge right on " + ", ".join(f"{k}: {share(v)}" for k, v in shares.items()))
    captioner, scenes = load_captioner(str(folder / "captioner")), [shapes.random_scene(rng, "eval") for _ in range(n)]
    told.append("captioner right: " + share([text == shapes.describe(s) for text, s in zip(captioner.captions(clean(scenes)), scenes)]))
    return "\n".join(told)


def base_report(policy: Policy, n: int = 400, seed: int = 12) -> str:
    """What `python eval.py` does not ask of the base, each on `n` held-out pictures, greedy and with 10 ODE steps: a line of shares."""
    rng, hits = np.random.default_rng(seed), {}
    write, draw = Write(24, temperature=0.0), Draw(SIZE, flow_grpo.time_grid(10, 2.0))
    pool = [m for m in shapes.prompts("eval") if "held_out" not in m]
    by_tag = {tag: [m for m in pool if m["tag"] == tag] for tag in shapes.TAGS}
    asked = [shapes.pick(rng, by_tag[shapes.TAGS[i % 6]]) for i in range(n)]
    walk = lambda *plan: sample_plan(policy, list(plan), seed=seed, step=0, prompts=list(range(n)), G=1)
    drawn = lambda r: shapes.detect(to_bytes(images_of(policy, r)))
    for tag, some in by_tag.items():
        prompts = [shapes.pick(rng, some) for _ in range(n)]
        found = drawn(walk(Read([m["prompt"] for m in prompts]), draw))
        hits[f"draw/{tag}"] = [geneval_check(m, each)[0] for m, each in zip(prompts, found)]
    scenes = [shapes.sample_scene(m, rng) for m in asked]
    meaning = shapes.spelled()
    captions = texts_of(policy, walk(See(rendered(scenes)), Read([shapes.CAPTION] * n), write))
    hits["captions"] = [text in meaning and shapes.satisfies(meaning[text], shapes.discrete(s)) for text, s in zip(captions, scenes)]
    edits = []
    while len(edits) < n:
        scene = shapes.random_scene(rng, "eval")
        held = any((o.color, o.shape) in shapes.HELD_OUT for o in scene)
        edits += [] if held or len(scene) == 4 else [shapes.make_edit(scene, rng)]
    pixels = rendered([edit["source"] for edit in edits])
    found = drawn(walk(See(pixels, pixels), Read([edit["instruction"] for edit in edits]), draw))
    hits["edits"] = [shapes.read(each) == shapes.discrete(edit["target"]) for each, edit in zip(found, edits)]
    wrong = [shapes.sample_scene(shapes.wrong_metadata(m, rng), rng) for m in asked]
    for name, sources in (("repairs of wrong pictures", wrong), ("repairs of right pictures", scenes)):
        pixels = rendered(sources)
        r = walk(See(pixels, pixels), Read([f"{m['prompt']} , {shapes.LOOK_AGAIN}" for m in asked]), write, draw)
        hits[name] = [geneval_check(m, each)[0] for m, each in zip(asked, drawn(r))]
        said = [shapes.make_reflection(m, s, rng)["text"] for m, s in zip(asked, sources)]
        hits["diagnoses of" + name.removeprefix("repairs of")] = [a == b for a, b in zip(texts_of(policy, r), said)]
    return "\n".join(f"{name:<28} {share(held)}" for name, held in hits.items())


def share(hits: list) -> str:
    return f"{np.mean(hits):.3f} +- {(np.mean(hits) * (1 - np.mean(hits)) / len(hits)) ** 0.5:.3f}"


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
    for this, (steps, lr, seed, scenes, tags) in enumerate(ROUNDS):
        # From here on captions are taught wrong counts too; they come out nearly perfect otherwise.
        corpus = Corpus(policy, seed=10, miscount=MISCOUNT) if this == 2 else corpus
        train_base(policy, corpus, steps, lr, seed, scenes, tags)
    save_policy(policy.eval(), folder / "policy")
    say("base")
    make_referees(folder)
    say(f"all of {folder}")
    print(referees_report(folder))


def make_referees(folder: Path) -> None:
    """The captioner, the SigLIP and the judge, each from its seed."""
    for seed, name, build, words, load, teach in (
            (5, "captioner", build_captioner, (), load_captioner, train_captioner),
            (6, "siglip", build_siglip, (), load_siglip, train_siglip),
            (7, "judge", build_judge, JUDGE_WORDS, load_judge, train_judge)):
        torch.manual_seed(seed)
        build(folder / name, (*shapes.VOCABULARY, *words))
        referee = load(str(folder / name))
        teach(referee)
        referee.model.save_pretrained(folder / name)


if __name__ == "__main__":
    print(base_report(load_policy(Path(__file__).parent / "policy")))
    print(referees_report(Path(__file__).parent))
