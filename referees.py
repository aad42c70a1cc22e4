"""Frozen models that rewards ask: SigLIP, open_clip, a yes/no judge, a captioner; and the language model that writes questions.

`load_*` reads a model from a local folder or hub name through transformers or open_clip, from safetensors and without remote code, and
refuses weights that are damaged or not exactly the config's. No file of ours is imported here: this one can be copied beside rewards.py,
or alone.

Notation: N images (N, 3, H, W) in [0, 1], P patches, D embedding width.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def declare_torchvision_ops():
    """Let transformers and open_clip import where torchvision was built for another torch (a CUDA build beside a CPU torch).

    Its operators are missing then, and none is called here, so declaring their schemas is enough. The cache keeps the returned
    library alive. Does nothing where torchvision imports, or is not installed.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


@dataclass
class Reading(contextlib.AbstractContextManager):
    """A context in which what the libraries raise at missing, damaged or other files is one line: an OSError where it was one, else a
    ValueError. tokenizers raises Exception itself, which an except clause could catch only together with all others."""
    path: str

    def __exit__(self, kind, error, trace):
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.errors import StrictDataclassError as Strict
        from safetensors import SafetensorError
        known = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, ImportError, SafetensorError, Strict)
        if isinstance(error, torch.OutOfMemoryError):
            return
        if kind is Exception or isinstance(error, known):
            where = "" if Path(self.path).is_dir() else f" (no such folder; as a hub name it is looked for in {HF_HUB_CACHE} and online)"
            files = "config, safetensors, tokenizer, preprocessor files"
            what = f"{self.path} cannot be loaded, must be a folder or hub name with {files}{where}: "
            raise (OSError if isinstance(error, OSError) else ValueError)(what + " ".join(str(error).split())[:300]) from error


def frozen(model: torch.nn.Module, device, **faulty) -> torch.nn.Module:
    faulty["not_finite"] = [n for n, x in model.state_dict().items() if x.numel() and not torch.stack(x.aminmax()).isfinite().all()]
    if wrong := {what: sorted(map(str, keys))[:4] for what, keys in faulty.items() if keys}:
        raise ValueError(f"its weights are not those of its config: {wrong}")
    return model.to(device).eval().requires_grad_(False)


def kind_of(path: str) -> str:
    """The model_type of a local folder or hub name. Errors: as load_model's."""
    declare_torchvision_ops()
    import transformers
    with Reading(path):
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False).model_type


def load_model(auto_class: str, model_types: tuple[str, ...], path: str, device, dtype=torch.float32,
               parts: tuple[str, ...] = ("AutoTokenizer", "AutoImageProcessor"), harmless: str = "$."):
    """(frozen model, *parts) of a local folder or hub name by transformers' auto classes, without remote code. No model_types: any.
    harmless: a pattern of keys that an older transformers stored, or does not store, and that no output depends on.
    Errors: OSError for missing files, ValueError for another kind of model and for weights that are damaged or not exactly the config's:
    transformers would draw some."""
    declare_torchvision_ops()
    import transformers
    transformers.utils.logging.disable_progress_bar()           # of the loading of weights, a bar per referee
    read = lambda auto: auto.from_pretrained(path, trust_remote_code=False)  # noqa: E731
    with Reading(path):
        found = read(transformers.AutoConfig).model_type
        if model_types and found not in model_types:
            raise ValueError(f"it holds a {found} model, expected {' or '.join(model_types)}")
        model, info = getattr(transformers, auto_class).from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
        info = {what: [key for key in keys if not re.search(harmless, str(key))] for what, keys in info.items()}
        return frozen(model, device, **info), *(read(getattr(transformers, part)) for part in parts)


def to_pixels(images: Tensor, size: tuple[int, int], mode: str, mean, std) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, 3, *size) as a vision tower reads it: antialiased resize, no crop, then (x - mean) / std."""
    x = images.float()
    if x.shape[-2:] != tuple(size):
        x = F.interpolate(x, size=tuple(size), mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (mean, std))
    return (x - mean) / std


def processor_pixels(images: Tensor, model, processor) -> Tensor:
    """What transformers' image processor would hand to the model, without its detour through 8 bits."""
    size, mode = (processor.size["height"], processor.size["width"]), {2: "bilinear", 3: "bicubic"}[int(processor.resample)]
    return to_pixels(images.to(model.device), size, mode, processor.image_mean, processor.image_std).to(model.dtype)


def _batched(function, batch_size: int, *columns) -> Tensor:
    """`function` on slices of at most `batch_size` rows of all columns, joined again."""
    starts = range(0, len(columns[0]), batch_size)
    return torch.cat([function(*(column[i:i + batch_size] for column in columns)) for i in starts])


@dataclass
class Siglip:
    """A SigLIP or fixed-resolution SigLIP 2 (transformers' SiglipModel): unit-length embeddings of images and texts (N, D) and of
    patches (N, P, D); images are (N, 3, H, W) in [0, 1]."""

    model: torch.nn.Module
    tokenizer: Callable
    image_processor: Callable
    batch_size: int = 128

    def pixels(self, images: Tensor) -> Tensor:
        return processor_pixels(images, self.model, self.image_processor)                     # (N, 3, size, size)

    def tokens(self, texts: list[str]) -> Tensor:
        """(N, length): lower-cased and padded to the full length without a mask, as both generations were trained."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer([text.lower() for text in texts], padding="max_length", truncation=True, max_length=length)
        return torch.tensor(ids.input_ids, device=self.model.device)

    def seen(self, images: Tensor):
        """What the vision tower says of images: last_hidden_state (N, P, D) and pooler_output (N, D). Gradients flow."""
        return self.model.vision_model(pixel_values=self.pixels(images))

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(_batched(lambda x: self.seen(x).pooler_output, self.batch_size, images).float(), dim=-1)   # (N, D)

    @torch.no_grad()
    def embed_patches(self, images: Tensor) -> Tensor:
        """Each patch through the pooling head by itself: attention over a single token returns that token's value."""
        def patches(x):
            states = self.seen(x).last_hidden_state                                           # (N, P, D)
            return self.model.vision_model.head(states.flatten(0, 1)[:, None]).view_as(states)

        return F.normalize(_batched(patches, self.batch_size, images).float(), dim=-1)        # (N, P, D)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        text = self.model.text_model
        pooled = _batched(lambda x: text(input_ids=self.tokens(x)).pooler_output, self.batch_size, texts)
        return F.normalize(pooled.float(), dim=-1)                                            # (N, D)


@dataclass
class SiglipNaflex(Siglip):
    """A SigLIP 2 of variable resolution: an image is read at its own aspect, in as many patches as its image processor allows."""

    def seen(self, images: Tensor):
        given = self.image_processor(list(images.float()), do_rescale=False, return_tensors="pt").to(self.model.device, self.model.dtype)
        out = self.model.vision_model(**given)
        out.last_hidden_state = out.last_hidden_state[:, :given.spatial_shapes[0].prod()]     # all images are of one size: no padding
        return out


def load_siglip(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 128) -> Siglip:
    """A frozen SigLIP, such as google/siglip2-so400m-patch14-384, or of variable resolution, such as google/siglip2-so400m-patch16-naflex.
    Errors: see load_model."""
    naflex = kind_of(path) == "siglip2"
    return (SiglipNaflex if naflex else Siglip)(*load_model("AutoModel", ("siglip", "siglip2"), path, device, dtype), batch_size)


class Learner:
    """A SigLIP that learns beside the policy, from the policy's own pictures and prompts by SigLIP's sigmoid loss: the trainable referee
    of LVRPO's Fig. 4, there to show why a referee should be frozen. Gamed by design: any picture of a prompt is taught as right."""

    def __init__(self, encoder: Siglip, lr: float):
        if not isinstance(encoder, Siglip):
            raise ValueError("--train_referee teaches a SigLIP of transformers, not an open_clip model")
        self.encoder = encoder
        encoder.model.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=lr, weight_decay=0.0)
        for p in encoder.model.parameters():                    # so that a checkpoint can be read in place
            self.optimizer.state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    def loss(self, images: Tensor, prompts: list[str], distinct: list[str]) -> Tensor:
        """The sum over images of SigLIP's loss against all distinct prompts, one of which is its own."""
        model = self.encoder.model
        texts = model.text_model(input_ids=self.encoder.tokens(distinct)).pooler_output                            # (prompts, D)
        cosine = F.normalize(self.encoder.seen(images).pooler_output.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
        mine = torch.tensor([[2.0 * (prompt == other) - 1 for other in distinct] for prompt in prompts], device=cosine.device)
        return -F.logsigmoid(mine * (cosine * model.logit_scale.exp() + model.logit_bias)).sum()                   # (N, prompts) summed

    def learn(self, images: Tensor, prompts: list[str], add: Callable, world: int) -> float:
        """One step on the mean loss, in parts of the encoder's batch size; add(optimizer) adds the gradients of all `world` ranks up, each
        of which compares with its own prompts. Returns the loss before it."""
        self.optimizer.zero_grad()
        distinct, size, total = list(dict.fromkeys(prompts)), self.encoder.batch_size, 0.0
        for i in range(0, len(prompts), size):
            loss = self.loss(images[i:i + size], prompts[i:i + size], distinct) / len(prompts)
            (loss / world).backward()
            total += loss.item()
        add(self.optimizer)
        self.optimizer.step()
        return total

    def state(self) -> dict[str, Tensor]:
        """The live tensors of a checkpoint."""
        out = {}
        for name, p in self.encoder.model.named_parameters():
            out |= {f"referee.{name}": p.detach()} | {f"referee.adamw.{k}.{name}": v for k, v in self.optimizer.state[p].items()}
        return out


@dataclass
class Clip:
    """A CLIP of transformers: unit-length embeddings of images (N, 3, H, W) in [0, 1] and of texts, (N, D). Images are squashed to a
    square, not cropped."""

    model: torch.nn.Module
    tokenizer: Callable
    image_processor: Callable
    batch_size: int = 128

    @property
    def size(self) -> int:
        return self.model.config.vision_config.image_size

    def pixels(self, images: Tensor) -> Tensor:
        mode = {2: "bilinear", 3: "bicubic"}[int(self.image_processor.resample)]
        mean, std = self.image_processor.image_mean, self.image_processor.image_std
        return to_pixels(images.to(self.model.device), (self.size, self.size), mode, mean, std).to(self.model.dtype)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        model = self.model
        run = lambda x: model.visual_projection(model.vision_model(pixel_values=self.pixels(x)).pooler_output)  # noqa: E731
        return F.normalize(_batched(run, self.batch_size, images).float(), dim=-1)            # (N, D)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        model, longest = self.model, self.model.config.text_config.max_position_embeddings
        given = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
        run = lambda ids, mask: model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)  # noqa: E731
        return F.normalize(_batched(run, self.batch_size, given.input_ids, given.attention_mask).float(), dim=-1)  # (N, D)


def load_clip(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 128):
    """A frozen Clip, such as openai/clip-vit-large-patch14, or an OpenClip where the folder or hub name is one. Errors: see load_model."""
    if is_open_clip(path):
        return load_open_clip(path, device=device, batch_size=batch_size)
    return Clip(*load_model("AutoModel", ("clip",), path, device, dtype), batch_size)


def is_open_clip(path: str) -> bool:
    return path.startswith("hf-hub:") or any(Path(path).glob("open_clip_*.safetensors"))


@dataclass
class OpenClip:
    """An open_clip model and its tokenizer: unit-length embeddings of images (N, 3, H, W) in [0, 1] and of texts, (N, D)."""

    model: torch.nn.Module
    tokenizer: Callable
    batch_size: int = 128

    @property
    def size(self) -> int:
        size = self.model.visual.preprocess_cfg["size"]
        return size if isinstance(size, int) else size[0]

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        cfg, device = self.model.visual.preprocess_cfg, next(self.model.parameters()).device
        size = (cfg["size"],) * 2 if isinstance(cfg["size"], int) else cfg["size"]
        pixels = lambda x: to_pixels(x.to(device), size, cfg["interpolation"], cfg["mean"], cfg["std"])  # noqa: E731
        return _batched(lambda x: self.model.encode_image(pixels(x), normalize=True), self.batch_size, images)  # (N, D)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        device = next(self.model.parameters()).device
        return _batched(lambda x: self.model.encode_text(self.tokenizer(x).to(device), normalize=True), self.batch_size, texts)


def load_open_clip(path: str, *, device="cpu", batch_size: int = 128) -> OpenClip:
    """A frozen open_clip model from a local folder (open_clip_config.json and safetensors) or "hf-hub:owner/name", which is fetched without
    its pickle files, to which open_clip would fall back. Errors: see load_model. Differs: images are squashed to a square, not cropped."""
    declare_torchvision_ops()
    import open_clip
    with Reading(path):
        if path.startswith("hf-hub:"):
            from huggingface_hub import snapshot_download
            path = snapshot_download(path.removeprefix("hf-hub:"), allow_patterns=["*.json", "*.txt", "*.safetensors", "*.model"])
        if not any(Path(path, f"{stem}.safetensors").exists() for stem in ("open_clip_model", "open_clip_pytorch_model")):
            raise ValueError("it holds neither open_clip_model.safetensors nor open_clip_pytorch_model.safetensors")
        model = frozen(open_clip.create_model(f"local-dir:{path}", require_pretrained=True), device)
        return OpenClip(model, open_clip.get_tokenizer(f"local-dir:{path}"), batch_size)


NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
LEAST_MASS = 1e-3                                               # of yes and no together, on average


def spellings(tokenizer, word: str) -> list[int]:
    """The ids of a word's spellings that are one known token: as it is, capitalised, and both behind a space; each id once."""
    each = [tokenizer(said, add_special_tokens=False).input_ids for w in (word, word.capitalize()) for said in (w, f" {w}")]
    return list(dict.fromkeys(ids[0] for ids in each if len(ids) == 1 and ids[0] != tokenizer.unk_token_id))


def spelled(tokenizer, word: str) -> list[int]:
    """The spellings of a word, and of the digit of a number up to ten."""
    return list(dict.fromkeys(i for said in (word, NUMBERS.get(word, word)) for i in spellings(tokenizer, said)))


@dataclass
class Judge:
    """A yes/no judge: PaliGemma or PaliGemma 2, the open relatives of LVRPO's PaLI-3.

    A row is <image> * P, <bos>, question, newline, all of it prefix that sees itself fully; the next token answers. Rows are
    padded on the left, with positions counted from the first real token, so padding changes nothing.
    Every spelling of yes and no that is one known token counts: Yes, yes, and both behind a space.
    Errors: ValueError where the tokenizer has no such token, and where the model puts hardly any probability on them.
    """

    model: torch.nn.Module
    tokenizer: Callable
    image_processor: Callable
    batch_size: int = 128
    max_question: int = 96

    def __post_init__(self):
        self.answers = [spellings(self.tokenizer, word) for word in ("yes", "no")]
        if not all(self.answers):
            raise ValueError(f"the judge's tokenizer reads yes and no as the tokens {self.answers}, expected at least one known token each")

    def pixels(self, images: Tensor) -> Tensor:
        return processor_pixels(images, self.model, self.image_processor)                     # (N, 3, size, size)

    def rows(self, questions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (N, L) each. A question is cut at `max_question` tokens and cannot smuggle in image tokens."""
        config, device = self.model.config, self.model.device
        vision, image, pad = config.vision_config, config.image_token_id, self.tokenizer.pad_token_id
        head = [image] * (vision.image_size // vision.patch_size) ** 2 + [self.tokenizer.bos_token_id]
        texts = ["\n"] + [" ".join(question.split()) for question in questions]
        newline, *asked = self.tokenizer(texts, add_special_tokens=False).input_ids
        rows = [head + [i for i in ids if i != image][:self.max_question] + newline for ids in asked]
        gaps = [max(map(len, rows)) - len(row) for row in rows]
        ids = torch.tensor([[pad] * gap + row for gap, row in zip(gaps, rows)], device=device)
        mask = torch.tensor([[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows)], device=device)
        return ids, mask

    def features(self, images: Tensor) -> Tensor:
        """(N, P, D): images as the language model reads them."""
        return self.model.get_image_features(self.pixels(images)).pooler_output

    def next_logits(self, features: Tensor, questions: list[str]) -> Tensor:
        """(N, V): the logits of the first generated token. Gradients flow, so a judge can learn from them."""
        ids, mask = self.rows(questions)
        embedded = self.model.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter((ids == self.model.config.image_token_id)[..., None], features.to(embedded.dtype))
        out = self.model(inputs_embeds=embedded, attention_mask=mask, position_ids=mask.cumsum(1).clamp(min=1),
                         token_type_ids=torch.zeros_like(ids), use_cache=False, logits_to_keep=1)  # type 0 = prefix
        return out.logits[:, -1].float()                                                      # (N, V)

    def logits(self, features: Tensor, questions: list[str]) -> Tensor:
        """(N, 3): the log-sums over the spellings of "yes" and of "no", and over all tokens."""
        out = self.next_logits(features, questions)
        return torch.stack([out[:, ids].logsumexp(1) for ids in (*self.answers, slice(None))], dim=1)

    @torch.no_grad()
    def yes_probability(self, images: Tensor, questions: list[str], of: list[int] | None = None) -> Tensor:
        """P(yes) / (P(yes) + P(no)) of each question, (R,) in [0, 1]; of: which image each is about, None: in order, one each. Every image
        is encoded once, but by a ChatJudge. ValueError where the model hardly thinks of yes and no, so that their ratio is noise."""
        of = list(range(len(images))) if of is None else of
        seen = _batched(self.features, self.batch_size, images)                               # (N, P, D)
        questions = [self.worded(question, "yes") for question in questions]
        logits = _batched(lambda rows, asked: self.logits(seen[rows], asked), self.batch_size, of, questions)
        mass = (logits[:, :2].logsumexp(1) - logits[:, 2]).exp().mean().item()
        if mass < LEAST_MASS:
            raise ValueError(f"the judge puts {mass:.1e} of its probability on yes and no, expected most of it; a model that thinks before "
                             "it answers, or that was not trained for such questions, is no judge")
        return logits[:, :2].softmax(-1)[:, 0]                                                # (R,)

    @torch.no_grad()
    def answer_probability(self, images: Tensor, questions: list[str], answers: list[str], of: list[int]) -> Tensor:
        """The probability that the first token says the expected answer, (R,) in [0, 1]: of all spellings of the word, and of a number's
        digit. ValueError for an answer that no single token spells, and where the model hardly thinks of yes, no and the numbers."""
        known = {answer: spelled(self.tokenizer, answer.strip().lower()) for answer in dict.fromkeys(answers)}
        if unknown := [answer for answer, ids in known.items() if not ids]:
            raise ValueError(f"the judge's tokenizer has no token that says {unknown[0]!r}, expected a word or a number up to ten")

        words = [*known, "yes", "no", *NUMBERS]
        possible = sorted({i for word in words for i in spelled(self.tokenizer, word.strip().lower())})

        def said(rows, asked, wanted):
            chances = self.next_logits(seen[rows], asked).softmax(-1)                         # (n, V)
            wished = torch.stack([chance[known[answer]].sum() for chance, answer in zip(chances, wanted)])
            return torch.stack([wished, chances[:, possible].sum(1)], 1)

        seen = _batched(self.features, self.batch_size, images)
        asked = [self.worded(*each) for each in zip(questions, answers)]
        wished, mass = _batched(said, self.batch_size, of, asked, answers).unbind(1)          # (R,) each
        if mass.mean() < LEAST_MASS:
            raise ValueError(f"the judge puts {mass.mean().item():.1e} of its probability on yes, no and numbers, expected most of it")
        return wished.clamp(0, 1)

    def worded(self, question: str, answer: str) -> str:
        """The question as it is put where that answer is expected."""
        return question


@dataclass
class ChatJudge(Judge):
    """A yes/no judge that is a chat model: Qwen2.5-VL, Qwen3-VL, InternVL, SmolVLM (whose processor needs the package
    num2words) and others whose processor has a chat template.

    A row is the user's turn, the image and then the question, and the head of the assistant's; the next token answers, nothing is
    generated. `image_processor` is the whole processor. Rows are padded on the left. A question cannot smuggle in the tokenizer's own
    markers. Pixels stay floats, where the published path goes through 8 bits and back.
    Errors: ValueError for a model that is made to think first, whose next token is not its answer; and Judge's.
    """

    def __post_init__(self):
        super().__post_init__()
        self.tokenizer.padding_side = "left"
        if self.row("").rstrip().endswith("<think>"):
            raise ValueError("the judge is made to think before it answers, so that its next token is no answer; use its Instruct variant")

    def worded(self, question: str, answer: str) -> str:
        return f"{question} {'Answer yes or no.' if answer.strip().lower() in ('yes', 'no') else 'Answer in one word.'}"

    def row(self, question: str) -> str:
        """The text of a row, with the place of the image."""
        for marker in self.tokenizer.all_special_tokens:
            question = question.replace(marker, " ")
        said = [{"type": "image"}, {"type": "text", "text": " ".join(question.split())}]
        return self.image_processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False)

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W): the images themselves, since these models do not share how they are encoded."""
        return images

    def next_logits(self, features: Tensor, questions: list[str]) -> Tensor:
        """(N, V): the logits of the first generated token."""
        given = self.image_processor(images=[[image] for image in features.float()], text=[self.row(question) for question in questions],
                                     padding=True, do_rescale=False, return_tensors="pt").to(self.model.device, self.model.dtype)
        return self.model(**given, use_cache=False, logits_to_keep=1).logits[:, -1].float()   # (N, V)


def load_judge(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 128) -> Judge:
    """A frozen judge: google/paligemma2-3b-mix-448, or a ChatJudge such as Qwen/Qwen2.5-VL-7B-Instruct. Errors: see load_model."""
    if kind_of(path) == "paligemma":
        return Judge(*load_model("AutoModelForImageTextToText", ("paligemma",), path, device, dtype), batch_size)
    model, processor = load_model("AutoModelForImageTextToText", (), path, device, dtype, ("AutoProcessor",))
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{path} has no chat template, which a judge is asked by; use google/paligemma2-3b-mix-448 or a chat model")
    return ChatJudge(model, processor.tokenizer, processor, batch_size)


@dataclass
class Captioner:
    """An image captioner (BLIP): greedy captions of at most `longest` tokens, without a prefix, as CoRL's code asks it."""

    model: torch.nn.Module
    tokenizer: Callable
    image_processor: Callable
    batch_size: int = 128
    longest: int = 50

    def pixels(self, images: Tensor) -> Tensor:
        return processor_pixels(images, self.model, self.image_processor)                     # (N, 3, size, size)

    @torch.no_grad()
    def captions(self, images: Tensor) -> list[str]:
        """A caption per image."""
        written = []
        for part in images.split(self.batch_size):
            tokens = self.model.generate(pixel_values=self.pixels(part), do_sample=False, num_beams=1, max_new_tokens=self.longest)
            written += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [caption.strip() for caption in written]


def load_captioner(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 128) -> Captioner:
    """A frozen Captioner, such as Salesforce/blip-image-captioning-base. Errors: see load_model."""
    return Captioner(*load_model("AutoModelForImageTextToText", ("blip",), path, device, dtype), batch_size)


@dataclass
class TextEncoder:
    """Token states of a BERT-like encoder, of the layer that is named: 0 the embeddings, -1 the last. Special tokens are left out."""

    model: torch.nn.Module
    tokenizer: Callable
    layer: int = -1
    batch_size: int = 128

    @torch.no_grad()
    def states(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(N, L, D) and the mask (N, L) of the words."""
        longest = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        ids = self.tokenizer(texts, padding=True, padding_side="right", truncation=True, max_length=longest, return_attention_mask=True,
                             return_special_tokens_mask=True, return_tensors="pt").to(self.model.device)
        run = lambda tokens, mask: self.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states[self.layer]
        states = _batched(run, self.batch_size, ids.input_ids, ids.attention_mask)
        return states, ids.attention_mask.bool() & ~ids.special_tokens_mask.bool()


def load_text_encoder(path: str, *, layer: int = -1, device="cpu", dtype=torch.float32, batch_size: int = 128) -> TextEncoder:
    """A frozen TextEncoder, such as google-bert/bert-base-uncased. Errors: see load_model; ValueError for a layer that it lacks."""
    model, tokenizer = load_model("AutoModel", ("bert", "mpnet", "roberta", "distilbert"), path, device, dtype, ("AutoTokenizer",))
    layers = model.config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise ValueError(f"{path} has layers 0 (the embeddings) to {layers}, not {layer}")
    return TextEncoder(model, tokenizer, layer, batch_size)


def load_lpips(*, device="cpu") -> Callable:
    """LPIPS with the VGG trunk, (a, b) in [0, 1] -> (N,): the package lpips, and torchvision's VGG-16, which it fetches once. Errors:
    ValueError where either is missing."""
    declare_torchvision_ops()
    try:
        import lpips
        with contextlib.redirect_stdout(None):
            model = lpips.LPIPS(net="vgg", verbose=False)
    except ModuleNotFoundError as error:
        raise ValueError(f"--likeness_by lpips needs the package {error.name}: pip install lpips; or use --likeness_by ssim") from error
    except OSError as error:
        raise ValueError(f"--likeness_by lpips needs torchvision's VGG-16, which could not be fetched ({error}); put vgg16-397923af.pth "
                         f"into {torch.hub.get_dir()}/checkpoints, or use --likeness_by ssim") from error
    model = model.to(device).eval().requires_grad_(False)
    return lambda a, b: model(a.to(device), b.to(device), normalize=True).flatten()


def load_language_model(path: str, *, device="cpu"):
    """(frozen model, tokenizer) of any causal language model of transformers, in bf16 where there is a GPU. Errors: see load_model."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return load_model("AutoModelForCausalLM", (), path, device, dtype, ("AutoTokenizer",))


def numbers_in(path: str) -> int:
    """How many numbers the safetensors of a folder, or of a hub name that was fetched before, hold; 0 where none lies here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from safetensors import safe_open
    try:
        folder = path if Path(path).is_dir() else snapshot_download(path.removeprefix("hf-hub:"), local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return 0
    total = 0
    for file in Path(folder).glob("*.safetensors"):
        with Reading(path), safe_open(file, framework="pt") as held:
            total += sum(math.prod(held.get_slice(key).get_shape()) for key in held.keys())
    return total
