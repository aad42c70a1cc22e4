"""Builds the rewards of a run, and loads the models that they ask."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from referees.captioner import TEXT_ENCODER, load_captioner, load_lpips, load_text_encoder
from referees.captions import tuple_similarity
from referees.detectors import COLOR_CLIP, load_detector
from referees.geneval import fraction_kept
from referees.judge import load_judge
from referees.load import folder_of, numbers_in, warn_of_cut
from referees.preferences import load_preference
from referees.siglip import OpenClip, is_open_clip, load_open_clip, load_siglip
from rewards import (
    Decomposed, Dense, Instruction, Knowledge, Likeness, Preference, Recaption, Reward, Semantic,
    TokenMatch, answer_accuracy, think_format)
from support.rows import Metadata
from support.terminal import say


def build_rewards(
    cfg, device, *, detector: Callable | None, rows: list[Metadata], states: Callable | None,
    questions: Callable, texts: Callable | None = None
) -> dict[str, Reward]:
    """Every reward with a weight in cfg.weights, by name; a model that two ask is loaded once.

    detector: the toy's exact one, images -> detections; None for pictures of files.
    rows: the metadata that r_ins will judge, which a published detector checks.
    states, questions: what TokenMatch and Decomposed are given.
    texts: a reward's name -> what it will read of the rows of files; texts too long for its model
    are said.
    Errors: OSError and ValueError, in one line, for models that cannot be loaded or are not named.
    """
    asked = weighted_rewards(cfg)
    batch_size = cfg.rollout_batch or 512
    loading = dict(device=device, batch_size=batch_size)        # fp32, as CLIP's size allows
    out = {}

    if "sem" in asked or "dense" in asked:
        load = load_open_clip if is_open_clip(cfg.siglip) else load_siglip
        encoder = load(cfg.siglip, **loading)
    if "sem" in asked:
        out["sem"] = Semantic(encoder)
    if "dense" in asked:
        if isinstance(encoder, OpenClip):
            raise ValueError(
                f"--dense reads patches, which open_clip's {cfg.siglip} does not give; use "
                "transformers' or --dense 0")
        out["dense"] = Dense(encoder)

    if "kn" in asked or "dvreward" in asked:
        dtype = torch.bfloat16 if cfg.bf16 else torch.float32
        judge = load_judge(cfg.judge, dtype=dtype, **loading)
    if "kn" in asked:
        out["kn"] = Knowledge(judge)
    if "dvreward" in asked:
        out["dvreward"] = Decomposed(judge, questions, cfg.dv_by)
        if cfg.dv_by == "holistic":             # AlphaGRPO's contrast: one question about it all
            out["dvreward"] = Knowledge(judge)

    if "ins" in asked and detector:
        out["ins"] = Instruction(lambda images, metadata: detector(images), fraction_kept)
    elif "ins" in asked:
        if not cfg.detector:
            raise ValueError(
                "--ins reads detections: name a --detector for pictures of files, such as "
                "google/owlv2-base-patch16-ensemble; or set --ins 0 and use --sem, --kn or "
                "--dvreward")
        published = load_detector(cfg.detector, device=device, batch_size=min(batch_size, 8))
        published.check(rows)
        say(f"ins: GenEval rules, detector {cfg.detector}, colours {COLOR_CLIP}")
        out["ins"] = Instruction(
            published, functools.partial(fraction_kept, **published.thresholds))

    if "recaption" in asked:
        similarity = tuple_similarity
        if not cfg.cycles_by_rule:
            similarity = load_text_encoder(**loading).similarity
        out["recaption"] = Recaption(load_captioner(cfg.captioner, **loading), similarity)
    if "likeness" in asked:
        distance = None if cfg.cycles_by_rule else load_lpips(device=device)
        out["likeness"] = Likeness(distance)
    if "pref" in asked:
        out["pref"] = Preference(load_preference(cfg.pref_model, **loading))

    if "tim" in asked:
        out["tim"] = TokenMatch(states)
    if "accuracy" in asked:
        out["accuracy"] = answer_accuracy
    if "format" in asked:
        out["format"] = think_format
    if unknown := asked - out.keys():
        raise ValueError(f"no line of referees/build.py builds the reward {min(unknown)}")
    for name, reward in out.items():
        if texts and (model := text_model(reward)):
            warn_of_cut(name, model.text_ids, texts(name))
    return out


def text_model(reward: Reward):
    """The model by which a reward reads the texts of its samples, or None."""
    if isinstance(reward, Semantic | Dense):
        return reward.encoder
    if isinstance(reward, Knowledge):
        return reward.judge
    if isinstance(reward, Preference):
        return reward.model.clip
    return None


# reward -> the setting that names its model
MODEL_OF = dict(
    sem="siglip", dense="siglip", kn="judge", dvreward="judge", ins="detector",
    recaption="captioner", pref="pref_model")


def weighted_rewards(cfg) -> set[str]:
    return {name for name, weight in cfg.weights.items() if weight}


def models_asked(cfg) -> set[str]:
    """Folders or hub names of the models that a run's rewards ask."""
    asked = weighted_rewards(cfg)
    models = {getattr(cfg, setting) for name, setting in MODEL_OF.items() if name in asked}
    if "ins" in asked and cfg.detector:
        models.add(COLOR_CLIP)
    if "recaption" in asked and not cfg.cycles_by_rule:
        models.add(TEXT_ENCODER)
    return models - {""}


def hub_commits(cfg) -> dict[str, str]:
    """Hub name -> commit, of the models from there that a run's rewards ask."""
    out = {}
    for model in sorted(models_asked(cfg)):
        folder = folder_of(model)
        if folder and folder != Path(model):
            out[model] = folder.name
    return out


def referee_bytes(cfg) -> float:
    """Bytes of the weights of the reward models that lie here, and what a learning one adds."""
    weights = 0
    for model in models_asked(cfg):
        weights += (2 if cfg.bf16 and model == cfg.judge else 4) * numbers_in(model)
    if cfg.train_referee:
        weights += 12 * numbers_in(cfg.siglip)
    return weights
