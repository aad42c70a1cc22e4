"""What each method sets, and every setting with its help and bounds.

A run's settings come from Config's defaults, the scale, the recipe and its part for the scale, and
the flags, of which the later wins. `python train.py recipes` prints the table.
"""

import argparse
import os
import textwrap
from dataclasses import dataclass, field, fields
from pathlib import Path

from flow_grpo import FORMS
from policy import PolicyConfig
from rewards import REWARDS
from support.disk import read_json
from support.tables import markdown_table
from support.terminal import Arguments, number
from tasks import TASKS, Task, in_use, rewards_of

WORLD = Path(__file__).parent / "toy"

# What each method sets, at all scales or (toy=, bagel=, ...) at one; the rest is the scale's or
# Config's default. Each value is (value, source): "p" if value and mechanism are the paper's; "o"
# ours, if the paper's is not known; "d" departs, and names the paper's value or mechanism.
# docs/recipes.md lists what departs without a setting; tests/paper_values.json says where each "p"
# stands.

# What the recipes of one paper share.
UNIFPO = dict(
    accuracy=(1.0, "d: none"), text_average=("sequence", "p"), epochs=(2, "p"),
    toy_janus=dict(ins=(1.0, "d: a preference model")),
    janus=dict(pref=(1.0, "d: its own, not released"), guidance=(1.0, "p")),
    bagel=dict(pref=(1.0, "d: its own, not released")))
UNIGRPO = UNIFPO | dict(
    image_loss=("ratio_norm", "p"),
    step_weights=("dt", "d: none in Eq. 6"),
    # Eq. 8 with 1.5e-5 as a sum over the 65,536 entries of a latent at 512 pixels is 0.98 on
    # their mean. As a weight on the mean, 1.5e-5 would hold nothing.
    bagel=dict(pref=(1.0, "d: its own, not released"), mse_weight=(0.98, "d: 1.5e-5, mean or sum")),
)
UNIGRPO_TOY = dict(
    ins=(1.0, "d: a preference model"), lr_understanding=(5e-5, "d: 1e-6"))
UNIGRPO_CLIP = (1e-3, "d: 1e-6, for more entries")
FPO_CLIP = 0.05                                 # FPO's own, of a ratio of other size
ALPHAGRPO = dict(
    dvreward=(1.0, "d: Qwen3-VL-30B, each question alone"),
    advantage=("batch", "p"),
    text_ratio=("sequence", "p"),
    text_average=("sequence", "p"),
    text_clip=(0.2, "p"),
    text_clip_high=(0.28, "p"),
)
ALPHAGRPO_BAGEL = dict(
    group_size=(14, "p"), lr_understanding=(5e-5, "p"), lr_generation=(5e-5, "p"), lora=(32, "p"),
    guidance=(4.0, "p"), noise_level=(0.7, "p"), image_clip=(1e-5, "p"), think_tokens=(1024, "p"),
    weight_decay=(1e-4, "p"))
CORL_IMAGES = dict(
    recaption=(1.0, "d: SPICE"),
    tim=(1.0, "d: states of the moving policy"),
    advantage=("unbiased", "p"),
    image_weight=(300.0, "d: 1"),
    step_weights=("dt", "d: none"),
)
# CoRL trains the language model alone, all of it, and draws with guidance 5.
CORL_JANUS = dict(
    guidance=(5.0, "p"), guidance_in=("both", "d: sampling"), image_weight=(1.0, "p"),
    likeness=(1.0, "p"), lora=(0, "p"), lr_generation=(0.0, "p"))
CORL_TOY_JANUS = dict(
    guidance=(1.0, "d: 5"), image_weight=(1.0, "p"), likeness=(1.0, "d: LPIPS"),
    grad_clip=(20.0, "o"), lr_generation=(0.0, "p"))
CORL_QUESTIONS_TOY = dict(lr_understanding=(1e-4, "d: 1e-6"), steps=(75, "d: 1 epoch"))
CORL_QUESTIONS = dict(
    format=(1.0, "p"), group_size=(16, "p"), advantage=("unbiased", "p"),
    text_average=("sequence", "p"), text_beta=(0.02, "p"), toy=CORL_QUESTIONS_TOY,
    toy_janus=CORL_QUESTIONS_TOY,
    bagel=dict(think_tokens=(512, "p"), lr_understanding=(1e-6, "d: 1e-6, all weights")),
    janus=dict(
        think_tokens=(512, "p"), lora=(0, "p"), lr_understanding=(1e-6, "p"),
        lr_generation=(0.0, "p")))

RECIPES = {
    "lvrpo": dict(
        draw=(24, "o"),
        think=(8, "o"),
        ask=(16, "o"),
        edit=(8, "o"),
        sem=(1.0, "o"),
        accuracy=(1.0, "o"),
        kn=(1.0, "d: PaLI-3, by reviews"),
        text_beta=(0.02, "o"),
        # How an image gets its likelihood is not published. On the toy DiffusionNFT learns faster
        # than FlowGRPO, at one update a batch.
        toy=dict(
            ins=(3.0, "d: binary rules, by reviews"), image_loss=("nft", "o"),
            old_decay=(0.7, "o"), image_weight=(60.0, "o"), lr_generation=(1.5e-3, "o"),
            grad_clip=(200.0, "o"), steps=(200, "o"), eval_every=(100, "o")),
        # Janus-Pro cannot edit. Without a penalty the toy's pictures of a prompt become alike.
        toy_janus=dict(
            ins=(3.0, "d: binary rules, by reviews"), edit=(0, "o"), image_beta=(0.02, "o"),
            grad_clip=(20.0, "o")),
        janus=dict(ins=(0.0, "d: binary rules, by reviews"), edit=(0, "o")),
        # With a weight, plain prompts would be refused: r_ins reads GenEval's fields in every row.
        bagel=dict(
            ins=(0.0, "d: binary rules, by reviews"), image_beta=(0.003, "o"),
            step_weights=("dt", "o"), epochs=(2, "o"), image_weight=(300.0, "o")),
    ),
    "unigrpo": dict(
        **UNIGRPO,
        think=(32, "p"),
        # Nothing but the picture's truth holds the toy's thoughts, so the understanding expert
        # learns four times slower than under lvrpo.
        toy=dict(
            **UNIGRPO_TOY, image_clip=UNIGRPO_CLIP, mse_weight=(5e-5, "d: 1.5e-5, mean or sum"),
            steps=(125, "o")),
    ),
    # Its baseline, of which its Table 1 says that it collapses.
    "unifpo": dict(
        **UNIFPO,
        think=(32, "p"),
        image_loss=("fpo", "p"),
        image_clip=(FPO_CLIP, "o"),
        toy=dict(**UNIGRPO_TOY, steps=(125, "o")),
    ),
    "unigrpo_rounds": dict(
        **UNIGRPO,
        rounds=(16, "o"),
        credit=("gain", "o"),
        # Two images are a noisier signal than one: at unigrpo's rate and penalty the toy drifted and
        # forgot, with credit "last"; with "gain" neither was searched.
        toy=dict(
            **UNIGRPO_TOY, image_clip=UNIGRPO_CLIP, mse_weight=(2e-4, "d: 1.5e-5, mean or sum"),
            lr_generation=(2e-4, "d: 3e-5")),
    ),
    "alphagrpo": dict(
        **ALPHAGRPO,
        think=(32, "p"),
        format=(1.0, "d: closed at the very end"),
        toy=dict(
            image_weight=(300.0, "d: 1, text : image 1 : 1"), step_weights=("dt", "d: none"),
            grad_clip=(20.0, "d: 1"), lr_generation=(3e-4, "d: 5e-5")),
        # The 16 and 40 steps of its code are points of the grid, 15 and 39 calls of the velocity.
        bagel=dict(
            **ALPHAGRPO_BAGEL, denoise_steps=(15, "p"), window=(10, "p"), window_high=(11, "p"),
            micro=(2, "o"), rollout_batch=(96, "o")),
    ),
    "alphagrpo_reflect": dict(
        **ALPHAGRPO,
        reflect=(32, "p"),
        rectify=("group", "p"),
        text_weight=(0.2, "p"),
        # Without a penalty the toy forgets to leave the rest of a picture as it is, and without
        # permission to stop it learns to find fault with every picture.
        toy=dict(
            stop=(0.25, "d: none"), initial=(2, "d: 7"),
            image_weight=(300.0, "d: 1, text : image 1 : 5"), image_beta=(0.003, "d: 0"),
            step_weights=("dt", "d: none"), lr_understanding=(4e-4, "d: 5e-5"),
            lr_generation=(2e-4, "d: 5e-5")),
        bagel=dict(
            **ALPHAGRPO_BAGEL, initial=(7, "p"), denoise_steps=(39, "p"), window=(5, "p"),
            window_high=(15, "p")),
    ),
    # Stage 1 of CoRL, then its three refined policies, each from what stage 1 wrote (--policy
    # out/corl/policy). Its images are VQ tokens of Janus-Pro, as at the two scales of Janus; at the
    # others they are flow steps.
    "corl": dict(
        **CORL_IMAGES,
        pair=("joint", "p"),
        accuracy=(1.0, "p"),
        format=(1.0, "p"),
        group_size=(8, "p"),
        text_average=("sequence", "p"),
        # Without a penalty, as in the paper, the toy's pictures collapse at lvrpo's rate and number
        # of steps.
        toy=dict(
            pair_image=(48, "d: 16, of VQ tokens"), pair_text=(48, "d: 16"),
            likeness=(1.0, "d: LPIPS"), grad_clip=(20.0, "o"), lr_generation=(2.5e-4, "d: 4e-6")),
        bagel=dict(
            pair_image=(16, "d: 16, of VQ tokens"), pair_text=(16, "p"), likeness=(1.0, "p"),
            think_tokens=(512, "p"), lr_understanding=(4e-6, "d: 4e-6, all weights"),
            lr_generation=(4e-6, "d: 4e-6, all weights")),
        # After 50 steps the toy's pictures become alike, and their truth falls.
        toy_janus=dict(
            **CORL_TOY_JANUS, pair_image=(48, "d: 16"), pair_text=(48, "d: 16"),
            lr_understanding=(2e-4, "d: 4e-6"), steps=(50, "d: 1 epoch")),
        janus=dict(
            **CORL_JANUS, pair_image=(16, "p"), pair_text=(16, "p"), think_tokens=(512, "p"),
            lr_understanding=(4e-6, "p")),
    ),
    "corl_t2i": dict(
        **CORL_IMAGES,
        group_size=(16, "p"),
        image_beta=(0.003, "d: k3, 0.02"),
        toy=dict(
            pair_image=(24, "d: 16, of VQ tokens"), likeness=(1.0, "d: LPIPS"),
            lr_generation=(1.2e-4, "d: 1e-6"), steps=(75, "d: 1 epoch")),
        bagel=dict(
            pair_image=(16, "d: 16, of VQ tokens"), likeness=(1.0, "p"),
            lr_understanding=(1e-6, "d: 1e-6, all weights"),
            lr_generation=(1e-6, "d: 1e-6, all weights")),
        toy_janus=dict(
            **CORL_TOY_JANUS, pair_image=(24, "d: 16"), image_beta=(0.02, "p"),
            lr_understanding=(1e-4, "d: 1e-6"), steps=(75, "d: 1 epoch")),
        janus=dict(
            **CORL_JANUS, pair_image=(16, "p"), image_beta=(0.02, "p"),
            lr_understanding=(1e-6, "p")),
    ),
    "corl_mc": dict(**CORL_QUESTIONS, choose=(32, "p"), accuracy=(1.0, "p")),
    "corl_oe": dict(**CORL_QUESTIONS, reason=(32, "p"), accuracy=(1.0, "d: its code grades")),
}

TOYS = dict(
    group_size=16, steps=100, lr_understanding=2e-4, resolution=32, think_tokens=24,
    answer_tokens=4)
RELEASED = dict(
    bf16=True, checkpointing=True, save_every=5,        # a step takes minutes
    steps=1000, lr_understanding=1e-6, think_tokens=256, answer_tokens=256, lora=64, micro=4,
    # The toy's referees are not for photographs, nor its rule for free captions.
    siglip="google/siglip2-so400m-patch14-384", judge="google/paligemma2-3b-mix-448",
    captioner="Salesforce/blip-image-captioning-base", pref_model="yuvalkirstain/PickScore_v1",
    detector="google/owlv2-base-patch16-ensemble")

# What depends on size. The toys' values are ours, measured. BAGEL's are UniGRPO's Table 3, if it
# has them, but for the resolution.
SCALES = {
    "toy": dict(
        **TOYS, lr_generation=5e-4, image_clip=1e-3, denoise_steps=6, noise_level=0.8,
        sampler="cps", window=3, window_high=3, shared_noise=True),
    "toy_janus": dict(**TOYS, lr_generation=0.0, image_clip=0.2),
    "janus": dict(
        **RELEASED, group_size=8, lr_generation=1e-6, image_clip=0.2, guidance=5.0, resolution=384,
        rollout_batch=16),
    "bagel": dict(
        **RELEASED, group_size=24, lr_generation=3e-5, image_clip=1e-6, denoise_steps=25,
        noise_level=0.8, sampler="sde", window=3, window_high=5, resolution=512, rollout_batch=24),
}
TOKEN_SCALES = ("toy_janus", "janus")           # whose policies draw token by token

# What is set of noisy steps, as a matching loss has it.
NOISELESS = dict(
    shared_noise=False, step_weights="none", image_beta=0.0, noise_level=0.0, sampler="sde",
    window_high=0)
# What is set of flow steps, as image tokens have it.
FLOWLESS = dict(
    image_loss="token", old_decay=0.0, mse_weight=0.0, step_weights="none", denoise_steps=0,
    noise_level=0.0, sampler="sde", window=0, window_high=0, shared_noise=False)


def setting(
    default, help: str, least: float | None = 0, above: float | None = None, choices: tuple = ()
):
    """A field of Config: its default, what --help says, and its bounds.

    Numbers go from 0 up unless something else is said.
    """
    return field(
        default=default,
        metadata=dict(help=help, least=least, above=above, choices=choices),
    )


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on; `python train.py --help` explains each setting.

    Numbers of rows are global: ranks share them. The control (more pretraining) reads what is
    trained and how it is kept; the other settings must be valid and do nothing.
    """

    recipe: str
    rows: dict[str, int]                        # task -> rows a step, a flag each
    weights: dict[str, float]                   # reward -> weight, a flag each
    policy: str = setting(str(WORLD / "policy"), "the policy folder to start from")
    prompts: str = setting(
        "",
        "prompts: .jsonl with \"prompt\", GenEval's fields, questions; or .txt; without any "
        "file: the toy world",
    )
    questions: str = setting(
        "",
        "questions: .jsonl with \"image\" (a path), \"question\", \"answer\", \"options\", "
        "\"caption\" (pairs)",
    )
    edits: str = setting(
        "",
        "edits: .jsonl with \"image\", \"instruction\", and perhaps \"caption\", GenEval's "
        "fields, questions",
    )
    siglip: str = setting(
        str(WORLD / "siglip"),
        "SigLIP of r_sem and r_dense: a folder or hub name, or open_clip's (hf-hub:...)")
    judge: str = setting(
        str(WORLD / "judge"), "yes/no judge of r_kn and DVReward: a folder or hub name")
    captioner: str = setting(
        str(WORLD / "captioner"),
        "BLIP captioner of --recaption: a folder or hub name; CoRL's cycle compares with the "
        "toy's by rule and SSIM, with others by BERTScore and LPIPS")
    pref_model: str = setting(
        str(WORLD / "preference"), "PickScore or HPSv2 for --pref: a folder or hub name")
    detector: str = setting(
        "", "OWLv2, the detector of r_ins in pictures of files: a folder or hub name")
    out: str = setting("out", "folder of the log, the checkpoint, pictures and the trained policy")
    resume: bool = setting(False, "go on from the checkpoint in --out")
    seed: int = setting(0, "seed of everything random")
    steps: int = setting(0, "optimisation steps, each on one batch of rollouts")
    eval_every: int = setting(50, "steps between evaluations; 0: none, and no pictures")
    save_every: int = setting(50, "steps between checkpoints; 0: only at the end")
    group_size: int = setting(0, "G, samples per prompt", least=2)
    micro: int = setting(0, "samples per micro-batch of an update; 0: all at once")
    rollout_batch: int = setting(0, "samples drawn at once, in whole groups; 0: all")
    train_referee: float = setting(
        0.0,
        "AdamW's rate for a SigLIP that learns from the policy's pictures and prompts; 0: frozen "
        "[LVRPO Fig. 4]",
    )
    dv_by: str = setting(
        "geometric",
        "how DVReward adds answers up: as they are, rounded, or one question about the whole "
        "prompt",
        choices=("geometric", "binary", "holistic"),
    )
    initial: int = setting(
        1,
        "first pictures per prompt of --reflect, of which the lowest in reward is refined; see "
        "--stop",
        least=1)
    rectify: str = setting(
        "off",
        "reward of a refinement that is no better than its first picture: its own, the group's "
        "least, or the first picture's [AlphaGRPO's code]",
        choices=("off", "group", "initial"),
    )
    credit: str = setting(
        "last",
        "what the pictures of two rounds, and the thoughts before them, earn: what the last is "
        "worth, or each its own gain over the one before [R3]",
        choices=("last", "gain"),
    )
    stop: float = setting(
        0.0,
        "above 0, a diagnosis that nothing needs to change keeps the picture [R3], and with "
        "--initial above 1 this share of --reflect refines the best first picture, not the lowest")
    pair: str = setting(
        "none",
        "what the two halves of a pair share: the advantage of the summed reward, the sum of "
        "both advantages, or nothing",
        choices=("joint", "sum", "none"),
    )
    alternate: bool = setting(False, "one task a step, in turns")
    normalise: str = setting(
        "sum",
        "add rewards, then normalise [LVRPO]; or normalise each, then add [with --advantage "
        "batch GDPO, TRL's normalize_then_sum]",
        choices=("sum", "each"),
    )
    advantage: str = setting(
        "group",
        "whose std divides the centred reward: the group's, with divisor n (GRPO) or n - 1 "
        "(TRL, CoRL); the batch's, then at most 5 in size (AlphaGRPO); none (Dr. GRPO)",
        choices=("group", "unbiased", "batch", "none"),
    )
    text_average: str = setting(
        "token",
        "what counts alike in the text loss: the step's tokens (DAPO), its texts (GRPO), or "
        "tokens over N * longest (Dr. GRPO)",
        choices=("token", "sequence", "constant"),
    )
    text_ratio: str = setting(
        "token", "one importance ratio per token, or per text (GSPO)", choices=("token", "sequence")
    )
    text_clip: float = setting(0.2, "clip range of the text ratio, below 1")
    text_clip_high: float = setting(0.0, "clip range above 1 (DAPO: 0.28); 0: as --text_clip")
    text_beta: float = setting(0.0, "weight of the k3 estimate of the text's KL to the reference")
    text_weight: float = setting(1.0, "weight of the text loss")
    image_weight: float = setting(
        1.0, "weight of the image loss, its penalties included [UniGRPO Eq. 7: lambda]")
    image_loss: str = setting(
        "grpo",
        "FlowGRPO, or with RatioNorm [GRPO-Guard, UniGRPO Eq. 5]; or a matching loss of pictures "
        "of the plain ODE: DiffusionNFT, AWM, FPO; image tokens have GRPO's text loss alone",
        choices=("grpo", "ratio_norm", *FORMS, "token"),
    )
    old_decay: float = setting(
        0.0,
        "decay of the average of weights that is a matching loss's old policy; 0: it is the "
        "policy that sampled",
    )
    image_clip: float = setting(
        0.0, "clip range of a noisy step's or an image token's ratio, or of fpo's")
    image_beta: float = setting(
        0.0, "weight of the transition KL to the reference, or of k3 of image tokens")
    mse_weight: float = setting(0.0, "weight of |v - v_ref|^2, a mean over entries [UniGRPO Eq. 8]")
    step_weights: str = setting(
        "none",
        "weigh noisy steps by 1/|dt| [GRPO-Guard], or so that their gradients on the velocity are "
        "of one size",
        choices=("none", "dt", "flat"),
    )
    epochs: int = setting(1, "optimiser steps per batch", least=1)
    guidance: float = setting(1.0, "scale of text guidance in drawing; 1: none", least=1)
    guidance_in: str = setting(
        "both",
        "whether image tokens that were drawn with guidance are scored with it, or without [CoRL]",
        choices=("both", "sampling"),
    )
    denoise_steps: int = setting(0, "K, calls of the velocity per image", least=1)
    noise_level: float = setting(0.0, "size of the noise in noisy steps", above=0)
    sampler: str = setting("sde", "noise of Flow-GRPO or Flow-CPS", choices=("sde", "cps"))
    window: int = setting(
        0, "W, noisy steps per image, in one run before --window_high; or a matching loss's times",
        least=1)
    window_high: int = setting(0, "the step before which the noise ends")
    shared_noise: bool = setting(False, "one initial noise per group")
    resolution: int = setting(0, "pixels per side", least=1)
    think_tokens: int = setting(0, "most tokens of a thought", least=1)
    answer_tokens: int = setting(0, "most tokens of an answer", least=1)
    lora: int = setting(
        0,
        "rank of adapters, with which the policy is its own reference; 0: all weights, against a "
        "frozen copy",
    )
    shard: bool = setting(False, "FSDP2: cut weights, gradients and optimiser over the ranks")
    bf16: bool = setting(False, "compute in bf16; what is trained stays in fp32")
    checkpointing: bool = setting(
        False, "compute activations again in the backward pass, block by block")
    lr_understanding: float = setting(0.0, "AdamW's rate for the understanding expert; 0: frozen")
    lr_generation: float = setting(0.0, "AdamW's rate for the generation expert; 0: frozen")
    weight_decay: float = setting(0.0, "AdamW's weight decay")
    grad_clip: float = setting(1.0, "largest norm of the gradient", above=0)
    ema: float = setting(0.95, "decay of the average of weights that is evaluated and exported")

    @property
    def cycles_by_rule(self) -> bool:
        """Whether CoRL's cycle compares captions by rule and images by SSIM."""
        return Path(self.captioner).resolve() == (WORLD / "captioner").resolve()

    @property
    def matches(self) -> bool:
        """Whether images learn by a matching loss."""
        return self.image_loss in FORMS

    def penalises(self, texts: bool, images: bool) -> bool:
        """Whether a penalty compares these segments with the frozen policy."""
        of_images = images and (self.image_beta > 0 or self.mse_weight > 0)
        return of_images or (texts and self.text_beta > 0)

    @property
    def needs_reference(self) -> bool:
        """Whether a penalty or token matching reads the frozen policy."""
        penalised = self.recipe != "control" and self.penalises(texts=True, images=True)
        return penalised or bool(self.weights.get("tim"))

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts that are trained: those with a rate."""
        rates = dict(understanding=self.lr_understanding, generation=self.lr_generation)
        return tuple(name for name, rate in rates.items() if rate)


SETTINGS = fields(Config)[3:]                   # those with a flag of their own


# ---- the command line ----


def settings_of(recipe: str, scale: str) -> dict[str, tuple]:
    """What a recipe sets at a scale, name -> (value, source); its part for the scale wins.

    The control has lvrpo's tasks, at the scale's own rates.
    """
    column = RECIPES.get(recipe, RECIPES["lvrpo"] | {"toy": {}})
    both = {name: pair for name, pair in column.items() if name not in SCALES}
    settings = both | column.get(scale, {})
    if scale in TOKEN_SCALES:                   # which have no flow steps to set
        settings = {name: pair for name, pair in settings.items() if name not in FLOWLESS}
    return settings


def scale_of(folder: Path) -> str:
    """The column of SCALES that fits a policy folder, by its kind and its width."""
    config = read_json(folder / "config.json", {})
    if config.get("model_type") in ("janus", "multi_modality"):         # its two layouts
        text = config.get("text_config") or config["language_config"]
        width = text.get("hidden_size", 4096)   # Llama's own, which a file may leave out
        return "janus" if width >= 1024 else "toy_janus"
    sizes = read_json(folder / "llm_config.json", {"hidden_size": 0})
    return PolicyConfig(sizes, {}).scale


def argument_parser() -> Arguments:
    """One flag per task (rows a step), reward (weight) and setting."""
    ap = Arguments(
        description="GRPO for one policy that reads and writes text and images.",
        usage="%(prog)s [--FLAG VALUE ...]", argument_default=argparse.SUPPRESS)
    ap.add_argument(
        "--recipe", default="lvrpo", choices=[*RECIPES, "control", "pretrain"],
        help="a method; or control, more pretraining; or pretrain, which makes the toy's weights")
    for name, task in TASKS.items():            # dest: argparse would turn - into _
        ap.add_argument(f"--{name}", dest=name, type=number(int, least=0), help=task.help)
    for name, entry in REWARDS.items():
        ap.add_argument(
            f"--{name}", dest=name, type=number(float), help=f"weight of {entry.help}")
    for f in SETTINGS:
        bounds = f.metadata
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif f.type is str:
            how = dict(choices=bounds["choices"] or None)
        else:
            how = dict(type=number(f.type, bounds["least"], bounds["above"]))
        ap.add_argument(f"--{f.name}", help=bounds["help"], **how)
    return ap


def parse(argv: list[str] | None = None, scale: str = "") -> Config:
    """Command line -> Config. Later wins: Config's default, the scale, the recipe, the flag.
    Unknown names are refused. scale: by default what fits --policy.
    """
    given = vars(argument_parser().parse_args(argv))            # what is not given has no entry
    if given["recipe"] == "pretrain":
        given.setdefault("out", str(WORLD))
    scale = scale or scale_of(Path(given.get("policy", Config.policy)))
    chosen = dict(SCALES[scale])
    for name, (value, _) in settings_of(given["recipe"], scale).items():
        chosen[name] = value
    if any(given.get(task.file) for task in TASKS.values()):
        # A task without a file is left out by default.
        chosen |= {name: 0 for name, task in TASKS.items() if not given.get(task.file)}
    refuse(
        scale in TOKEN_SCALES and given["recipe"] == "unifpo",
        "--recipe unifpo is of flow steps, and this policy draws token by token; see unigrpo")
    if scale in TOKEN_SCALES:                   # go without what a recipe sets for flow steps
        chosen |= FLOWLESS
    # A matching loss goes without what a recipe sets for noisy steps, and the reverse.
    loss = given.get("image_loss", chosen.get("image_loss"))
    refuse(
        (scale in TOKEN_SCALES) != (loss == "token"),
        f"--image_loss {loss or 'grpo'} does not fit a policy of scale {scale}: image tokens have "
        "token, and nothing else has it; leave it out")
    chosen |= NOISELESS if loss in FORMS else dict(old_decay=0.0)
    if loss == "fpo":
        chosen["image_clip"] = FPO_CLIP
    chosen |= given
    rows = {name: chosen.pop(name, 0) for name in TASKS}
    scoring = {reward for name, task in TASKS.items() if rows[name] for reward in rewards_of(task)}
    weights = {}
    for name in REWARDS:
        weight = chosen.pop(name, 0.0)
        weights[name] = weight if name in scoring or name in given else 0.0
    return Config(rows=rows, weights=weights, **chosen)


def describe(cfg: Config) -> str:
    """What a run does, in a few lines: every setting that is not Config's default."""
    default = {f.name: f.default for f in SETTINGS}
    flat = cfg.rows | cfg.weights | {f.name: getattr(cfg, f.name) for f in SETTINGS}
    words = [f"{name}={value}" for name, value in flat.items() if value != default.get(name, 0)]
    text = f"{cfg.recipe}: {' '.join(words)}"
    return textwrap.fill(
        text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def recipe_table(scale: str) -> str:
    """The recipes side by side at a scale, in markdown.

    A row per switch that several set, and one of what each sets alone.
    """
    columns = {recipe: settings_of(recipe, scale) for recipe in RECIPES}
    order = [*TASKS, *REWARDS, *(f.name for f in SETTINGS)]
    names = sorted({name for column in columns.values() for name in column}, key=order.index)
    rows = []
    own = {recipe: [] for recipe in RECIPES}
    for name in names:
        cells = {
            recipe: "{} ({})".format(*column[name])
            for recipe, column in columns.items()
            if name in column
        }
        if len(cells) > 1:
            rows.append([f"`{name}`", *(cells.get(recipe, "-") for recipe in RECIPES)])
            continue
        for recipe, cell in cells.items():
            own[recipe].append(f"`{name}` {cell}")
    rows.append(["alone", *(", ".join(cells) or "-" for cells in own.values())])
    return markdown_table(["switch", *RECIPES], rows)


# ---- what cannot work ----


def refuse(wrong, why: str) -> None:
    """ValueError, in one line, if something is wrong."""
    if wrong:
        raise ValueError(why)


def check(cfg: Config, world: int) -> None:
    """ValueError for settings that cannot work together on `world` ranks, before anything loads."""
    used = in_use(cfg)
    refuse(
        not used, "nothing to learn from: no task has rows; give one rows, such as --draw 16")
    for task in used:
        check_task(cfg, task, world)
    for name, weight in cfg.weights.items():
        scores = any(name in rewards_of(task) for task in used)
        reads = " or ".join(" and ".join(fields) for fields in REWARDS[name].reads)
        why = f"it reads {reads}, which no task of this run gives"
        refuse(weight and not scores, f"--{name} {weight} would score nothing: {why}")
    refining = any(task.refines for task in used)
    refuse(
        (cfg.rectify != "off" or cfg.initial > 1) and not refining,
        f"--rectify {cfg.rectify} --initial {cfg.initial} are for refinements, and no task of "
        "this run refines; see --reflect",
    )
    comparing = [task for task in used if task.before]
    gain = cfg.credit == "gain"
    refuse(
        gain and all(task.rounds == 1 for task in used),
        "--credit gain is for two rounds, and no task of this run has them; see --rounds")
    refuse(
        cfg.stop and not comparing,
        f"--stop {cfg.stop} is for pictures that are drawn again, and no task of this run does so; "
        "see --reflect and --rounds")
    refuse(cfg.stop > 1, f"--stop {cfg.stop}: must be a share, at most 1")
    check_image_loss(cfg)
    each = cfg.normalise == "each"
    refuse(
        each and (refining or gain),
        "--normalise each compares no picture with the one before; leave it out")
    refuse(
        each and cfg.advantage == "none",
        "--advantage none has no effect: --normalise each divides each reward by its group's std; "
        "leave one out",
    )
    refuse(
        cfg.train_referee and not (cfg.weights["sem"] or cfg.weights["dense"]),
        "--train_referee teaches the SigLIP, which no reward of this run asks; give --sem a weight")
    refuse(
        cfg.train_referee and (cfg.shard or cfg.bf16),
        "--train_referee trains a whole SigLIP in fp32 on every rank; leave out --shard, and give "
        "--no-bf16",
    )
    refuse(
        len({cfg.rows[task.name] for task in used if task.pair}) > 1,
        f"--pair_image {cfg.rows['pair_image']} and --pair_text {cfg.rows['pair_text']} are halves "
        "of the same rows; give both the same number, or set one to 0")
    refuse(
        cfg.shard and "RANK" not in os.environ,
        "--shard cuts the policy over ranks; start with torchrun")
    own = Path(cfg.out) / "policy"
    refuse(
        Path(cfg.policy).resolve() == own.resolve(),
        f"--policy {cfg.policy} is where this run would write its own policy; give another --out")
    for name, decay in dict(ema=cfg.ema, old_decay=cfg.old_decay).items():
        refuse(
            decay >= 1, f"--{name} {decay}: must be below 1, or the average would never move")


def check_task(cfg: Config, task: Task, world: int) -> None:
    """ValueError for a task without a reward, or whose prompts do not divide over the ranks."""
    count = cfg.rows[task.name]
    scoring = rewards_of(task)
    flag = f"--{task.name} {count}"
    rewarded = any(cfg.weights[name] for name in scoring) or cfg.recipe == "control"
    choice = ", ".join(f"--{name}" for name in scoring)
    refuse(not rewarded, f"{flag} has no reward: give one of {choice} a weight")
    less = count - count % world
    fitting = f"{less} or {less + world}" if less else f"{world}"
    refuse(count % world, f"{flag} prompts do not divide over {world} ranks; {fitting} would")
    refuse(
        not task.draws and not cfg.lr_understanding,
        f"{flag} rows teach the understanding expert, which --lr_understanding 0 freezes; set "
        f"--{task.name} 0",
    )


def check_image_loss(cfg: Config) -> None:
    """ValueError for settings of another image loss, or for noisy steps that do not fit."""
    tokens = cfg.image_loss == "token"
    refuse(
        cfg.guidance_in != "both" and not tokens,
        f"--guidance_in {cfg.guidance_in} is of image tokens, and {cfg.policy} draws by flow "
        "steps; leave it out")
    refuse(
        cfg.old_decay and not cfg.matches,
        f"--old_decay {cfg.old_decay} is of a matching loss; set --image_loss to one of "
        f"{', '.join(FORMS)}")
    refuse(
        cfg.step_weights == "flat" and cfg.image_loss == "ratio_norm",
        "--step_weights flat is for plain ratios: RatioNorm's gradients are of other sizes; set dt")
    if tokens:
        refuse_others(cfg, FLOWLESS, "flow steps")
    elif cfg.matches:
        refuse_others(cfg, NOISELESS, "noisy steps")
    else:
        check_window(cfg)


def refuse_others(cfg: Config, wanted: dict, what: str) -> None:
    """ValueError for a setting that is not as wanted, though the image loss has no `what`."""
    for name, value in wanted.items():
        given = getattr(cfg, name)
        refuse(
            given != value,
            f"--{name} {given} is of {what}, which --image_loss {cfg.image_loss} does not have; "
            "leave it out")


def check_window(cfg: Config) -> None:
    """ValueError for noisy steps that do not fit the grid."""
    cps = cfg.sampler == "cps"
    refuse(
        cps and cfg.noise_level >= 2,
        f"--noise_level {cfg.noise_level}: must be below 2 for cps, else std is 0")
    last = cfg.denoise_steps - 1 if cps else cfg.denoise_steps  # cps has no noise in its last step
    refuse(
        not cfg.window <= cfg.window_high <= last,
        f"--window {cfg.window} before --window_high {cfg.window_high} does not fit in {last} "
        "noisy steps",
    )
