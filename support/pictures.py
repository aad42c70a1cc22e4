"""Pictures from files and into files: as people see them, as the policy reads them, as PNG grids.

Pixels that the policy reads are (3, H, W) in [-1, 1]; images that are written are (N, 3, H, W) in
[0, 1].
"""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from policy import Policy
from support.disk import one_line_error, replacing

MOST_PIXELS = 14 * 14 * 9 * 1024                # of an input image, by the official rule


def fit_size(width: int, height: int, longest: int, shortest: int, stride: int) -> tuple[int, int]:
    """The (width, height), multiples of stride, to which an input image is resized. [BAGEL]"""
    scale = max(min(longest / max(width, height), 1.0), shortest / min(width, height))
    w, h = scale_size(width, height, scale, stride)
    if w * h > MOST_PIXELS:
        areas = MOST_PIXELS / (w * h)           # applied to sides, as the official code does
        w, h = scale_size(w, h, areas, stride)
    if max(w, h) > longest:
        w, h = scale_size(w, h, longest / max(w, h), stride)
    return w, h


def scale_size(width: int, height: int, scale: float, stride: int) -> tuple[int, int]:
    return tuple(
        max(stride, round(round(side * scale) / stride) * stride) for side in (width, height))


def as_shown(image):
    """A decoded PIL image -> RGB as viewers show it: upright, and on white where it is transparent.

    Errors: ValueError for greys of more than 8 bits: the file does not say which one is white.
    """
    from PIL import Image, ImageOps

    if image.mode[0] in "IF":
        raise ValueError(f"its greys (mode {image.mode}) have more than 8 bits; save it with 8")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def fit_image(image, longest: int, shortest: int, stride: int):
    """An RGB PIL image, resized by BAGEL's rule (bicubic)."""
    from PIL import Image

    return image.resize(fit_size(*image.size, longest, shortest, stride), Image.Resampling.BICUBIC)


def pad_square(image, side: int):
    """An RGB PIL image whose longer side is `side`, in the middle of a grey square. [Janus]

    The shorter side is rounded, as transformers does; the official code cuts it off.
    """
    from PIL import Image, ImageOps

    square = Image.new("RGB", (side, side), (127, 127, 127))
    small = ImageOps.contain(image, (side, side), Image.Resampling.BICUBIC)
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    return square


def to_tensor(image) -> Tensor:
    """An RGB PIL image -> (3, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def open_picture(path: str):
    """The picture in a file as it is shown: a PIL image in RGB, with all of the file decoded.

    Errors: OSError or ValueError, in one line, for a file that is missing, damaged or no picture.
    """
    from PIL import Image

    with one_line_error(f"image {path[:200]} cannot be read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")         # of many pixels, odd metadata, odd palettes
        with Image.open(path) as image:
            image.verify()                      # the checksums of a PNG, which decoding ignores
        with Image.open(path) as image:
            image.load()
            return as_shown(image)


def read_picture(path: str, policy: Policy, square: bool = False) -> tuple[Tensor, Tensor]:
    """An image file as the policy's ViT and as its autoencoder read it, (3, H, W) in [-1, 1] each.

    The ViT's image is made from the autoencoder's, as BAGEL does; Janus has one, a grey square.
    square: read only the square in the middle.
    """
    image = open_picture(path)
    if square:
        side = min(image.size)
        left = (image.width - side) // 2
        top = (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if not policy.reads_latents:
        pixels = to_tensor(pad_square(image, policy.config.side))
        return pixels, pixels
    source = fit_image(image, *policy.config.vae_resize)
    return to_tensor(fit_image(source, *policy.config.vit_resize)), to_tensor(source)


def vit_pixels(policy: Policy, images: list[Tensor] | Tensor) -> list[Tensor]:
    """Drawn images, nominally in [-1, 1], as the ViT reads them: clamped and resized."""
    out = []
    for image in images:
        height, width = image.shape[-2:]
        new_width, new_height = fit_size(width, height, *policy.config.vit_resize)
        size = (new_height, new_width)
        image = image[None].clamp(-1, 1)
        if size != image.shape[-2:]:
            image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)
        out.append(image[0])
    return out


def texture(images: Tensor) -> dict[str, Tensor]:
    """Saturation and roughness of images (N, 3, H, W) in [0, 1], each (N,) in [0, 1].

    Saturation is the mean range of a pixel's channels, roughness the mean step between neighbouring
    pixels. Both rise when a policy games a reward by glaring colours, noise or a grid.
    """
    across, down = (images.diff(dim=dim).abs().mean((1, 2, 3)) for dim in (3, 2))
    saturation = (images.amax(1) - images.amin(1)).mean((1, 2))
    return dict(saturation=saturation, roughness=(across + down) / 2)


def to_bytes(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] -> uint8 (N, H, W, 3), rounded."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(images: Tensor, path: Path, columns: int, zoom: int = 1) -> None:
    """Write (N, 3, H, W) in [0, 1] as one PNG, row by row, with a thin gap."""
    from PIL import Image

    cells = to_bytes(images).repeat(zoom, 1).repeat(zoom, 2)
    cells = np.pad(cells, ((0, -len(cells) % columns), (0, 2), (0, 2), (0, 0)), constant_values=255)
    grid = rearrange(cells, "(r c) h w k -> (r h) (c w) k", c=columns)[:-2, :-2]
    with replacing(path) as file:
        Image.fromarray(grid).save(file, "PNG")
