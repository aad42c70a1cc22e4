"""Objects in real pictures, for GenEval's rules: published detectors by transformers, and colours by CLIP.

GenEval's own detector needs mmdet, which no current PyTorch builds. Here three kinds stand behind one call, `images, classes -> things`:
Mask2Former with COCO's classes, Grounding DINO and OWLv2 with the classes that a prompt names. `Detector` adds colours and gives what
geneval.Instruction reads. Scores of another detector are scores of another benchmark: say "GenEval rules, detector X".

Notation: N images (N, 3, H, W) in [0, 1], Q queries of a detector, boxes (x1, y1, x2, y2) in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from referees.geneval import COLORS, ranked
from referees.load import kind_of, load_model
from referees.siglip import Clip, OpenClip, load_clip

# Names of GenEval that a detector's config may have otherwise: COCO's own, or the older ones of VOC.
OTHER_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard", "motorcycle": "motorbike",
               "airplane": "aeroplane", "couch": "sofa", "potted plant": "pottedplant", "dining table": "diningtable", "tv": "tvmonitor"}
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")     # GenEval's
GREY = 0.6                                                      # #999, which stands for the ground around an object
LEAST = 0.05                                                    # what scores less is no detection under any threshold


def suppressed(boxes: Tensor, scores: Tensor, most: float) -> list[int]:
    """Non-maximum suppression: places of the boxes (Q, 4) that overlap no better one by more than `most` (IoU), best first."""
    order, kept = scores.argsort(descending=True, stable=True).tolist(), []
    overlap = intersection_over_union(boxes)
    for i in order:
        if all(overlap[i, j] <= most for j in kept):
            kept.append(i)
    return kept


def intersection_over_union(boxes: Tensor) -> Tensor:
    """(Q, Q) of boxes (Q, 4)."""
    area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)                                 # (Q,)
    low, high = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(2)                                                # (Q, Q)
    return shared / (area[:, None] + area - shared).clamp(min=1e-9)


def box_of(mask: Tensor) -> list[float]:
    """The box around the true pixels of a mask (H, W)."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [float(x) for x in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]


# Buffers of Swin that an older transformers stored and this one computes; a norm of Swin's that no Mask2Former reads.
LEGACY = r"relative_position_index$|\.swin\.layernorm\."


class NoLoss(torch.nn.Module):
    """Stands for the training loss that transformers builds into every Mask2Former, which wants scipy and is never asked here."""

    def __init__(self, config, weight_dict):
        super().__init__()
        self.num_labels, self.eos_coef = config.num_labels, config.no_object_weight
        self.register_buffer("empty_weight", torch.ones(config.num_labels + 1))               # which checkpoints hold


def load_mask2former(path: str, *, device="cpu", batch_size: int = 8) -> "Mask2Former":
    from transformers.models.mask2former import modeling_mask2former as house
    built, house.Mask2FormerLoss = house.Mask2FormerLoss, NoLoss
    try:
        parts = load_model("AutoModelForUniversalSegmentation", ("mask2former",), path, device, parts=("AutoImageProcessor",),
                           harmless=LEGACY)
    finally:
        house.Mask2FormerLoss = built
    return Mask2Former(*parts, batch_size)


@dataclass
class Mask2Former:
    """Instance masks with the classes of its config (COCO); boxes around the masks, no suppression, as in GenEval.

    A thing's score is its class's probability times the mean probability of its mask's pixels, as mmdet and transformers have it.
    GenEval's thresholds are for mmdet's own weights of this architecture; those of the hub are Meta's.
    """

    model: torch.nn.Module
    image_processor: Callable
    batch_size: int = 8
    threshold: float = 0.3
    counting_threshold: float = 0.9

    def unknown(self, classes: set[str]) -> set[str]:
        """The classes that it cannot find."""
        return {name for name in classes if self.label(name) is None}

    def label(self, name: str) -> int | None:
        known = self.model.config.label2id
        return known.get(name, known.get(OTHER_NAMES.get(name, name)))

    @torch.no_grad()
    def __call__(self, images: Tensor, classes: list[list[str]]) -> list[list[dict]]:
        out = []
        for i in range(0, len(images), self.batch_size):
            part, asked = images[i:i + self.batch_size], classes[i:i + self.batch_size]
            given = self.image_processor(list(part), do_rescale=False, return_tensors="pt").to(self.model.device, self.model.dtype)
            read = self.model(**given)
            inside = given.pixel_mask[0].bool()                 # all images are of one size, so the padding is the same
            h, w = int(inside[:, 0].sum()), int(inside[0].sum())
            chances = read.class_queries_logits.float().softmax(-1)[..., :-1]                 # (n, Q, classes)
            for n, names in enumerate(asked):
                logits = read.masks_queries_logits[n].float()                                 # (Q, h', w')
                out.append(self.things(chances[n], logits, inside.shape, (h, w), part.shape[-2:], names))
        return out

    def things(self, chances: Tensor, logits: Tensor, padded, read, size, names: list[str]) -> list[dict]:
        """One image's things: chances (Q, classes), mask logits (Q, h', w') of the padded image, cut to what was read."""
        found = []
        for name in names:
            chance = chances[:, self.label(name)]                                             # (Q,)
            for q in (chance > LEAST).nonzero().flatten().tolist():
                mask = F.interpolate(logits[None, q:q + 1], tuple(padded), mode="bilinear", align_corners=False)
                mask = F.interpolate(mask[..., :read[0], :read[1]], tuple(size), mode="bilinear", align_corners=False)[0, 0]
                inside = mask > 0                                                             # (H, W)
                score = (chance[q] * mask.sigmoid()[inside].mean()).item() if inside.any() else 0.0
                if score > LEAST:
                    found.append({"class": name, "box": box_of(inside), "score": score, "mask": inside})
        return found


@dataclass
class ZeroShot:
    """Grounding DINO or OWLv2, asked for the classes that a prompt names; per class, boxes that overlap a better one are left out.

    A box has one class, the one that scores highest; in Grounding DINO a class scores as the best of its words. Its thresholds are lower
    than GenEval's, whose counting threshold presumes another detector's confidence; there are no masks, so that colours are read from
    the whole box.
    """

    model: torch.nn.Module
    processor: Callable
    batch_size: int = 8
    threshold: float = 0.25
    counting_threshold: float = 0.25
    overlap: float = 0.5

    def unknown(self, classes: set[str]) -> set[str]:
        return set()

    @torch.no_grad()
    def __call__(self, images: Tensor, classes: list[list[str]]) -> list[list[dict]]:
        out: list[list[dict]] = [[] for _ in images]
        for names in dict.fromkeys(map(tuple, classes)):        # one text a call
            mine = [n for n, each in enumerate(classes) if tuple(each) == names] if names else []
            for i in range(0, len(mine), self.batch_size):
                rows = mine[i:i + self.batch_size]
                scores, boxes = self.scored(images[rows], list(names))
                for n, *one in zip(rows, scores, boxes):
                    out[n] = self.things(*one, images.shape[-2:], names)
        return out

    def scored(self, images: Tensor, names: list[str]) -> tuple[Tensor, Tensor]:
        """Scores (n, Q, classes) in [0, 1] and boxes (n, Q, 4), centre and size relative to the image."""
        dino = self.model.config.model_type == "grounding-dino"
        text = [". ".join(names) + "."] * len(images) if dino else [[f"a photo of a {name}" for name in names]] * len(images)
        given = self.processor(images=list(images), text=text, do_rescale=False, return_tensors="pt").to(self.model.device)
        read = self.model(**given)
        scores = read.logits.float().sigmoid()                                                # (n, Q, classes or words)
        if dino:
            spans = self.processor.tokenizer(text[0], return_offsets_mapping=True).offset_mapping
            scores = torch.stack([scores[..., self.words(names, k, spans)].amax(-1) for k in range(len(names))], -1)
        return scores, read.pred_boxes.float()

    @staticmethod
    def words(names: list[str], k: int, spans: list[tuple[int, int]]) -> list[int]:
        """Places of the tokens of the k-th name in "first. second. third."."""
        start = sum(len(name) + 2 for name in names[:k])
        return [i for i, (a, b) in enumerate(spans) if b > a >= start and b <= start + len(names[k])]

    def things(self, scores: Tensor, boxes: Tensor, size: tuple[int, int], names: tuple[str, ...]) -> list[dict]:
        H, W = size
        if self.model.config.model_type == "owlv2":             # it pads to a square, to the right and below
            H = W = max(H, W)
        centre, extent = boxes[:, :2], boxes[:, 2:]
        corners = torch.cat([centre - extent / 2, centre + extent / 2], 1) * torch.tensor([W, H, W, H], device=boxes.device)   # (Q, 4)
        corners = corners.clamp(min=0).minimum(torch.tensor([*size[::-1], *size[::-1]], device=boxes.device))
        best, which = scores.max(-1)                                                          # (Q,)
        found = []
        for k, name in enumerate(names):
            mine = ((which == k) & (best > LEAST)).nonzero().flatten()
            kept = mine[suppressed(corners[mine], best[mine], self.overlap)] if len(mine) else mine
            found += [{"class": name, "box": corners[q].tolist(), "score": best[q].item()} for q in kept.tolist()]
        return found


@dataclass
class Colors:
    """The colour of an object: CLIP's choice among GenEval's ten, three templates each, on its crop with the ground greyed."""

    clip: Clip | OpenClip

    def __call__(self, crops: list[Tensor], names: list[str]) -> list[str]:
        """crops: (3, h, w) each in [0, 1]; names: of their classes."""
        if not crops:
            return []
        embedded = self.clip.embed_images(torch.stack([middle(crop, self.clip.size) for crop in crops]))          # (n, D)
        texts = {}
        for name in dict.fromkeys(names):
            asked = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            texts[name] = F.normalize(self.clip.embed_texts(asked).view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)
        return [COLORS[int((texts[name] @ each).argmax())] for name, each in zip(names, embedded)]


def middle(crop: Tensor, size: int) -> Tensor:
    """(3, h, w) -> (3, size, size): the square in the middle, resized, as CLIP was trained and GenEval reads crops."""
    h, w = crop.shape[-2:]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    square = crop[None, :, top:top + side, left:left + side].float()
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)


def crop_of(image: Tensor, thing: dict) -> Tensor:
    """(3, h, w): what is inside a thing's box, all that is outside its mask in grey."""
    x1, y1, x2, y2 = (int(side) for side in thing["box"])
    x1, y1 = min(x1, image.shape[2] - 1), min(y1, image.shape[1] - 1)
    x2, y2 = max(x2, x1 + 1), max(y2, y1 + 1)
    if "mask" in thing:
        image = torch.where(thing["mask"].to(image.device), image, GREY)
    return image[:, y1:y2, x1:x2]


@dataclass
class Detector:
    """images (N, 3, H, W), metadata -> N lists of detections as geneval.geneval_check reads them: of the classes that each prompt names,
    with the colour of the objects that a clause would judge."""

    find: Mask2Former | ZeroShot
    colors: Colors
    name: str = ""

    def __post_init__(self):
        self.settings = {"threshold": self.find.threshold, "counting_threshold": self.find.counting_threshold}

    def check(self, metadata: list[dict]) -> None:
        """ValueError where it knows not one of a prompt's classes, or a clause asks for a colour that is none of the ten."""
        named = {clause["class"] for m in metadata for clause in clauses_of(m)}
        if unknown := sorted(self.find.unknown(named)):
            raise ValueError(f"the detector {self.name} does not know {', '.join(unknown[:5])}"
                             f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}; use one that reads class names, such as "
                             "google/owlv2-base-patch16-ensemble, or other prompts")
        if other := sorted({clause["color"] for m in metadata for clause in clauses_of(m) if "color" in clause} - set(COLORS)):
            raise ValueError(f"GenEval's colours are {', '.join(COLORS)}, not {', '.join(other[:5])}")

    def __call__(self, images: Tensor, metadata: list[dict]) -> list[list[dict]]:
        found = self.find(images, [list(dict.fromkeys(clause["class"] for clause in clauses_of(m))) for m in metadata])
        judged = [(n, thing) for n, (m, things) in enumerate(zip(metadata, found)) for thing in self.coloured(m, things)]
        crops = [crop_of(images[n], thing) for n, thing in judged]
        for (_, thing), color in zip(judged, self.colors(crops, [thing["class"] for _, thing in judged])):
            thing["color"] = color
        return found

    def coloured(self, metadata: dict, things: list[dict]) -> list[dict]:
        """The things whose colour a clause asks for: the best `count` of its class."""
        best = ranked(metadata, things, **self.settings)
        asked = [clause for clause in metadata.get("include", []) if "color" in clause]
        return list({id(thing): thing for clause in asked for thing in best.get(clause["class"], [])[:clause["count"]]}.values())


def clauses_of(metadata: dict) -> list[dict]:
    return [*metadata.get("include", []), *metadata.get("exclude", [])]


def load_detector(path: str, colors: str, *, device="cpu", batch_size: int = 8) -> Detector:
    """A frozen Detector from local folders or hub names: a Mask2Former, Grounding DINO or OWLv2; and a CLIP for colours, of transformers
    or open_clip. Errors: see referees.load_model."""
    if kind_of(path) == "mask2former":
        find = load_mask2former(path, device=device, batch_size=batch_size)
    else:
        model, processor = load_model("AutoModelForZeroShotObjectDetection", ("grounding-dino", "owlv2"), path, device,
                                      parts=("AutoProcessor",))
        find = ZeroShot(model, processor, batch_size, *((0.1, 0.1) if model.config.model_type == "owlv2" else (0.25, 0.25)))
    return Detector(find, Colors(load_clip(colors, device=device)), path)
