"""Picture files: what is read is what viewers show."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from support.checkpoint import load_policy
from support.pictures import fit_size, open_picture, read_picture, texture

GOLDEN = Path(__file__).parent / "golden" / "bagel_tiny"
RAMP = (
    np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(8, 0))  # dark left, bright right


def save(tmp_path, image, name="i.png", **options):
    image.save(tmp_path / name, **options)
    return str(tmp_path / name)


def pixels_of(path):
    return np.asarray(open_picture(path)).astype(int)


def noise(height, width):
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def refusal(path):
    """The one line that names a file that cannot be read."""
    with pytest.raises((ValueError, OSError), match="cannot be read: .") as error:
        open_picture(str(path))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


# ---- what viewers show ----

CORNERS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
# The corners, row by row, that viewers show of a file whose rows hold red green / blue white.
TURNED = {
    1: "red green blue white", 2: "green red white blue", 3: "white blue green red",
    4: "blue white red green", 5: "red blue green white", 6: "blue red white green",
    7: "white green blue red", 8: "green white red blue"}


@pytest.mark.parametrize(
    "name, options", [("i.jpg", {"quality": 95, "subsampling": 0}), ("i.webp", {"lossless": True})]
)
@pytest.mark.parametrize("orientation", TURNED)
def test_a_picture_is_read_upright(tmp_path, name, options, orientation):
    image, exif = Image.new("RGB", (48, 32)), Image.Exif()
    for (x, y), colour in zip(((0, 0), (24, 0), (0, 16), (24, 16)), CORNERS.values()):
        image.paste(colour, (x, y, x + 24, y + 16))
    exif[0x0112] = orientation
    shown = pixels_of(save(tmp_path, image, name, exif=exif, **options))
    assert shown.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    corners = [shown[4, 4], shown[4, -5], shown[-5, 4], shown[-5, -5]]
    nearest = [
        min(CORNERS, key=lambda name: np.abs(CORNERS[name] - corner).sum()) for corner in corners]
    assert nearest == TURNED[orientation].split()


@pytest.mark.parametrize("name, kind", [("i.png", "uint16"), ("i.tif", "float32"), ("i.pgm", "uint16")])
def test_greys_of_more_than_eight_bits_are_refused(tmp_path, name, kind):
    image = Image.fromarray(RAMP.astype(kind) * 257)
    assert "more than 8 bits" in refusal(save(tmp_path, image, name))


@pytest.mark.parametrize(
    "mode, name, options, near",
    [
        ("1", "i.png", {}, 0), ("P", "i.png", {}, 0),
        ("CMYK", "i.jpg", {}, 4), ("RGB", "i.webp", {"lossless": True}, 0)],
)
def test_every_mode_of_file_shows_the_same_picture(tmp_path, mode, name, options, near):
    plain = Image.fromarray(np.where(RAMP > 127, 255, 0).astype(np.uint8)).convert("RGB")
    shown = pixels_of(save(tmp_path, plain.convert(mode), name, **options))
    assert np.abs(shown - np.asarray(plain)).max() <= near


PALETTE = Image.new("P", (8, 8), 1)
PALETTE.putpalette([0, 0, 0, 255, 0, 0])


@pytest.mark.parametrize(
    "image, options, wanted",
    [
        (Image.new("RGBA", (8, 8), (255, 0, 0, 128)), {}, (255, 127, 127)),
        (PALETTE, {"transparency": 1}, (255,) * 3),
        (Image.new("RGB", (8, 8), (1, 2, 3)), {"transparency": (1, 2, 3)}, (255,) * 3)],
)
def test_what_is_clear_is_white(tmp_path, image, options, wanted):
    assert np.abs(pixels_of(save(tmp_path, image, **options)) - wanted).max() <= 1


# ---- what is no picture ----

FORMATS = {
    "i.jpg": {"quality": 90}, "p.jpg": {"progressive": True}, "i.png": {},
    "l.webp": {"lossless": True}, "i.gif": {}, "i.tif": {},
    "z.tif": {"compression": "tiff_lzw"}}


@pytest.mark.parametrize("name, options", FORMATS.items())
def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path, name, options):
    path = Path(save(tmp_path, noise(40, 52), name, **options))
    whole = path.read_bytes()
    open_picture(str(path))
    for share in (0.0, 0.01, 0.1, 0.5, 0.9, 0.995):
        path.write_bytes(whole[:int(share * (len(whole) - 4))])
        refusal(path)


@pytest.mark.parametrize(
    "place", [20, 29, 3000, -14, -18]
)  # sizes, their checksum, data, its checksum, the data's own
def test_a_changed_bit_of_a_png_is_found(tmp_path, place):
    path = Path(save(tmp_path, noise(40, 52)))
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)
    refusal(path)


def encode(name, options):
    buffer = io.BytesIO()
    noise(9, 11).save(buffer, Image.registered_extensions()[Path(name).suffix], **options)
    return buffer.getvalue()


SEEDS = [encode(name, options) for name, options in FORMATS.items()]
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8)


@given(st.sampled_from(SEEDS), CHANGES, st.integers(20, 420))
def test_whatever_pil_raises_at_a_damaged_file_is_one_line(tmp_path_factory, seed, changes, within):
    raw = bytearray(seed)
    for place, byte in changes:
        raw[place % min(len(raw), within)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(raw)
    try:
        assert min(open_picture(str(path)).size) >= 1
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
        assert str(path) in str(error)


def test_what_is_no_file_is_named(tmp_path):
    refusal(tmp_path / "nowhere.png")
    refusal(tmp_path)


def test_pictures_of_very_many_pixels_are_refused_and_of_many_read_without_a_word(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 400)         # PIL warns above it and refuses above twice of it
    assert "exceeds limit" in refusal(save(tmp_path, Image.new("RGB", (50, 20))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_picture(save(tmp_path, Image.new("RGB", (25, 20)))).size == (25, 20)


# ---- sizes ----


def test_an_image_of_too_many_pixels_shrinks_each_side_by_the_ratio_of_areas_as_officially():
    assert fit_size(610, 4594, 1024, 512, 16) == (
        128, 1024)  # 512 x 3856 by the first rule, above 14 * 14 * 9 * 1024


@given(
    st.integers(1, 30_000), st.integers(1, 30_000),
    st.sampled_from([(1024, 512, 16), (980, 224, 14), (32, 32, 16)]))
def test_every_size_is_brought_to_one_that_the_policy_reads(width, height, rule):
    longest, _, stride = rule
    for side in fit_size(width, height, *rule):
        assert side % stride == 0
        assert stride <= side <= longest


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1)])
def test_a_picture_of_any_shape_is_read(tmp_path, size):
    red = torch.tensor([1.0, -1, -1])[:, None, None]
    for pixels in read_picture(
        save(tmp_path, Image.new("RGB", size, (255, 0, 0))), load_policy(GOLDEN)):
        assert min(pixels.shape[1:]) >= 8
        assert torch.allclose(pixels, red.expand_as(pixels), atol=1e-6)


# ---- saturation and roughness ----


def test_texture_tells_grey_from_glaring_and_smooth_from_rough():
    grey = torch.full((3, 8, 8), 0.7)
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 8, 8)
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().expand(3, 8, 8)
    measured = texture(torch.stack([grey, red, board]))
    assert measured["saturation"].tolist() == [0.0, 1.0, 0.0]
    assert measured["roughness"].tolist() == [0.0, 0.0, 1.0]
