"""What a run's rewards ask: each model loaded when it is first asked for, once for all rewards that share it, on the referees' device."""

import functools
from collections.abc import Callable

import torch

from referees.captioner import Captioner, TextEncoder, load_captioner, load_lpips, load_text_encoder
from referees.captions import tuple_f1
from referees.detectors import load_detector
from referees.geneval import all_of, flow_grpo_score, graded
from referees.judge import Judge, load_judge
from referees.load import numbers_in
from referees.preferences import load_preference
from referees.siglip import OpenClip, Siglip, is_open_clip, load_open_clip, load_siglip
from rewards import (Decomposed, Dense, Instruction, Knowledge, Likeness, Preference, Recaption,
    Semantic, SoftTifa, TokenMatch, answer_accuracy, soft_jaccard, think_format, token_f1)
from support.terminal import say


class Models:
    """What BUILD builds its rewards from.

    cfg: a train.Config, for the folders or hub names of models and the settings of rewards; exact: the toy's detector, or None; ruled: the
    rows that r_ins will judge; states: of TokenMatch; questions: of Decomposed."""

    def __init__(self, cfg, device, exact=None, ruled=(), states=None, questions=None):
        self.cfg, self.exact, self.ruled, self.states, self.questions = cfg, exact, ruled, states, questions
        self.device = torch.device(cfg.referee_device or device)
        self.loading = dict(device=self.device, dtype=torch.bfloat16 if cfg.referee_bf16 else torch.float32, batch_size=cfg.referee_batch)

    @functools.cached_property
    def encoder(self) -> Siglip | OpenClip:
        if is_open_clip(self.cfg.siglip):
            return load_open_clip(self.cfg.siglip, device=self.device, batch_size=self.cfg.referee_batch)
        return load_siglip(self.cfg.siglip, **self.loading)

    @property
    def patches(self) -> Siglip:
        if isinstance(self.encoder, OpenClip):
            raise ValueError(f"--dense reads patches, which open_clip's {self.cfg.siglip} does not give; use transformers' or --dense 0")
        return self.encoder

    @functools.cached_property
    def judge(self) -> Judge:
        return load_judge(self.cfg.judge, **self.loading)

    @functools.cached_property
    def preference(self):
        return load_preference(self.cfg.pref_model, self.cfg.pref_by, **self.loading)

    @functools.cached_property
    def captioner(self) -> Captioner:
        return load_captioner(self.cfg.captioner, **self.loading)

    @functools.cached_property
    def text_encoder(self) -> TextEncoder | None:
        if self.cfg.recaption_by != "bertscore":
            return None
        return load_text_encoder(self.cfg.text_encoder, layer=self.cfg.text_layer, **self.loading)

    @functools.cached_property
    def distance(self) -> Callable | None:
        return load_lpips(device=self.device) if self.cfg.likeness_by == "lpips" else None

    @functools.cached_property
    def rules(self) -> Instruction:
        """r_ins: by the toy's exact detector, or by the published one that --detector names."""
        cfg = self.cfg
        if self.exact is not None:
            return Instruction(lambda images, metadata: self.exact(images), WORTH[cfg.ins_by])
        if not cfg.detector:
            raise ValueError("--ins reads detections: name a --detector for pictures of files, such as google/owlv2-base-patch16-ensemble; "
                             "or set --ins 0 and use --sem, --kn or --dvreward")
        detector = load_detector(cfg.detector, cfg.colors, device=self.device, batch_size=min(cfg.referee_batch, 8))
        detector.check(self.ruled)
        say(f"ins: GenEval rules, detector {cfg.detector}, colours {cfg.colors}")
        return Instruction(detector, functools.partial(WORTH[cfg.ins_by], **detector.settings))

    @property
    def caption_score(self) -> Callable:
        """How a caption is held against its prompt, of --recaption_by."""
        how, encoder = self.cfg.recaption_by, self.text_encoder
        if how == "bertscore":
            return lambda prompts, captions: token_f1(*encoder.states(prompts), *encoder.states(captions)).clamp(0, 1)
        score_of = {"tuples": tuple_f1, "jaccard": soft_jaccard}[how]
        return lambda prompts, captions: torch.tensor([score_of(*pair) for pair in zip(prompts, captions)])


WORTH = {"all": all_of, "graded": graded, "flow_grpo": flow_grpo_score}

BUILD = {
    "sem": lambda m: Semantic(m.encoder), "kn": lambda m: Knowledge(m.judge), "dense": lambda m: Dense(m.patches),
    "ins": lambda m: m.rules,
    "accuracy": lambda m: functools.partial(answer_accuracy, graded=m.cfg.open_answers == "graded"),
    "format": lambda m: think_format, "recaption": lambda m: Recaption(m.captioner, m.caption_score),
    "likeness": lambda m: Likeness(m.cfg.likeness_by, m.distance),
    "dvreward": lambda m: Decomposed(m.judge, m.questions, m.cfg.dv_by),
    "tifa": lambda m: SoftTifa(m.judge, m.questions, m.cfg.tifa_by), "pref": lambda m: Preference(m.preference),
    "tim": lambda m: TokenMatch(m.states),
}

# The settings that name the models that a reward asks.
LOADS = {"sem": "siglip", "kn": "judge", "dense": "siglip", "ins": "detector colors", "recaption": "captioner", "dvreward": "judge",
         "tifa": "judge", "pref": "pref_model"}


def referee_bytes(cfg) -> float:
    """Bytes of the weights of referees that lie here; one that learns holds gradients and moments too."""
    learning = 12 * numbers_in(cfg.siglip) if cfg.train_referee else 0
    return (2 if cfg.referee_bf16 else 4) * sum(map(numbers_in, asked_models(cfg))) + learning


def asked_models(cfg) -> set[str]:
    """Folders or hub names of the models that a run's rewards ask."""
    names = {name for k, w in cfg.weights.items() if w for name in LOADS.get(k, "").split()}
    return {getattr(cfg, name) for name in names} - {""}
