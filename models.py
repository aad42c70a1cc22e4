"""What a run's rewards ask: each model loaded when it is first asked for, once for all rewards that share it, on the referees' device."""

import functools
from collections.abc import Callable

import torch

import preferences
import referees
from detectors import load_detector
from geneval import Instruction
from terminal import say


class Models:
    """What rewards.REWARDS builds its rewards from.

    cfg: a train.Config, for the folders or hub names of models and the settings of rewards; exact: the toy's detector, or None; ruled: the
    rows that r_ins will judge; states: of rewards.TokenMatch; questions: of rewards.Decomposed."""

    def __init__(self, cfg, device, exact=None, ruled=(), states=None, questions=None):
        self.cfg, self.exact, self.ruled, self.states, self.questions = cfg, exact, ruled, states, questions
        self.device = torch.device(cfg.referee_device or device)
        self.loading = dict(device=self.device, dtype=torch.bfloat16 if cfg.referee_bf16 else torch.float32, batch_size=cfg.referee_batch)

    @functools.cached_property
    def encoder(self) -> referees.Siglip | referees.OpenClip:
        if referees.is_open_clip(self.cfg.siglip):
            return referees.load_open_clip(self.cfg.siglip, device=self.device, batch_size=self.cfg.referee_batch)
        return referees.load_siglip(self.cfg.siglip, **self.loading)

    @property
    def patches(self) -> referees.Siglip:
        if isinstance(self.encoder, referees.OpenClip):
            raise ValueError(f"--dense reads patches, which open_clip's {self.cfg.siglip} does not give; use transformers' or --dense 0")
        return self.encoder

    @functools.cached_property
    def judge(self) -> referees.Judge:
        return referees.load_judge(self.cfg.judge, **self.loading)

    @functools.cached_property
    def preference(self):
        return preferences.load_preference(self.cfg.pref_model, self.cfg.pref_by, **self.loading)

    @functools.cached_property
    def captioner(self) -> referees.Captioner:
        return referees.load_captioner(self.cfg.captioner, **self.loading)

    @functools.cached_property
    def text_encoder(self) -> referees.TextEncoder | None:
        if self.cfg.recaption_by != "bertscore":
            return None
        return referees.load_text_encoder(self.cfg.text_encoder, layer=self.cfg.text_layer, **self.loading)

    @functools.cached_property
    def distance(self) -> Callable | None:
        return referees.load_lpips(device=self.device) if self.cfg.likeness_by == "lpips" else None

    @functools.cached_property
    def rules(self) -> Instruction:
        """r_ins: by the toy's exact detector, or by the published one that --detector names."""
        cfg = self.cfg
        if self.exact is not None:
            return Instruction(lambda images, metadata: self.exact(images), cfg.ins_by)
        if not cfg.detector:
            raise ValueError("--ins reads detections: name a --detector for pictures of files, such as google/owlv2-base-patch16-ensemble; "
                             "or set --ins 0 and use --sem, --kn or --dvreward")
        detector = load_detector(cfg.detector, cfg.colors, device=self.device, batch_size=min(cfg.referee_batch, 8))
        detector.check(self.ruled)
        say(f"ins: GenEval rules, detector {cfg.detector}, colours {cfg.colors}")
        return Instruction(detector, cfg.ins_by, detector.settings)
