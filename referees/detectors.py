"""Objects in real pictures, for GenEval's rules: OWLv2's, and colours by CLIP.

GenEval's own detector needs mmdet, which no current PyTorch builds. Here OWLv2 is asked for the
classes that a prompt names, and CLIP for the colours. Scores of another detector are
scores of another benchmark: say "GenEval rules, detector X".

Notation: N images (N, 3, H, W) in [0, 1], Q queries of a detector, boxes (x1, y1, x2, y2) in
pixels.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy import declare_torchvision_ops
from referees.geneval import COLORS, best_by_class
from referees.load import load_model
from referees.siglip import Clip, load_clip
from support.rows import Clause, Metadata

COLOR_CLIP = "openai/clip-vit-large-patch14"    # GenEval's
TEMPLATES = (
    "a photo of a {color} {name}", "a photo of a {color}-colored {name}",
    "a photo of a {color} object")              # GenEval's
THRESHOLD = 0.1  # OWLv2's, lower than GenEval's, which presumes another detector's confidence
LEAST = 0.05                                    # a lower score is no detection under any threshold
OVERLAP = 0.5                                   # IoU above which two boxes are one thing


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor) -> list[int]:
    """Non-maximum suppression: places of the boxes (Q, 4) that are kept, best first.

    A box is kept if it overlaps no better one of its label: if their intersection over union is at
    most OVERLAP.
    """
    declare_torchvision_ops()
    from torchvision.ops import box_iou

    overlap = box_iou(boxes, boxes) * (labels[:, None] == labels)                   # (Q, Q)
    kept = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if all(overlap[i, j] <= OVERLAP for j in kept):
            kept.append(i)
    return kept


def text_of(name: str) -> str:
    """What OWLv2 is asked for a class."""
    return f"a photo of a {name}"


@dataclass
class ZeroShot:
    """OWLv2, asked for the classes that a prompt names.

    A box has one class, the one that scores highest. Of boxes of one class that overlap, the best
    stays.
    """

    model: nn.Module
    processor: Callable
    batch_size: int

    @torch.no_grad()
    def __call__(self, images: Tensor, classes: list[list[str]]) -> list[list[dict]]:
        """The things of each image: class, box and score. `classes` names at least one for each."""
        found = []
        start = 0
        for names, same in itertools.groupby(classes):          # one call asks one text
            stop = start + len(list(same))
            for part in images[start:stop].split(self.batch_size):
                for seen in self.find_boxes(part, names):
                    found.append(self.things(seen, images.shape[-2:], names))
            start = stop
        return found

    def find_boxes(self, images: Tensor, names: list[str]) -> list[dict]:
        """The processor's scores, labels and boxes of each image, with scores above LEAST."""
        text = [text_of(name) for name in names]
        sizes = [images.shape[-2:]] * len(images)
        given = self.processor(
            images=list(images), text=[text] * len(images), do_rescale=False, return_tensors="pt")
        out = self.model(**given.to(self.model.device))
        return self.processor.post_process_grounded_object_detection(out, LEAST, sizes)

    def check(self, names: list[str]) -> None:
        """ValueError for classes of more tokens than the model reads."""
        longest = self.model.config.text_config.max_position_embeddings
        for name in names:
            length = len(self.processor.tokenizer(text_of(name)).input_ids)
            if length > longest:
                raise ValueError(
                    f"the detector reads {longest} tokens, and {text_of(name)[:80]!r} has "
                    f"{length}; give the class a shorter name")

    def things(
        self, seen: dict[str, Tensor], size: tuple[int, int], names: list[str]
    ) -> list[dict]:
        """The things of one image of size (H, W), of what find_boxes saw in it."""
        from torchvision.ops import clip_boxes_to_image

        scores = seen["scores"]
        boxes = clip_boxes_to_image(seen["boxes"], size)
        found = []
        for q in suppress(boxes, scores, seen["labels"]):
            name = names[seen["labels"][q]]
            found.append({"class": name, "box": boxes[q].tolist(), "score": scores[q].item()})
        return found


def middle_square(crop: Tensor, size: int) -> Tensor:
    """The square in the middle of (3, h, w), as (3, size, size); so GenEval reads crops."""
    from torchvision.transforms.functional import center_crop

    square = center_crop(crop[None].float(), min(crop.shape[-2:]))
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)


def crop_of(image: Tensor, thing: dict) -> Tensor:
    """What is inside a thing's box, (3, h, w), at least one pixel."""
    x1, y1, x2, y2 = map(int, thing["box"])
    x1 = min(x1, image.shape[2] - 1)
    y1 = min(y1, image.shape[1] - 1)
    return image[:, y1:max(y2, y1 + 1), x1:max(x2, x1 + 1)]


@dataclass
class Detector:
    """images (N, 3, H, W), metadata -> N lists of detections, as geneval.geneval_check reads them.

    Of the classes that each prompt names, with the colour of the objects that a clause would judge.
    """

    find: ZeroShot
    clip: Clip                                  # that names colours
    # Those of geneval.best_by_class for this detector's scores.
    thresholds = dict(threshold=THRESHOLD, counting_threshold=THRESHOLD)

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
        crops = []
        judged = []
        for image, m, things in zip(images, metadata, found):
            for thing in self.things_to_colour(m, things):
                judged.append(thing)
                crops.append(crop_of(image, thing))
        colors = self.name_colors(crops, [thing["class"] for thing in judged])
        for thing, color in zip(judged, colors):
            thing["color"] = color
        return found

    def name_colors(self, crops: list[Tensor], names: list[str]) -> list[str]:
        """CLIP's choice among GenEval's ten colours, by three templates each.

        crops: (3, h, w) each, in [0, 1]; names: of their classes.
        """
        if not crops:
            return []
        squares = torch.stack([middle_square(crop, self.clip.side) for crop in crops])
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
    path: str, clip: str = COLOR_CLIP, *, device="cpu", batch_size: int = 8
) -> Detector:
    """A frozen Detector of an OWLv2, and a CLIP for colours.

    path, clip: local folders or hub names. Errors: see referees.load.load_model.
    """
    model, processor = load_model(
        "AutoModelForZeroShotObjectDetection", "owlv2", path, device, parts=("AutoProcessor",))
    return Detector(ZeroShot(model, processor, batch_size), load_clip(clip, device=device))
