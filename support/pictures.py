"""Pictures from files and into files: as people see them, as the policy reads them, as PNG grids.

Pixels that the policy reads are (3, H, W) in [-1, 1]; images that are written are (N, 3, H, W) in [0, 1].
"""

import io
import struct
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from policy import Policy
from support.disk import write_atomic


def fit_size(width: int, height: int, longest: int, shortest: int, stride: int, most: int = 14 * 14 * 9 * 1024) -> tuple[int, int]:
    """BAGEL's resize rule: the (width, height), multiples of stride, that an input image is brought to before it is read."""
    snap = lambda n: max(stride, int(round(n / stride) * stride))
    scaled = lambda w, h, s: (snap(round(w * s)), snap(round(h * s)))
    scale = max(min(longest / max(width, height), 1.0), shortest / min(width, height))
    w, h = scaled(width, height, scale)
    if w * h > most:
        w, h = scaled(w, h, most / (w * h))                     # of areas, applied to sides, as the official rule has it
    if max(w, h) > longest:
        w, h = scaled(w, h, longest / max(w, h))
    return w, h


def of_eight_bits(image):
    """A decoded PIL image -> (the same in mode L, RGB or CMYK, its alpha channel or None). ValueError where white could be any number."""
    alpha, grey = None, image.mode in ("1", "L", "LA")
    if image.mode[0] in "IF":                                   # I;16, I, F, of which PIL would cut off what is above 255
        raise ValueError(f"its greys (mode {image.mode}) have more than 8 bits, and it is not said which of them is white; save it with 8")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa"):
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = image if image.mode == "CMYK" else image.convert("RGB")
    return image.convert("L") if grey else image, alpha


# What EXIF calls the orientation -> PIL's Image.Transpose that turns the picture upright.
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


def as_shown(image):
    """A decoded PIL image -> RGB as viewers show it: upright, in sRGB, on white. As they do, it passes over EXIF and colour profiles that
    are damaged."""
    from PIL import Image, ImageCms
    profile, turn = image.info.get("icc_profile"), None
    with suppress(SyntaxError, ValueError, TypeError, struct.error):
        turn = UPRIGHT.get(image.getexif().get(0x0112))
    image, alpha = of_eight_bits(image)
    if profile:
        with suppress(OSError, ImageCms.PyCMSError, ImportError):           # ImportError: PIL was built without LittleCMS
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            image = ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image.convert("RGB"), mask=alpha)
    return white if turn is None else white.transpose(turn)


def fit_image(image, longest: int, shortest: int, stride: int):
    """A PIL image as it is shown, resized by BAGEL's rule (bicubic)."""
    from PIL import Image
    image = as_shown(image)
    return image.resize(fit_size(*image.size, longest, shortest, stride), Image.Resampling.BICUBIC)


def to_tensor(image) -> Tensor:
    """An RGB PIL image -> (3, H, W) fp32 in [-1, 1]."""
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, 3).permute(2, 0, 1) / 127.5 - 1


def open_picture(path: str, verify: bool = False):
    """The picture in a file, all of it, as it is shown: a PIL image in RGB. ValueError or FileNotFoundError, in one line, for what is none.
    verify=True is the check before a run: it decodes all of the file as well, but a JPEG into an eighth of its size."""
    from PIL import Image
    # What PIL was seen to raise for damaged files of its formats.
    errors = (OSError, SyntaxError, ValueError, RuntimeError, TypeError, IndexError, AttributeError, MemoryError, struct.error,
              Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # of many pixels, odd metadata, odd palettes
            with Image.open(path) as image:
                image.verify()                                  # the checksums of a PNG, which decoding passes over
            with Image.open(path) as image:
                if verify:
                    image.draft(None, (1, 1))
                image.load()
                if min(image.size) < 1:
                    raise ValueError("it has no pixels")
                return as_shown(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image {path} does not exist") from error
    except errors as error:
        raise ValueError(f"image {path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error


def read_picture(path: str, policy: Policy, square: bool = False) -> tuple[Tensor, Tensor]:
    """An image file as the policy's ViT and as its autoencoder read it, (3, H, W) in [-1, 1] each. The ViT's is made of the other, as
    BAGEL does. square: the square in its middle alone."""
    image = open_picture(path)
    if square:
        side = min(image.size)
        left, top = ((n - side) // 2 for n in image.size)
        image = image.crop((left, top, left + side, top + side))
    source = fit_image(image, *policy.config.vae_resize)
    return to_tensor(fit_image(source, *policy.config.vit_resize)), to_tensor(source)


def texture(images: Tensor) -> dict[str, Tensor]:
    """What pixels are like, of images (N, 3, H, W) in [0, 1], (N,) each in [0, 1]: saturation, the mean range of a pixel's channels;
    roughness, the mean step between neighbouring pixels. Both rise where a policy games a reward by glaring colours, noise or a grid."""
    across, down = images.diff(dim=3).abs().mean((1, 2, 3)), images.diff(dim=2).abs().mean((1, 2, 3))
    return {"saturation": (images.amax(1) - images.amin(1)).mean((1, 2)), "roughness": (across + down) / 2}


def to_bytes(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [0, 1] -> uint8 (N, H, W, 3), rounded."""
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def save_grid(images: Tensor, path: str, columns: int, zoom: int = 1) -> None:
    """Write (N, 3, H, W) in [0, 1] as one PNG, row by row, with a thin gap. FloatingPointError for pixels that are not finite."""
    from PIL import Image
    if not (sound := images.isfinite().flatten(1).all(1)).all():            # 8 bits would make the others black
        raise FloatingPointError(f"{path} is not written: {int((~sound).sum())} of {len(images)} images hold pixels that are not finite")
    cells = to_bytes(images).repeat(zoom, 1).repeat(zoom, 2)
    cells = np.pad(cells, ((0, -len(cells) % columns), (0, 2), (0, 2), (0, 0)), constant_values=255)
    png = io.BytesIO()
    Image.fromarray(rearrange(cells, "(r c) h w k -> (r h) (c w) k", c=columns)[:-2, :-2]).save(png, "PNG")
    write_atomic(Path(path), png.getvalue())
