"""How every file of toy is made: `torchrun train.py --recipe pretrain`. Seeds are fixed.

`python eval.py` measures the base, `python -m studies.reward_truth` what the referees are worth.

    tokenizer    the closed vocabulary of shapes.py, one word one token, and BAGEL's four markers
    autoencoder  diffusers' AutoencoderKL: 32x32x3 pixels to 4x4x4, for the policy 4 tokens of 16
    base         the policy: text cross-entropy and flow matching on partly wrong captions
    siglip       the alignment referee: transformers' SiglipModel, sigmoid contrastive loss
    judge        the yes/no referee: PaliGemmaForConditionalGeneration, cross-entropy on answers
    unsure_judge the same, made in a sixteenth of the steps
    preference   transformers' CLIPModel, of raters who like colour besides what the prompt says
    captioner    the captioning referee: BlipForConditionalGeneration, captions of everything

Referees learn from right texts alone. The base learns wrong things on purpose, as web captions
teach them: WRONG_CAPTIONS of the pictures contradict their caption in one attribute, WRONG_THOUGHTS
of the thoughts state a wrong fact and follow it, WRONG_COUNTS of the counting questions are
answered by the next word (four by zero), and so on with the constants below. Imitation cannot
repair what its data says; a reward can. Further pretraining on the same data is the control that
the results show next to it.
"""

import math
import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from policy import MARKERS, Policy, PolicyConfig, build_autoencoder, declare_torchvision_ops
from referees.captioner import load_captioner
from referees.judge import load_judge
from referees.siglip import load_clip, load_siglip, sigmoid_loss, unit
from support.checkpoint import save_policy
from support.pictures import texture
from toy import shapes
from toy.tiny import build_captioner, build_clip, build_judge, build_siglip
from toy.world import any_prompt, render_pixels

WRONG_CAPTIONS = {tag: 0.5 for tag in shapes.TAGS} | {"position": 0.25, "color_attr": 0.4}
WRONG_THOUGHTS = 0.5
WRONG_COUNTS = 0.65
WRONG_SEEN = 0.3                        # captions of a picture that is given
WRONG_EDITS = 0.4
WRONG_REFLECTIONS = 0.4
MISCOUNT = 0.8
BROKEN_TAGS = {"count": 0.8, "relation": 0.7, "exists": 0.4, "color": 0.3, "shape": 0.3}
OPTIONS = 0.4                           # share of the questions that have options
TOKEN_OPTIONS = 0.7                     # of the token base, which learns letters late
LOOKS = (shapes.LOOK_AGAIN, "this is wrong , look again")
SIZE = (32, 32)                         # pixels
TEXTS = 4                               # about each scene
BATCH = 64                              # captions a step
EVEN = (1, 1, 1, 1, 1, 1)               # how often captions of each of TAGS are taken
BOUND = (1, 1, 1, 1, 6, 3)              # the last two are learned only if they are common
# Steps, learning rate, seed, scenes asked about a step, tags; see base_loss.
ROUNDS = ((2400, 2e-3, 2, 16, EVEN), (2200, 1.5e-3, 3, 20, EVEN), (1000, 1e-3, 4, 20, BOUND),
          (500, 1e-3, 5, 0, BOUND), (400, 7e-4, 6, 20, BOUND))
CONFIG = PolicyConfig(
    llm=dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=128,
        intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=0, rope_theta=10000.0, rms_norm_eps=1e-6, hidden_act="silu",
        max_position_embeddings=128, tie_word_embeddings=False),
    vit=dict(
        model_type="siglip_vision_model", hidden_size=64, intermediate_size=128,
        num_hidden_layers=3, num_attention_heads=4, num_channels=3, patch_size=8, image_size=32,
        layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh"),
    bagel=dict(
        latent_patch_size=2, max_latent_size=2, vit_max_num_patch_per_side=4,
        connector_act="gelu_pytorch_tanh", vae_resize=[32, 32, 16], vit_resize=[32, 32, 8]),
    ae=dict(
        resolution=32, in_channels=3, downsample=8, ch=8, out_ch=3, ch_mult=[1, 2, 4, 4],
        num_res_blocks=1, z_channels=4, norm_groups=8, scale_factor=1.0, shift_factor=0.0))
FAITHFUL = 3.0                          # what a picture of the prompt is worth to raters
COLOURFUL = 40.0                        # the same of saturation 1; it varies by 0.07
THINGS = tuple(product(shapes.SHAPES, shapes.COLORS))
JUDGE_WORDS = ("answer", "clean", "whole", "shapes")
QUALITY = {"ground": "is the picture clean ?", "shape": "are the shapes whole ?"}


# ---- training in general ----


def descend(losses, optimizer, clip=1.0):
    """One step down the sum of the losses, with the gradient's norm clipped."""
    optimizer.zero_grad()
    sum(losses.values()).backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()


def fit(name, losses_of, optimizer, steps):
    """Descend `losses_of()`, a dict of losses, for so many steps; print them now and then.

    The learning rate rises linearly over 5% of the steps, then a cosine takes it to 2%."""
    (group,) = optimizer.param_groups
    lr = group["lr"]
    for step in range(steps):
        cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * (step / steps)))
        group["lr"] = lr * min((step + 1) / (0.05 * steps), cosine)
        losses = losses_of()
        descend(losses, optimizer)
        if step % 300 == 0 or step == steps - 1:
            values = {part: round(loss.item(), 3) for part, loss in losses.items()}
            print(name, step, values, flush=True)


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)


# ---- the autoencoder and the tokenizer ----


def build_tokenizer():
    """Words of shapes.VOCABULARY and the markers; <pad> is id 0 and never read."""
    declare_torchvision_ops()
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<unk>", *MARKERS, *shapes.VOCABULARY]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>",
        additional_special_tokens=list(MARKERS), clean_up_tokenization_spaces=False)


def render_both_splits(n):
    """Pixels of n random scenes of each split, in turns."""
    rng = np.random.default_rng(0)
    return render_pixels(
        [shapes.random_scene(rng, split) for _ in range(n) for split in shapes.SPLITS])


def train_autoencoder(autoencoder):
    """Fit the autoencoder to rendered scenes.

    Loss: MSE + 0.1 L1 + 5e-4 KL; the latent is disturbed by a quarter of its size so that decoding
    forgives a policy's errors."""
    generator = torch.Generator().manual_seed(0)
    # Held-out pairs too: it knows no words, and no policy could be blamed for what it cannot draw.
    pool = render_both_splits(6000)

    def losses_of():
        x = pool[torch.randint(len(pool), (48,), generator=generator)]
        posterior = autoencoder.encode(x).latent_dist
        mean = posterior.mean
        z = mean + posterior.std * torch.randn(mean.shape, generator=generator)
        z = z + 0.25 * mean.detach().std() * torch.randn(z.shape, generator=generator)
        y = autoencoder.decode(z).sample
        kl = posterior.kl().mean() / z[0].numel()
        return dict(mse=F.mse_loss(y, x), l1=0.1 * (y - x).abs().mean(), kl=5e-4 * kl)

    optimizer = torch.optim.AdamW(autoencoder.train().parameters(), lr=3e-3, weight_decay=1e-4)
    fit("autoencoder", losses_of, optimizer, 5000)


def latent_statistics(policy):
    """Set the config's scale and shift, 1 and 0 so far, so that latents are unit normal."""
    z = encode(policy, render_both_splits(1000))
    policy.config.ae.update(scale_factor=1 / z.std().item(), shift_factor=z.mean().item())


# ---- the base ----


class Lesson:
    """Rows of one layout: [image in] [text read] -> [text written] [picture drawn].

    Only the text that is read is always there; each image may have several texts. Texts are
    (tokens, mask); pixels (N, 3, 32, 32); what is drawn latents (N, 4, 16) or image tokens (N, 16);
    latents also of an image that is redrawn, if the policy reads them."""

    def __init__(self, policy, read, write=(), draw=(), see=()):
        self.read = policy.encode_text(read, after="image" if see else "nothing")
        self.write = policy.encode_written(write) if write else None
        self.draw = encode(policy, render_pixels(draw)) if draw else None
        self.pixels = render_pixels(see) if see else None
        redrawn = see and draw and policy.reads_latents
        self.latents = encode(policy, self.pixels) if redrawn else None
        self.rows = len(see) if see else len(read)
        self.texts = len(read) // self.rows


class Corpus:
    """What the base learns from, drawn once, wrong as often as the constants above say."""

    def __init__(self, policy: Policy, seed: int = 1, pictures: int = 18000, thoughts: int = 6000,
                 scenes: int = 16000, edits: int = 10000, miscount: float = 0.0):
        rng = np.random.default_rng(seed)
        by_tag = shapes.prompts_by_tag("train")

        def draw_prompts(n):
            rounds = range(n // len(by_tag))
            return [shapes.pick(rng, some) for _ in rounds for some in by_tag.values()]

        captions = draw_prompts(pictures)
        drawn = scenes_of(captions, rng)
        self.captions = Lesson(policy, [m["prompt"] for m in captions], draw=drawn)

        implicit = shapes.implicit_prompts("train")
        riddles = [shapes.pick(rng, implicit) for _ in range(thoughts)]
        written = [thought_of(m, rng) for m in riddles]
        meant = [shapes.captions_by_text()[thought.split("</think> ")[1]] for thought in written]
        drawn = scenes_of(meant, rng)
        self.thoughts = Lesson(policy, [m["prompt"] for m in riddles], written, drawn)

        shown = []
        asked = []                                              # TEXTS pairs for each scene
        share = TOKEN_OPTIONS if policy.reads_blanks else OPTIONS
        for m in draw_prompts(scenes // 2):
            drawn = shapes.sample_scene(m, rng)
            other = shapes.random_scene(rng)
            shown += [drawn, other]
            asked.append((shapes.CAPTION, caption_of(m, rng, miscount)))
            asked += [question_and_answer(drawn, rng, share) for _ in range(TEXTS - 1)]
            asked += [question_and_answer(other, rng, share) for _ in range(TEXTS)]
        questions, answers = zip(*asked)
        self.questions = Lesson(policy, questions, answers, see=shown)

        changes = [edit_of(rng) for _ in range(edits)]
        instructions, sources, targets, _ = zip(*changes)
        self.edits = None                                       # Janus cannot edit
        if policy.reads_latents:
            self.edits = Lesson(policy, instructions, draw=targets, see=sources)

        reflections = [
            reflection_of(m, shapes.pick(rng, by_tag[m["tag"]]), rng) for m in draw_prompts(edits)]
        looks, texts, sources, targets = zip(*reflections)
        self.reflections = Lesson(policy, looks, texts, targets, sources)


def encode(policy, pixels):
    """Clean latents (N, 4, 16), or image tokens (N, 16)."""
    return torch.cat([policy.encode(part) for part in pixels.split(500)])


def scenes_of(captions, rng):
    """A scene for each caption; WRONG_CAPTIONS of a tag's scenes contradict theirs."""
    scenes = []
    for m in captions:
        shown = shapes.wrong_metadata(m, rng) if rng.random() < WRONG_CAPTIONS[m["tag"]] else m
        scenes.append(shapes.sample_scene(shown, rng))
    return scenes


def thought_of(m, rng):
    """The thought of an implicit prompt, wrong WRONG_THOUGHTS of the time."""
    return shapes.wrong_thought(m, rng) if rng.random() < WRONG_THOUGHTS else m["thought"]


def caption_of(m, rng, miscount):
    """The caption of a picture, wrong WRONG_SEEN of the time, and `miscount` of the numbers."""
    caption = shapes.wrong_metadata(m, rng) if rng.random() < WRONG_SEEN else m
    if miscount and m["tag"] == "counting" and rng.random() < miscount:
        (clause,) = m["include"]
        caption = shapes.build("counting", [clause | {"count": 2 + (clause["count"] - 1) % 3}])
    return shapes.explicit(caption)


def question_and_answer(scene, rng, share) -> tuple[str, str]:
    """A question about a scene in one of four forms, and what the base is to write.

    The question is open or, for a share, has options; it is plain or to be thought about."""
    question = shapes.make_question(scene, rng)
    answer = question.answer
    if question.kind == "count" and rng.random() < WRONG_COUNTS:
        answer = shapes.wrong_answer(question)
    text = question.text
    written = answer
    if rng.random() < share:
        choice = shapes.make_choice(question, rng)
        answer = answer if answer in choice.options else question.answer
        text = choice.text
        written = shapes.LETTERS[choice.options.index(answer)]
    if rng.random() < 0.5:
        return text, written
    thought = shapes.statement(question, answer)
    text = f"{text} {shapes.THINK}"
    if rng.random() >= BROKEN_TAGS[question.kind]:
        return text, f"<think> {thought} </think> <answer> {written} </answer>"
    unclosed = f"<think> {thought} <answer> {written} </answer>"
    bare = f"<think> {thought} </think> {written}"
    return text, shapes.pick(rng, (unclosed, bare))


def edit_of(rng) -> shapes.Edit:
    """An edit; WRONG_EDITS of the targets are those of another edit of the source."""
    while True:
        scene = shapes.random_scene(rng)
        try:
            edit = shapes.make_edit(scene, rng)
            other = shapes.make_edit(scene, rng)
        except ValueError:              # nothing in it can be named or added
            continue
        return edit._replace(target=other.target) if rng.random() < WRONG_EDITS else edit


def reflection_of(m, other, rng):
    """(prompt and instruction, text, source, target).

    The source is right, contradicts the prompt, or is of another prompt. WRONG_REFLECTIONS of the
    sources are called right and left as they are."""
    sources = (m, shapes.wrong_metadata(m, rng), other)
    source = shapes.sample_scene(shapes.pick(rng, sources), rng)
    look = f"{m['prompt']} , {shapes.pick(rng, LOOKS)}"
    if rng.random() < WRONG_REFLECTIONS:
        return look, f"<think> {shapes.RIGHT} </think> {shapes.explicit(m)}", source, source
    text, target = shapes.make_reflection(m, source, rng)
    return look, text, source, target


def flow_loss(policy, context, data, generator):
    """Flow matching: mean of (v - (noise - data))^2.

    Half of the times are drawn high, for these decide the layout."""
    t = torch.randn(len(data), generator=generator)
    t = t + 1.2 * (torch.rand(len(data), generator=generator) < 0.5)
    t = torch.sigmoid(t).to(data.device)
    noise = torch.randn(data.shape, generator=generator).to(data.device)
    share = t[:, None, None]                                    # of the noise
    x = (1 - share) * data + share * noise
    return F.mse_loss(policy.velocity(context, x, t, SIZE), noise - data)


def token_loss(policy, context, data, started, without=None):
    """Mean surprise of image tokens (N, 16), in nats.

    After the blanks in `without`, if any, which guidance of scale 0 reads alone."""
    logp = policy.score_image(context, data, started=started, without=without, scale=0.0)
    return -logp.mean()


def base_loss(policy, corpus, generator, scenes=20, tags=EVEN) -> dict:
    """One step's losses by name.

    Each caption is read once for two or three times t, each picture once for all its texts.
    scenes=0: pictures of captions alone. tags: how often captions of each of shapes.TAGS are taken;
    (): questions alone. "unprompted" counts a tenth, for guidance.
    """
    losses = {}

    def learn(lesson, size, text="", picture="", draws=1, tags=EVEN, prompted=True):
        """Add the losses of random rows of a lesson, under the names of what is written and drawn.

        prompted=False: draw after what guidance reads in place of a prompt."""
        i = torch.randint(lesson.rows, (size,), generator=generator)
        if tags != EVEN:                                        # captions lie tag by tag in turns
            weights = torch.tensor(tags, dtype=torch.float)
            tag = torch.multinomial(weights, size, replacement=True, generator=generator)
            i = i - i % len(tags) + tag
        context = policy.empty(size)
        if lesson.pixels is not None:
            latents = None if lesson.latents is None else lesson.latents[i]
            context = policy.append_image(context, lesson.pixels[i], latents, SIZE)
            context = context.repeat(lesson.texts)
        j = (i[:, None] * lesson.texts + torch.arange(lesson.texts)).flatten()
        tokens, mask = (part[j] for part in lesson.read)
        without = None
        if not prompted:
            _, without = policy.append_text(context, policy.blank(tokens), mask, logits=False)
        _, context = policy.append_text(context, tokens, mask, logits=False)
        if text:
            tokens, mask = (part[j] for part in lesson.write)
            logits, context = policy.append_text(context, tokens, mask)
            target = mask[:, 1:]
            losses[text] = F.cross_entropy(logits[:, :-1][target], tokens[:, 1:][target])
        if picture and not policy.reads_latents:
            losses[picture] = token_loss(policy, context, lesson.draw[i], bool(text), without)
        elif picture:
            data = lesson.draw[i].repeat_interleave(draws, 0)
            losses[picture] = flow_loss(policy, context.repeat(draws), data, generator)

    if tags:
        learn(corpus.captions, BATCH, picture="picture", draws=2 if scenes else 3, tags=tags)
        if policy.reads_blanks:
            learn(corpus.captions, BATCH // 10, picture="unprompted", prompted=False)
            losses["unprompted"] *= 0.1
    if scenes and tags:
        learn(corpus.thoughts, BATCH // 3, "thought", "thought_picture")
        losses["thought_picture"] *= 0.5
    if scenes:
        learn(corpus.questions, scenes, "answer")
    if scenes and tags:
        if corpus.edits:
            learn(corpus.edits, 20, picture="edit")
        learn(corpus.reflections, 20, "reflection", "repair")
    return losses


def new_base(tokenizer) -> Policy:
    """A policy at CONFIG's sizes with xavier matrices, whose autoencoder comes later.

    With small initialisations it never learns the places of things."""
    llm = CONFIG.llm | {"vocab_size": len(tokenizer)}
    config = PolicyConfig(llm, CONFIG.vit, CONFIG.bagel, dict(CONFIG.ae))
    torch.manual_seed(0)
    policy = Policy(config, tokenizer)
    begin_base(policy)
    nn.init.zeros_(policy.latent_out.weight)
    return policy


def begin_base(policy):
    """Give a policy xavier matrices, embeddings apart, and biases of zero."""
    for name, p in policy.named_parameters():
        if p.ndim == 2 and "embed" not in name:
            nn.init.xavier_uniform_(p)
        elif name.endswith(".bias"):
            nn.init.zeros_(p)


class Imitation:
    """Further pretraining in the training loop: the control of a reinforcement run.

    It has the run's optimiser, learning rates and clip."""

    def __init__(self, policy: Policy, seed: int, grad_clip: float):
        self.policy = policy
        self.seed = seed
        self.grad_clip = grad_clip
        self.corpus = Corpus(policy)

    def step(self, step: int, optimizer) -> dict:
        generator = torch.Generator().manual_seed(10**6 * (self.seed + 1) + step)
        losses = base_loss(self.policy, self.corpus, generator)
        total = sum(losses.values()).item()
        if not math.isfinite(total):
            raise FloatingPointError(f"the control's loss is {total}")
        descend(losses, optimizer, self.grad_clip)
        return {"loss": total} | {f"control/{name}": loss.item() for name, loss in losses.items()}


# ---- the referees ----


def xavier(model):
    """Xavier matrices, as the base has.

    The published classes' small normal initialisation hardly starts to learn at these widths."""
    for name, p in model.named_parameters():
        if p.ndim == 2 and "embed" not in name:
            nn.init.xavier_uniform_(p)
        elif "position_embedding" in name:
            nn.init.normal_(p, std=0.5)
        elif name == "logit_scale":     # SigLIP's own start (arXiv:2303.15343, Sec. 3.2)
            nn.init.constant_(p, math.log(10.0))
        elif name == "logit_bias":
            nn.init.constant_(p, -10.0)


class Readout(nn.Module):
    """Names the object of each quadrant from a vision tower's patches.

    It teaches towers fast and is thrown away."""

    def __init__(self, pooled: bool):
        super().__init__()
        classes = 1 + len(THINGS)
        self.head = nn.Linear(4 * 64, classes)
        self.pooled = nn.Linear(64, 4 * classes) if pooled else None

    def loss(self, patches, scenes, pooled=None):
        """Cross-entropy of the quadrants' objects; class 0 is an empty one.

        patches (N, 16, D), perhaps a pooled embedding (N, D)."""
        quadrants = rearrange(
            patches, "n (row y col x) d -> (n row col) (y x d)", row=2, y=2, col=2)
        right = torch.zeros(len(scenes), 2, 2, dtype=torch.long)
        for n, scene in enumerate(scenes):
            for o in scene:
                right[n, o.row, o.col] = 1 + THINGS.index((o.shape, o.color))
        right = right.flatten()                                 # (4 N,)
        loss = F.cross_entropy(self.head(quadrants), right)
        if pooled is not None:
            named = rearrange(self.pooled(pooled), "n (place thing) -> (n place) thing", place=4)
            loss = loss + F.cross_entropy(named, right)
        return loss


def wear(images, rng):
    """uint8 images (32, 32, 3) -> (N, 3, 32, 32) in [0, 1], half of them worn.

    Those are a little blurred and noisy, as drawn ones are."""
    worn = shapes.degrade(images, rng, blur=0.2 * rng.random(), noise=8 * rng.random())
    mixed = np.where(rng.random((len(images), 1, 1, 1)) < 0.5, worn, images)
    return torch.from_numpy(mixed).permute(0, 3, 1, 2) / 255.0


def worn_pictures(scenes, rng):
    return wear([shapes.render(scene) for scene in scenes], rng)


def any_scene(rng):
    return shapes.random_scene(rng, shapes.pick(rng, shapes.SPLITS))


def siglip_losses(siglip, readout, pool, rng):
    """SigLIP's pairwise sigmoid loss.

    A pair is positive if the picture satisfies the caption, whoever's caption it is."""
    asked = [any_prompt(rng, pool) for _ in range(BATCH)][:BATCH // 2]
    asked += [shapes.wrong_metadata(m, rng) for m in asked]                     # hard negatives
    scenes = [shapes.sample_scene(m, rng, training=False) for m in asked]
    vision = siglip.vision_outputs(worn_pictures(scenes, rng))
    texts = unit(siglip.text_features([m["prompt"] for m in asked]))
    things = [shapes.discrete(scene) for scene in scenes]
    right = torch.tensor([[shapes.satisfies(m, some) for m in asked] for some in things])
    pairs = sigmoid_loss(siglip.model, unit(vision.pooler_output), texts, right) / len(asked)
    # What is where must survive the pooling: without it the embedding holds no relation.
    objects = readout.loss(vision.last_hidden_state, scenes, vision.pooler_output)
    return dict(pairs=pairs, objects=5 * objects)


def preference_losses(clip, readout, pool, rng):
    """Cross-entropy of which of two pictures of a prompt raters choose, PickScore's loss.

    Raters are Bradley and Terry's: a picture is worth FAITHFUL if it is what the prompt says, and
    COLOURFUL times its saturation, which no prompt asks for."""
    asked = [any_prompt(rng, pool) for _ in range(BATCH)]
    shown = [shapes.pick(rng, (m, shapes.wrong_metadata(m, rng))) for m in asked + asked]
    scenes = [shapes.sample_scene(m, rng, training=False) for m in shown]
    images = worn_pictures(scenes, rng)                                         # (2 BATCH, ...)
    grey = images.mean(1, keepdim=True)
    vivid = torch.from_numpy(rng.uniform(0.5, 1.5, (len(images), 1, 1, 1))).float()
    images = (grey + vivid * (images - grey)).clamp(0, 1)
    right = [shapes.satisfies(m, shapes.discrete(s)) for m, s in zip(asked + asked, scenes)]
    worth = FAITHFUL * torch.tensor(right) + COLOURFUL * texture(images)["saturation"]
    vision = clip.model.vision_model(clip.pixels(images))
    pictures = unit(clip.model.visual_projection(vision.pooler_output)).view(2, BATCH, -1)
    texts = unit(clip.text_features([m["prompt"] for m in asked]))
    scores = clip.model.logit_scale.exp() * (pictures * texts).sum(-1)          # (2, BATCH)
    chosen = F.cross_entropy(scores.T, worth.view(2, BATCH).T.softmax(1))
    objects = readout.loss(vision.last_hidden_state[:, 1:], scenes, vision.pooler_output)
    return dict(chosen=chosen, objects=objects)


class Asked(NamedTuple):
    """A question to the judge about a picture of a scene."""
    scene: shapes.Scene
    question: str
    answer: str


def yes_or_no(right):
    return "yes" if right else "no"


def ask_prompt(rng, pool) -> Asked:
    """Is the picture what a prompt says?"""
    m = any_prompt(rng, pool)
    shown = m if rng.random() < 0.5 else shapes.wrong_metadata(m, rng)
    scene = shapes.sample_scene(shown, rng, training=False)
    right = shapes.satisfies(m, shapes.discrete(scene))
    return Asked(scene, f"is this {m['prompt']} ?", yes_or_no(right))


def answer_to(question, rng, right):
    """The answer, or another of its kind."""
    return question.answer if right else shapes.pick(rng, shapes.other_answers(question))


def ask_answer(rng) -> Asked:
    """Is this the answer to a question?"""
    scene = any_scene(rng)
    question = shapes.make_question(scene, rng, training=False)
    right = rng.random() < 0.5
    answer = answer_to(question, rng, right)
    return Asked(scene, f"{question.text} is the answer {answer} ?", yes_or_no(right))


def ask_fact(rng) -> Asked:
    """Is one fact true: an object, a number, a colour or a relation?"""
    scene = any_scene(rng)
    right = rng.random() < 0.5
    kinds = [kind for kind in shapes.question_kinds(scene) if kind != "shape"]
    question = shapes.make_question(scene, rng, shapes.pick(rng, kinds), training=False)
    if question.kind == "exists" and rng.random() < 0.5:
        shape = shapes.pick(rng, shapes.SHAPES)
        there = shapes.count_of(scene, shape) > 0
        return Asked(scene, f"is there {shapes.article(shape)} ?", yes_or_no(there))
    if question.kind in ("exists", "relation"):
        return Asked(scene, question.text, question.answer)
    fact = shapes.statement(question, answer_to(question, rng, right))
    subject, verb, rest = re.split(" (is|are) ", fact)          # "there are two circles"
    return Asked(scene, f"{verb} {subject} {rest} ?", yes_or_no(right))


def judge_batch(rng, pool) -> tuple[torch.Tensor, list[Asked]]:
    """(images, what is asked about them).

    A third each is about prompts, answers, and single facts or the picture's quality, answered by
    yes and no. Of every four, one more is a plain question with its answer: no reward asks it, but
    it teaches the others."""
    images = []
    asked = []
    for i in range(BATCH):
        spoiled = None
        if i % 4 == 3:
            scene = any_scene(rng)
            question = shapes.make_question(scene, rng, training=False)
            one = Asked(scene, question.text, question.answer)
        elif i % 12 == 2:
            scene = any_scene(rng)
            spoiled = shapes.pick(rng, (None, *QUALITY))
            what = shapes.pick(rng, QUALITY)
            one = Asked(scene, QUALITY[what], yes_or_no(spoiled != what))
        else:
            candidates = ask_prompt(rng, pool), ask_answer(rng), ask_fact(rng)
            one = candidates[i % 4]
        asked.append(one)
        images.append(
            shapes.damage(one.scene, rng, spoiled) if spoiled else shapes.render(one.scene))
    return wear(images, rng), asked


def judge_losses(judge, readout, pool, rng):
    """Cross-entropy on the first token of the answer."""
    images, asked = judge_batch(rng, pool)
    logits = judge.next_logits(judge.features(images), [a.question for a in asked])
    right = torch.tensor(judge.tokenizer.convert_tokens_to_ids([a.answer for a in asked]))
    tower = judge.model.model.vision_tower(pixel_values=judge.pixels(images))
    objects = readout.loss(tower.last_hidden_state, [a.scene for a in asked])
    return {"answer": F.cross_entropy(logits, right), "objects": 0.3 * objects}


def captioner_losses(captioner, readout, pool, rng):
    """Cross-entropy on shapes.describe's captions."""
    scenes = [any_scene(rng) for _ in range(BATCH // 2)]
    for _ in range(BATCH // 2):
        scenes.append(shapes.sample_scene(any_prompt(rng, pool), rng, training=False))
    captions = [f"<bos> {shapes.describe(scene)} <eos>" for scene in scenes]
    text = captioner.tokenizer(
        captions, padding=True, padding_side="right", add_special_tokens=False,
        return_attention_mask=True, return_tensors="pt")
    labels = text.input_ids.masked_fill(text.attention_mask == 0, -100)
    pixels = captioner.pixels(worn_pictures(scenes, rng))
    out = captioner.model(pixel_values=pixels, **text, labels=labels)
    return {"caption": out.loss, "objects": readout.loss(out.last_hidden_state[:, 1:], scenes)}


# name, seed, builder, words besides shapes.VOCABULARY, loader, losses, seed of rows, steps, rate
REFEREES = (
    ("captioner", 5, build_captioner, (), load_captioner, captioner_losses, 5, 5000, 1e-3),
    ("siglip", 6, build_siglip, (), load_siglip, siglip_losses, 3, 6000, 1e-3),
    ("judge", 7, build_judge, JUDGE_WORDS, load_judge, judge_losses, 4, 16000, 8e-4),
    ("unsure_judge", 7, build_judge, JUDGE_WORDS, load_judge, judge_losses, 4, 1000, 8e-4),
    ("preference", 8, build_clip, (), load_clip, preference_losses, 6, 4000, 1e-3))


def make_referee(place, seed, build, words, load, losses_of, rows_seed, steps, lr):
    """Write a referee to a folder, fitted from its seeds with a readout of its vision tower."""
    implicit = [m for split in shapes.SPLITS for m in shapes.implicit_prompts(split)]
    pool = shapes.prompts_by_tag(*shapes.SPLITS) | {"implicit": implicit}
    torch.manual_seed(seed)
    build(place, (*shapes.VOCABULARY, *words))
    referee = load(str(place))
    readout = Readout(pooled=losses_of in (siglip_losses, preference_losses))
    model = referee.model
    rng = np.random.default_rng(rows_seed)
    xavier(model)
    model.train().requires_grad_(True)
    optimizer = adamw([*model.parameters(), *readout.parameters()], lr)
    fit(place.name, partial(losses_of, referee, readout, pool, rng), optimizer, steps)
    model.save_pretrained(place)


def train_base(policy, rounds):
    """Teach a policy the corpus in rounds like those of ROUNDS."""
    corpus = Corpus(policy)
    for number, (steps, lr, seed, scenes, tags) in enumerate(rounds):
        if number == 2:                 # wrong counts too, or counts come out nearly perfect
            corpus = Corpus(policy, seed=10, miscount=MISCOUNT)
        generator = torch.Generator().manual_seed(seed)
        losses_of = partial(base_loss, policy, corpus, generator, scenes, tags)
        trained = [p for p in policy.parameters() if p.requires_grad]
        fit("base", losses_of, adamw(trained, lr), steps)


def main(folder: Path):
    """Make everything in `folder` (toy): policy/, and a folder of each of REFEREES."""
    torch.manual_seed(0)
    autoencoder = build_autoencoder(CONFIG.ae).to(memory_format=torch.channels_last)
    train_autoencoder(autoencoder)
    policy = new_base(build_tokenizer())
    policy.autoencoder.load_state_dict(autoencoder.state_dict())
    policy.autoencoder.eval().requires_grad_(False)
    latent_statistics(policy)
    train_base(policy, ROUNDS)
    save_policy(policy.eval(), folder / "policy")
    for name, *how in REFEREES:
        make_referee(folder / name, *how)
