"""Picture files: what is read is what viewers show, or a refusal in one line; what is written is whole and finite."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from support.checkpoint import load_policy
from support.pictures import (as_shown, fit_image, fit_size, open_picture, read_picture,
    save_grid, texture, to_tensor)

GOLDEN = Path(__file__).parent / "golden" / "bagel_tiny"
RAMP = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(8, 0)                         # dark left, bright right


def saved(tmp_path, image, name="i.png", **options):
    image.save(tmp_path / name, **options)
    return str(tmp_path / name)


def shown(path):
    return np.asarray(open_picture(path)).astype(int)


def refused(path, words=""):
    """What is said of a file, which the check before a run and the reading say alike."""
    said = []
    for verify in (True, False):
        with pytest.raises(ValueError, match="cannot be read") as error:
            open_picture(path, verify)
        said.append(str(error.value))
    assert "\n" not in said[0] and str(path) in said[0] and words in said[0] and said[0] == said[1]
    return said[0]


# ---- which way up ----


CORNERS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
# The corners, row by row, that viewers show of a file whose rows hold red green / blue white.
TURNED = {1: "red green blue white", 2: "green red white blue", 3: "white blue green red", 4: "blue white red green",
          5: "red blue green white", 6: "blue red white green", 7: "white green blue red", 8: "green white red blue"}


@pytest.mark.parametrize("name, options", [("i.jpg", {"quality": 95, "subsampling": 0}), ("i.png", {}), ("i.webp", {"lossless": True}),
                                           ("i.tif", {}), ("i.mpo", {"quality": 95, "subsampling": 0})])
@pytest.mark.parametrize("orientation", TURNED)
def test_a_picture_is_read_upright(tmp_path, name, options, orientation):
    image, exif = Image.new("RGB", (48, 32)), Image.Exif()
    for place, colour in zip(((0, 0), (24, 0), (0, 16), (24, 16)), CORNERS.values()):
        image.paste(colour, (*place, place[0] + 24, place[1] + 16))
    exif[0x0112] = orientation
    x = shown(saved(tmp_path, image, name, exif=exif, **options))
    assert x.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    corners = [x[4, 4], x[4, -5], x[-5, 4], x[-5, -5]]
    assert [min(CORNERS, key=lambda c: np.abs(CORNERS[c] - corner).sum()) for corner in corners] == TURNED[orientation].split()


def test_a_damaged_or_impossible_orientation_is_none(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 9
    for block in (exif.tobytes(), b"Exif\0\0MM\x80\0*\0\0\0\x08", b"Exif\0\0junk", b"MM\x7f*\0\0\0\x08"):
        for name in ("i.jpg", "i.webp"):
            assert np.abs(shown(saved(tmp_path, Image.fromarray(RAMP), name, exif=block)) - RAMP[..., None]).max() <= 8


# ---- numbers and colours ----


def test_greys_of_more_than_eight_bits_are_refused(tmp_path):
    for name in ("i.png", "i.tif", "i.pgm", "i.jp2"):
        refused(saved(tmp_path, Image.fromarray(RAMP.astype(np.uint16) * 257), name), "which of them is white")
    for name in ("f.tif", "f.pfm"):
        refused(saved(tmp_path, Image.fromarray(RAMP.astype(np.float32) / 255), name), "which of them is white")
    refused(saved(tmp_path, Image.fromarray(RAMP.astype(np.int32)), "i.tif"), "which of them is white")
    refused(saved(tmp_path, Image.frombytes("I;16B", (64, 8), (RAMP.astype(">u2") * 257).astype(">u2").tobytes()), "b.tif"), "white")


@pytest.mark.parametrize("mode, name, options, near", [
    ("1", "i.png", {}, 0), ("L", "i.png", {}, 0), ("P", "i.gif", {}, 0), ("P", "i.png", {}, 0), ("CMYK", "i.tif", {}, 2),
    ("CMYK", "i.jpg", {}, 4),
    ("YCbCr", "i.jpg", {}, 4), ("LAB", "i.tif", {}, 3), ("RGB", "i.webp", {"lossless": True}, 0), ("RGB", "i.bmp", {}, 0)])
def test_every_mode_of_file_shows_the_same_picture(tmp_path, mode, name, options, near):
    plain = Image.fromarray(np.where(RAMP > 127, 255, 0).astype(np.uint8)).convert("RGB")
    image = plain.convert(mode) if mode != "LAB" else ImageCms.profileToProfile(plain, *map(ImageCms.createProfile,
    ("sRGB", "LAB")), outputMode="LAB")
    assert np.abs(shown(saved(tmp_path, image, name, **options)) - np.asarray(plain)).max() <= near


def premultiplied(path):
    """A TIFF whose alpha is said to be multiplied into its colours already: ExtraSamples 2 becomes 1."""
    raw = bytearray(Path(path).read_bytes())
    start, = struct.unpack("<I", raw[4:8])
    for entry in range(start + 2, start + 2 + 12 * struct.unpack("<H", raw[start:start + 2])[0], 12):
        if raw[entry:entry + 2] == struct.pack("<H", 338):
            raw[entry + 8] = 1
    Path(path).write_bytes(raw)
    return path


def test_what_is_clear_is_white(tmp_path):
    half = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert np.abs(shown(saved(tmp_path, half)) - (255, 127, 127)).max() <= 1
    assert np.abs(shown(saved(tmp_path, Image.new("LA", (8, 8), (0, 51)))) - 204).max() <= 1
    assert np.abs(shown(saved(tmp_path, half, "i.webp", lossless=True)) - (255, 127, 127)).max() <= 1
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert (shown(saved(tmp_path, palette, transparency=1)) == 255).all()
    assert np.abs(shown(saved(tmp_path, palette, transparency=b"\xff\x80")) - (255, 127, 127)).max() <= 1
    assert (shown(saved(tmp_path, palette, "i.gif", transparency=1)) == 255).all()
    assert (shown(saved(tmp_path, Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3))) == 255).all()
    assert (shown(saved(tmp_path, Image.new("L", (8, 8), 7), transparency=7)) == 255).all()
    multiplied = premultiplied(saved(tmp_path, Image.new("RGBA", (8, 8), (128, 0, 0, 128)), "i.tif"))
    assert np.abs(shown(multiplied) - (255, 127, 127)).max() <= 2


def test_of_a_moving_picture_the_first_frame_is_read(tmp_path):
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for name, options in (("i.gif", {}), ("i.png", {}), ("i.webp", {"lossless": True}), ("i.tif", {})):
        x = shown(saved(tmp_path, first, name, save_all=True, append_images=[second], **options))
        assert np.abs(x - (255, 0, 0)).max() <= 3


def profile(primaries, gamma, space=b"RGB "):
    """An ICC profile of three primaries (XYZ under D50), or of grey, with a power for its tone curve."""
    fixed = lambda *numbers: b"".join(struct.pack(">i", round(n * 65536)) for n in numbers)
    xyz = lambda *numbers: b"XYZ \0\0\0\0" + fixed(*numbers)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    tags = {b"desc": text + bytes(-len(text) % 4), b"wtpt": xyz(0.9642, 1.0, 0.8249), b"cprt": b"text\0\0\0\0x\0\0\0"}
    tags |= {b"kTRC": curve} if space == b"GRAY" else {c + b"XYZ": xyz(*p) for c, p in zip((b"r", b"g", b"b"), primaries)}
    tags |= {} if space == b"GRAY" else {c + b"TRC": curve for c in (b"r", b"g", b"b")}
    place, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", place + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s", place + len(data), bytes(4), 0x02100000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp" + bytes(28)
    head += fixed(0.9642, 1.0, 0.8249)
    return head + bytes(128 - len(head)) + struct.pack(">I", len(tags)) + table + data


P3 = profile([(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)], 2.2)


def test_colours_of_a_wide_profile_are_brought_to_srgb(tmp_path):
    image = Image.new("RGB", (8, 8), (200, 100, 100))
    plain, wide = shown(saved(tmp_path, image)), shown(saved(tmp_path, image, "w.png", icc_profile=P3))
    assert (plain == (200, 100, 100)).all()
    assert 8 < wide[0, 0, 0] - 200 < 25 and wide[0, 0, 1] < 100          # Display P3's red is redder than sRGB's
    assert np.abs(shown(saved(tmp_path, image.quantize(), "p.png", icc_profile=P3)) - wide).max() <= 1
    image.putalpha(128)
    assert np.abs(shown(saved(tmp_path, image, "a.png", icc_profile=P3)) - (wide + 255) / 2).max() <= 2


def test_greys_of_a_linear_profile_are_brought_to_srgb(tmp_path):
    linear = profile([], 1.0, b"GRAY")
    x = shown(saved(tmp_path, Image.fromarray(RAMP), icc_profile=linear))
    assert 180 < x[0, 32, 0] < 195 and x[0, 0, 0] == 0 and x[0, -1, 0] == 255           # half of the light is 188 of 255


@pytest.mark.parametrize("block", [b"junk", P3[:200], P3[:60] + bytes(400), profile([], 1.0, b"GRAY")])
def test_a_profile_that_is_damaged_or_of_other_colours_is_passed_over(tmp_path, block):
    image = Image.new("RGB", (8, 8), (200, 100, 100))
    assert (shown(saved(tmp_path, image, icc_profile=block)) == (200, 100, 100)).all()
    inks = image.convert("CMYK")
    assert (shown(saved(tmp_path, inks, "a.tif", icc_profile=P3)) == shown(saved(tmp_path, inks, "b.tif"))).all()


def test_the_profile_of_srgb_itself_changes_nothing(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(shown(saved(tmp_path, image, icc_profile=own)) - np.asarray(image)).max() <= 1


def test_what_is_shown_is_shown_once(tmp_path):
    """A picture that was read is read again as it is: neither turned nor recoloured twice."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = open_picture(saved(tmp_path, Image.new("RGB", (20, 10), (200, 100, 100)), exif=exif, icc_profile=P3))
    assert image.size == (10, 20) and as_shown(image).tobytes() == image.tobytes() and not image.info


# ---- what is no picture ----


FORMATS = {"i.jpg": {"quality": 90}, "p.jpg": {"progressive": True}, "i.png": {}, "i.webp": {}, "l.webp": {"lossless": True},
           "i.gif": {}, "i.bmp": {}, "i.tif": {}, "z.tif": {"compression": "tiff_lzw"}, "i.ppm": {}}


@pytest.mark.parametrize("name, options", FORMATS.items())
def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path, name, options):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8))
    whole = Path(saved(tmp_path, image, name, **options)).read_bytes()
    open_picture(str(tmp_path / name), verify=True)
    for share in (0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 0.995):
        (tmp_path / name).write_bytes(whole[:int(share * (len(whole) - 4))])
        refused(str(tmp_path / name))


def test_a_changed_bit_of_a_png_is_found(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8)))
    whole = Path(path).read_bytes()
    for place in (20, 29, len(whole) // 2, -14, -18):           # sizes, their checksum, data, its checksum, the data's own
        raw = bytearray(whole)
        raw[place] ^= 1
        Path(path).write_bytes(raw)
        refused(path)


def chunks(raw, change):
    """A PNG whose chunks (type, data) were changed, with right checksums."""
    at, held = 8, []
    while at < len(raw):
        n, = struct.unpack(">I", raw[at:at + 4])
        held.append((raw[at + 4:at + 8], raw[at + 8:at + 8 + n]))
        at += 12 + n
    return raw[:8] + b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in change(held))


def test_a_png_without_data_or_pixels_is_refused(tmp_path):
    raw = Path(saved(tmp_path, Image.fromarray(RAMP))).read_bytes()
    for i, change in enumerate((lambda held: [c for c in held if c[0] != b"IDAT"],
                                lambda held: [(t, bytes(8) + d[8:] if t == b"IHDR" else d) for t, d in held],
                                lambda held: [(t, d[:4] + bytes(4) + d[8:] if t == b"IHDR" else d) for t, d in held])):
        (tmp_path / f"{i}.png").write_bytes(chunks(raw, change))
        refused(str(tmp_path / f"{i}.png"))


def whole(name, options):
    """The bytes of a small picture, with an orientation, in the format that its name says."""
    held, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    image.save(held, Image.registered_extensions()[Path(name).suffix], exif=exif, **options)
    return held.getvalue()


SEEDS = [whole(name, options) for name, options in FORMATS.items()]


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 400))
def test_whatever_pil_raises_at_a_damaged_file_is_one_line(tmp_path_factory, seed, changes, within):
    raw = bytearray(seed)
    for place, byte in changes:
        raw[place % min(len(raw), within + 20)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(raw)
    try:
        assert min(open_picture(str(path)).size) >= 1
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)


def test_what_is_no_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png does not exist"):
        open_picture(str(tmp_path / "nowhere.png"))
    refused(str(tmp_path))


def bmp_of(width, height):
    raw = io.BytesIO()
    Image.new("RGB", (1, 1)).save(raw, "BMP")
    raw = bytearray(raw.getvalue())
    raw[18:26] = struct.pack("<ii", width, height)
    return bytes(raw)


def test_pictures_of_very_many_pixels_are_refused_and_of_many_read_without_a_word(tmp_path, monkeypatch, capfd):
    (tmp_path / "huge.bmp").write_bytes(bmp_of(60_000, 60_000))
    refused(str(tmp_path / "huge.bmp"), "exceeds limit")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)         # PIL warns above it and refuses above twice of it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert open_picture(saved(tmp_path, Image.new("RGB", (25, 20)))).size == (25, 20)
    assert not caught and capfd.readouterr().err == ""


# ---- sizes ----


def test_an_image_of_too_many_pixels_shrinks_each_side_by_the_ratio_of_areas_as_the_official_rule_does():
    assert fit_size(610, 4594, 1024, 512, 16) == (128, 1024)    # 512 x 3856 by the first rule, above 14 * 14 * 9 * 1024


@given(st.integers(1, 30_000), st.integers(1, 30_000), st.sampled_from([(1024, 512, 16), (980, 224, 14), (48, 24, 8), (32, 32, 16)]))
def test_every_size_is_brought_to_one_that_the_policy_reads(width, height, rule):
    longest, _, stride = rule
    w, h = fit_size(width, height, *rule)
    assert w % stride == h % stride == 0 and stride <= min(w, h) and max(w, h) <= longest


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (2, 3000)])
def test_a_picture_of_any_shape_is_read(tmp_path, size):
    policy = load_policy(GOLDEN)
    for x in read_picture(saved(tmp_path, Image.new("RGB", size, (255, 0, 0))), policy):
        assert x.shape[0] == 3 and min(x.shape[1:]) >= 8 and ((x - torch.tensor([1.0, -1, -1])[:, None, None]).abs() < 1e-6).all()


def test_a_fitted_image_is_in_rgb_whatever_it_was():
    image = fit_image(Image.new("RGBA", (100, 50), (255, 0, 0, 0)), 48, 24, 8)
    assert image.size == (48, 24) and (to_tensor(image) == 1).all()


# ---- grids ----


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_not_written(tmp_path, number):
    images = torch.rand(3, 3, 8, 8)
    save_grid(images, str(tmp_path / "grid.png"), columns=2)
    old = (tmp_path / "grid.png").read_bytes()
    images[1, 0, 4, 4] = number
    with pytest.raises(FloatingPointError, match="grid.png is not written: 1 of 3 images") as error:
        save_grid(images, str(tmp_path / "grid.png"), columns=2)
    assert "\n" not in str(error.value) and (tmp_path / "grid.png").read_bytes() == old


def test_a_grid_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    save_grid(torch.rand(1, 3, 8, 8), str(tmp_path / "grid.png"), columns=1)
    old, write = (tmp_path / "grid.png").read_bytes(), Path.write_bytes

    def full(path, content):
        write(path, content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="grid.png could not be written"):
        save_grid(torch.rand(1, 3, 8, 8), str(tmp_path / "grid.png"), columns=1)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [old]


def test_texture_tells_grey_from_glaring_and_smooth_from_rough():
    grey = torch.full((3, 8, 8), 0.7)
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 8, 8)
    board = (torch.arange(8)[:, None] + torch.arange(8)).remainder(2).float().expand(3, 8, 8)
    seen = texture(torch.stack([grey, red, board]))
    assert seen["saturation"].tolist() == [0.0, 1.0, 0.0] and seen["roughness"].tolist() == [0.0, 0.0, 1.0]
