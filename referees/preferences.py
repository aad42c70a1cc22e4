"""What people are said to prefer: four published preference models behind one call, `score(images, prompts) -> (N,)`.

PickScore and HPSv2 are CLIPs; UnifiedReward is a chat model that writes scores; HPSv3 is a Qwen2-VL with a head of its own. All are loaded
from safetensors, without remote code. Nothing is returned for a picture that could not be scored: it is an error.

Left out: ImageReward, whose layout only its own package reads, and HPSv3++, which is no safetensors.

Notation: N images (N, 3, H, W) in [0, 1], V vocabulary.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from referees.load import Reading, frozen, load_model
from referees.siglip import Clip, load_clip

ASK_UNIFIED = ("Judge how well this image fits its caption and how good it looks. Give three scores from 1 to 5, a line each:\n"
               "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\nCaption: {prompt}")
ASK_HPSV3 = "Rate this image by how a person would like it, and by how well it fits the caption. Caption: {prompt}\n<|Reward|>"
PIXELS = 256 * 28 * 28                                         # of a picture that HPSv3 reads
SCORE = re.compile(r"(alignment|coherence|style|final) score[^:\n]*:\W*([0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)


@dataclass
class ClipPreference:
    """PickScore: exp(logit_scale) * cosine / 26, about 0.6 to 1; HPSv2: the cosine, about 0.2 to 0.35. `scale` is what multiplies it."""

    clip: Clip
    scale: float

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        texts = self.clip.embed_texts(list(dict.fromkeys(prompts)))                           # (distinct, D)
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        return self.scale * (self.clip.embed_images(images) * texts[[place[prompt] for prompt in prompts]]).sum(-1)      # (N,)


@dataclass
class Unified:
    """UnifiedReward: a chat model that writes three scores of 1 to 5, whose mean is brought to [0, 1]; version 1.5 writes one final score.

    Greedy. A text without such scores is an error, never a low score. `ask` is our wording; give the published prompt of the version that
    is used, with {prompt} in it, for published numbers.
    """

    model: nn.Module
    processor: Callable
    batch_size: int = 8
    longest: int = 512
    ask: str = ASK_UNIFIED

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        written = []
        for i in range(0, len(prompts), self.batch_size):
            asked = [self.ask.format(prompt=plain(self.processor, p)) for p in prompts[i:i + self.batch_size]]
            given = chat(self.processor, images[i:i + self.batch_size], asked, self.model, "left")
            tokens = self.model.generate(**given, do_sample=False, max_new_tokens=self.longest)[:, given.input_ids.shape[1]:]
            written += self.processor.batch_decode(tokens, skip_special_tokens=True)
        return torch.tensor([written_score(text, prompt) for text, prompt in zip(written, prompts)])


def written_score(text: str, prompt: str) -> float:
    """The mean of the three scores that a text holds, or its final score, brought from 1..5 to [0, 1]. ValueError for any other text."""
    said = {name.lower(): float(number) for name, number in SCORE.findall(text)}
    three = [said[name] for name in ("alignment", "coherence", "style") if name in said]
    scores = three if len(three) == 3 else [said["final"]] if "final" in said and not three else []
    if not scores or not all(1 <= each <= 5 for each in scores):
        raise ValueError(f"the preference model wrote {' '.join(text.split())[:80]!r} for {prompt[:60]!r}, expected three scores, or one "
                         "final score, of 1 to 5")
    return (sum(scores) / len(scores) - 1) / 4


@dataclass
class Hpsv3:
    """HPSv3: the mean mu that a head reads from the last hidden state at the token <|Reward|>, unbounded, about -5 to 15.

    `ask` is our wording; give the published prompt, with {prompt} in it, for published numbers.
    """

    model: nn.Module
    head: nn.Module
    processor: Callable
    batch_size: int = 8
    ask: str = ASK_HPSV3

    @torch.no_grad()
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        marker = self.processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
        out = []
        for i in range(0, len(prompts), self.batch_size):
            asked = [self.ask.format(prompt=plain(self.processor, p)) for p in prompts[i:i + self.batch_size]]
            given = chat(self.processor, images[i:i + self.batch_size], asked, self.model, "right")
            states = self.model.model(**given, use_cache=False).last_hidden_state             # (n, L, D)
            out.append(self.head(states[given.input_ids == marker].float())[:, 0])            # (n,)
        return torch.cat(out)


def plain(processor, prompt: str) -> str:
    """A prompt without the tokenizer's own markers, of which an image's would be read as one."""
    for marker in processor.tokenizer.all_special_tokens:
        prompt = prompt.replace(marker, " ")
    return prompt


def chat(processor, images: Tensor, asked: list[str], model, side: str):
    """What a chat model reads of one image and one text each, padded on `side`."""
    turn = lambda text: [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]  # noqa: E731
    text = [processor.apply_chat_template(turn(each), add_generation_prompt=True, tokenize=False) for each in asked]
    return processor(images=[[image] for image in images.float()], text=text, padding=True, padding_side=side, do_rescale=False,
                     return_tensors="pt").to(model.device, model.dtype)


def hpsv3_head(width: int) -> nn.Module:
    """(n, D) -> (n, 2): mu and sigma. Dropout, which the published head has behind its first layer, does nothing here."""
    return nn.Sequential(nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))


def load_hpsv3(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 8) -> Hpsv3:
    """A frozen Hpsv3 of a local folder: HPSv3.safetensors of MizzenAI/HPSv3, beside the config, tokenizer and processor files of
    Qwen/Qwen2-VL-7B-Instruct. Its keys are of an older transformers and are renamed. Errors: OSError and ValueError in one line."""
    import transformers
    from safetensors.torch import load_file
    with Reading(path):
        weights = Path(path, "HPSv3.safetensors")
        if not weights.is_file():
            raise OSError("it has no HPSv3.safetensors, the file of MizzenAI/HPSv3, which must lie beside the config, tokenizer and "
                          "processor files of Qwen/Qwen2-VL-7B-Instruct")
        processor = transformers.AutoProcessor.from_pretrained(path, trust_remote_code=False)
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]}, replace_extra_special_tokens=False)
        # Every picture is read in 256 tokens, as the head was trained.
        processor.image_processor.size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        stored = {renamed(key): x for key, x in load_file(weights).items()}
        head = hpsv3_head(config.text_config.hidden_size)
        head.load_state_dict({key.removeprefix("rm_head."): x.float() for key, x in stored.items() if key.startswith("rm_head.")})
        body = {key: x for key, x in stored.items() if not key.startswith("rm_head.")}
        config.text_config.vocab_size = len(body["model.language_model.embed_tokens.weight"])  # one more than the base: the marker
        model, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=body, dtype=dtype, output_loading_info=True)
        info = {what: [key for key in keys if not str(key).startswith("lm_head")] for what, keys in info.items()}   # which is not asked
        return Hpsv3(frozen(model, device, **info), frozen(head, device), processor, batch_size)


def renamed(key: str) -> str:
    """A key of HPSv3's file as transformers 5 names it."""
    if key.startswith("visual."):
        return f"model.{key}"
    if key.startswith("model.") and not key.startswith(("model.visual.", "model.language_model.")):
        return key.replace("model.", "model.language_model.", 1)
    return key


def load_preference(path: str, how: str, *, device="cpu", dtype=torch.float32, batch_size: int = 8) -> ClipPreference | Unified | Hpsv3:
    """A frozen preference model: how "pickscore" (yuvalkirstain/PickScore_v1), "hpsv2" (adams-story/HPSv2-hf), "unified" (CodeGoat24's
    UnifiedReward) or "hpsv3" (see load_hpsv3). Errors: see referees.load_model."""
    if not path:
        raise ValueError("--pref needs --pref_model: a folder or hub name, such as yuvalkirstain/PickScore_v1")
    if how == "hpsv3":
        return load_hpsv3(path, device=device, dtype=dtype, batch_size=batch_size)
    if how == "unified":
        return Unified(*load_model("AutoModelForImageTextToText", (), path, device, dtype, ("AutoProcessor",)), batch_size)
    clip = load_clip(path, device=device, dtype=dtype, batch_size=batch_size)
    if not isinstance(clip, Clip):
        raise ValueError(f"{path} is an open_clip model; --pref_by {how} reads transformers' layout")
    return ClipPreference(clip, clip.model.logit_scale.exp().item() / 26 if how == "pickscore" else 1.0)
