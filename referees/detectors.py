"""Objects in real pictures, for GenEval's rules: published detectors, and colours by CLIP.

GenEval's own detector needs mmdet, which no current PyTorch builds. Here Grounding DINO or OWLv2 is
asked for the classes that a prompt names, and CLIP for the colours. Scores of another detector are
scores of another benchmark: say "GenEval rules, detector X".

Notation: N images (N, 3, H, W) in [0, 1], Q queries of a detector, boxes (x1, y1, x2, y2) in
pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from policy import declare_torchvision_ops
from referees.geneval import COLORS, best_by_class
from referees.load import load_model
from referees.siglip import Clip, load_clip
from support.rows import Clause, Metadata

COLOR_CLIP = "openai/clip-vit-large-patch14"    # GenEval's
TEMPLATES = (
    "a photo of a {color} {name}", "a photo of a {color}-colored {name}",
    "a photo of a {color} object")              # GenEval's
LEAST = 0.05                                    # a lower score is no detection under any threshold
OVERLAP = 0.5                                   # IoU above which two boxes are one thing


def suppress(boxes: Tensor, scores: Tensor, most: float = OVERLAP) -> list[int]:
    """Non-maximum suppression: places of the boxes (Q, 4) that overlap no better one, best first.

    Two boxes overlap if their intersection over union is above `most`.
    """
    declare_torchvision_ops()
    from torchvision.ops import box_iou

    overlap = box_iou(boxes, boxes)                                                 # (Q, Q)
    kept = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(overlap[i, j] <= most for j in kept):
            kept.append(i)
    return kept


@dataclass
class ZeroShot:
    """Grounding DINO or OWLv2, asked for the classes that a prompt names.

    A box has one class, the one that scores highest; in Grounding DINO a class scores as the best
    of its words. Of boxes of one class that overlap, the best stays. `threshold` is lower than
    GenEval's, which presumes another detector's confidence.
    """

    model: torch.nn.Module
    processor: Callable
    batch_size: int = 8

    @property
    def is_dino(self) -> bool:
        return self.model.config.model_type == "grounding-dino"

    @property
    def threshold(self) -> float:
        return 0.25 if self.is_dino else 0.1

    @torch.no_grad()
    def __call__(self, images: Tensor, classes: list[list[str]]) -> list[list[dict]]:
        """The things of each image: class, box and score."""
        found = [[] for _ in images]
        for names in dict.fromkeys(map(tuple, classes)):        # one call asks one text
            if not names:
                continue
            same = [n for n, other in enumerate(classes) if tuple(other) == names]
            for i in range(0, len(same), self.batch_size):
                rows = same[i:i + self.batch_size]
                scores, boxes = self.score_classes(images[rows], list(names))
                for n, s, b in zip(rows, scores, boxes):
                    found[n] = self.things(s, b, images.shape[-2:], names)
        return found

    def score_classes(self, images: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
        """Scores (N, Q, classes) in [0, 1]; boxes (N, Q, 4), relative centre and size."""
        texts = self.texts(names)
        text = texts[0] if self.is_dino else texts
        given = self.processor(
            images=list(images), text=[text] * len(images), do_rescale=False, return_tensors="pt")
        given = given.to(self.model.device)
        out = self.model(**given)
        scores = out.logits.float().sigmoid()                           # (N, Q, classes or words)
        if self.is_dino:
            words = self.words_of_names(text, names)
            scores = torch.stack([scores[..., places].amax(-1) for places in words], -1)
        return scores, out.pred_boxes.float()

    def texts(self, names: list[str]) -> list[str]:
        """What the model is asked for these classes: one text of Grounding DINO, or one each."""
        if self.is_dino:
            return [". ".join(names) + "."]
        return [f"a photo of a {name}" for name in names]

    def check(self, names: list[str]) -> None:
        """ValueError for classes of more tokens than the model reads."""
        config = self.model.config
        longest = config.text_config.max_position_embeddings
        if self.is_dino:
            longest = config.max_text_len
        for text in self.texts(names):
            length = len(self.processor.tokenizer(text).input_ids)
            if length > longest:
                raise ValueError(
                    f"the detector reads {longest} tokens, and {text[:80]!r} has {length}; give "
                    "the class a shorter name")

    def words_of_names(self, text: str, names: list[str]) -> list[list[int]]:
        """The places of the tokens of each name in "first. second. third."."""
        spans = self.processor.tokenizer(text, return_offsets_mapping=True).offset_mapping
        words, start = [], 0
        for name in names:
            end = start + len(name)
            words.append([i for i, (a, b) in enumerate(spans) if b > a >= start and b <= end])
            start = end + len(". ")
        return words

    def things(
        self, scores: Tensor, boxes: Tensor, size: tuple[int, int], names: tuple[str, ...]
    ) -> list[dict]:
        """The things of one image of size (H, W).

        scores: (Q, classes); boxes: (Q, 4), centre and size relative to the image.
        """
        from torchvision.ops import box_convert, clip_boxes_to_image

        read_h, read_w = size if self.is_dino else [max(size)] * 2  # OWLv2 pads right and below
        corners = box_convert(boxes, "cxcywh", "xyxy")                              # (Q, 4)
        corners = corners * torch.tensor([read_w, read_h, read_w, read_h], device=boxes.device)
        corners = clip_boxes_to_image(corners, size)
        best, place = scores.max(-1)                                                # (Q,)
        found = []
        for k, name in enumerate(names):
            of_name = ((place == k) & (best > LEAST)).nonzero().flatten()
            for i in suppress(corners[of_name], best[of_name]):
                q = of_name[i]
                found.append({"class": name, "box": corners[q].tolist(), "score": best[q].item()})
        return found


@dataclass
class Colors:
    """The colour of an object: CLIP's choice among GenEval's ten, by three templates each."""

    clip: Clip

    def __call__(self, crops: list[Tensor], names: list[str]) -> list[str]:
        """crops: (3, h, w) each, in [0, 1]; names: of their classes."""
        if not crops:
            return []
        squares = torch.stack([middle_square(crop, self.clip.size) for crop in crops])
        images = self.clip.embed_images(squares)                                    # (n, D)
        texts = {name: self.color_texts(name) for name in dict.fromkeys(names)}
        places = [int((texts[name] @ image).argmax()) for name, image in zip(names, images)]
        return [COLORS[place] for place in places]

    def color_texts(self, name: str) -> Tensor:
        """(colours, D): the mean embedding of the templates of each colour, of length 1."""
        texts = [
            template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        embedded = self.clip.embed_texts(texts).view(len(COLORS), len(TEMPLATES), -1)
        return F.normalize(embedded.mean(1), dim=-1)


def middle_square(crop: Tensor, size: int) -> Tensor:
    """The square in the middle of (3, h, w), as (3, size, size); so GenEval reads crops."""
    h, w = crop.shape[-2:]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = crop[None, :, top:top + side, left:left + side].float()
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)


def crop_of(image: Tensor, thing: dict) -> Tensor:
    """What is inside a thing's box, (3, h, w), at least one pixel."""
    x1, y1, x2, y2 = map(int, thing["box"])
    x1, y1 = min(x1, image.shape[2] - 1), min(y1, image.shape[1] - 1)
    return image[:, y1:max(y2, y1 + 1), x1:max(x2, x1 + 1)]


@dataclass
class Detector:
    """images (N, 3, H, W), metadata -> N lists of detections, as geneval.geneval_check reads them.

    Of the classes that each prompt names, with the colour of the objects that a clause would judge.
    """

    find: ZeroShot
    colors: Colors

    @property
    def thresholds(self) -> dict[str, float]:
        """Those of geneval.best_by_class for this detector's scores."""
        return {"threshold": self.find.threshold, "counting_threshold": self.find.threshold}

    def check(self, metadata: list[Metadata]) -> None:
        """ValueError for a colour that is none of the ten, and for a class of too many words."""
        for m in metadata:
            self.find.check(names_of(m))
        clauses = [clause for m in metadata for clause in clauses_of(m)]
        colors = {clause["color"] for clause in clauses if "color" in clause}
        if unknown := sorted(colors - set(COLORS)):
            raise ValueError(
                f"GenEval's colours are {', '.join(COLORS)}, not {', '.join(unknown[:5])}")

    def __call__(self, images: Tensor, metadata: list[Metadata]) -> list[list[dict]]:
        found = self.find(images, [names_of(m) for m in metadata])
        crops, judged = [], []
        for image, m, things in zip(images, metadata, found):
            for thing in self.things_to_colour(m, things):
                judged.append(thing)
                crops.append(crop_of(image, thing))
        colors = self.colors(crops, [thing["class"] for thing in judged])
        for thing, color in zip(judged, colors):
            thing["color"] = color
        return found

    def things_to_colour(self, metadata: Metadata, things: list[dict]) -> list[dict]:
        """The things whose colour a clause asks for: the best `count` of its class, each once."""
        best = best_by_class(metadata, things, **self.thresholds)
        most = {}                               # class -> how many of it are judged
        for clause in metadata.get("include", []):
            if "color" in clause:
                most[clause["class"]] = max(clause["count"], most.get(clause["class"], 0))
        return [thing for name, count in most.items() for thing in best.get(name, [])[:count]]


def clauses_of(metadata: Metadata) -> list[Clause]:
    return [*metadata.get("include", []), *metadata.get("exclude", [])]


def names_of(metadata: Metadata) -> list[str]:
    """The classes that a prompt names, each once."""
    return list(dict.fromkeys(clause["class"] for clause in clauses_of(metadata)))


def load_detector(
    path: str, colors: str = COLOR_CLIP, *, device="cpu", batch_size: int = 8
) -> Detector:
    """A frozen Detector of a Grounding DINO or OWLv2, and a CLIP for colours.

    path, colors: local folders or hub names. Errors: see referees.load.load_model.
    """
    kinds = ("grounding-dino", "owlv2")
    model, processor = load_model(
        "AutoModelForZeroShotObjectDetection", kinds, path, device, parts=("AutoProcessor",))
    find = ZeroShot(model, processor, batch_size)
    return Detector(find, Colors(load_clip(colors, device=device)))
