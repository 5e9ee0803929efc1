"""Decoding images: by hand, against torchvision, and fuzzed."""

import io
import subprocess
import sys
import warnings

import numpy as np
import paint
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from selective_ray import images
from selective_ray.images import Rejected, decode, thumbnail

PIXELS = paint.picture()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def center(data: bytes) -> tuple[int, ...]:
    """The color in the middle of a flat image."""
    return tuple(int(value) for value in decode(data, size=8, crop=0.875)[4, 4])


def test_images_needs_neither_torch_nor_ray():
    code = "import sys, selective_ray.images; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Decoding


@pytest.mark.parametrize(
    "shape", [(96, 64), (64, 96), (300, 301), (301, 300), (20, 13), (64, 64), (1000, 90)]
)
@pytest.mark.parametrize(("size", "crop"), [(32, 0.875), (33, 0.9), (48, 1.0)])
def test_decode_equals_torchvision(shape, size, crop):
    from torchvision.transforms import v2

    pixels = np.random.default_rng(1).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    expected = v2.CenterCrop(size)(v2.Resize(round(size / crop))(image))
    got = decode(paint.png(pixels), size=size, crop=crop)
    assert got.dtype == np.uint8 and got.shape == (size, size, 3)
    assert apart(got, np.asarray(expected)) <= 1


@pytest.mark.parametrize("shape", [(96, 64), (300, 301), (20, 13), (48, 48)])
def test_bicubic_decode_equals_torchvision(shape):
    from torchvision.transforms import InterpolationMode, v2

    pixels = np.random.default_rng(2).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    resize = v2.Resize(32, InterpolationMode.BICUBIC)
    expected = np.asarray(v2.CenterCrop(28)(resize(Image.fromarray(pixels))))
    got = decode(paint.png(pixels), size=28, crop=0.875, interpolation="bicubic")
    assert apart(got, expected) <= 1
    assert apart(got, decode(paint.png(pixels), size=28, crop=0.875)) > 3


def test_every_kind_shows_the_same_picture(tmp_path):
    plain = decode(paint.png(PIXELS), size=24, crop=0.875)
    gray = decode(saved(Image.fromarray(PIXELS).convert("L"), "PNG"), size=24, crop=0.875)
    on_white = plain * (128 / 255) + 127
    expected = {
        "rgba.png": on_white,
        "la.png": gray * (128 / 255) + 127,
        "bilevel.png": None,
        "palette.png": None,
    }
    tolerance = {".jpg": 10, ".gif": 60}
    for name, path in paint.kinds(tmp_path).items():
        got = decode(path.read_bytes(), size=24, crop=0.875)
        wanted = expected.get(name, gray if name.startswith("gray") else plain)
        if wanted is not None:
            assert apart(got, wanted) <= tolerance.get(path.suffix, 2), name


def test_inks_are_colors():
    cyan, magenta, black = (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 0, 255)
    for adobe in (True, False):
        for inks, color in ((cyan, (0, 255, 255)), (magenta, (255, 0, 255)), (black, (0, 0, 0))):
            assert apart(np.array(center(paint.cmyk(inks, adobe=adobe))), np.array(color)) <= 3
    tiff = saved(Image.new("CMYK", (9, 9), cyan), "TIFF")
    assert center(tiff) == (0, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    for value, gray in ((0, 0), (32768, 128), (65535, 255), (300, 1)):
        deep = Image.fromarray(np.full((9, 9), value, np.uint16))
        assert center(saved(deep, kind)) == (gray,) * 3


def test_wide_values_are_sane():
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    cases = [
        (ramp.astype(np.float32), 0, 255),  # already 0..1
        ((ramp * 128).astype(np.float32), 0, 128),  # 0..255
        ((ramp * 2e9 - 1e9).astype(np.int32), 0, 255),  # stretched
        ((ramp * 6e38 - 3e38).astype(np.float32), 0, 255),
        (np.full((8, 8), -7, np.int32), 0, 0),
    ]
    for values, low, high in cases:
        got = decode(saved(Image.fromarray(values), "TIFF"), size=8, crop=1.0)
        assert (got.min(), got.max()) == (low, high)
    holes = ramp.astype(np.float32)
    holes[0, 1], holes[0, 2] = np.nan, np.inf
    got = decode(saved(Image.fromarray(holes), "TIFF"), size=8, crop=1.0)
    assert got[0, 1].tolist() == got[0, 2].tolist() == [0, 0, 0] and got[-1, -1].tolist() == [255] * 3


def test_transparency_is_white():
    clear = Image.new("RGBA", (9, 9), (200, 0, 0, 0))
    assert center(saved(clear, "PNG")) == (255, 255, 255)
    assert center(saved(clear.convert("LA"), "PNG")) == (255, 255, 255)
    assert center(saved(Image.new("RGB", (9, 9), "red"), "PNG", transparency=(255, 0, 0))) == (255, 255, 255)
    assert center(saved(Image.new("L", (9, 9), 7), "PNG", transparency=7)) == (255, 255, 255)
    indexed = Image.new("P", (9, 9), 1)
    indexed.putpalette([0, 0, 0, 10, 200, 30])
    assert center(saved(indexed, "PNG")) == (10, 200, 30)
    assert center(saved(indexed, "PNG", transparency=1)) == (255, 255, 255)
    assert center(saved(indexed, "PNG", transparency=bytes([255, 128]))) == (132, 227, 142)
    assert center(saved(indexed, "GIF", transparency=1)) == (255, 255, 255)


def test_bilevel_black_and_white():
    assert center(saved(Image.new("1", (9, 9), 1), "PNG")) == (255, 255, 255)
    assert center(saved(Image.new("1", (9, 9), 0), "TIFF")) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_counts(kind):
    first, second = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    options = {"lossless": True} if kind == "WEBP" else {}
    assert center(saved(first, kind, save_all=True, append_images=[second], **options)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(orientation):
    upright = decode(paint.jpeg(PIXELS), size=32, crop=0.875)
    turned = decode(paint.oriented(PIXELS, orientation), size=32, crop=0.875)
    assert apart(upright, turned) <= 6
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "TIFF", "WEBP"):
        data = saved(Image.fromarray(PIXELS).rotate(90, expand=True), kind, exif=exif)
        assert apart(decode(data, size=32, crop=0.875), upright) <= 40


def test_broken_orientation_leaves_the_image_as_it_is():
    data = paint.jpeg(PIXELS, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff\x01")
    assert apart(decode(data, size=32, crop=0.875), decode(paint.jpeg(PIXELS), size=32, crop=0.875)) == 0


# Scaled decoding


def photograph(width: int, height: int) -> np.ndarray:
    """Waves of many lengths and a fine grain: a picture that shows what a shift of half a pixel does."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(columns / a + rows / b) for a, b in ((9, 31), (57, -23), (-15, 11))]
    grain = np.random.default_rng(3).normal(0, 4, (height, width, 3))
    return np.clip(128 + 38 * np.stack(waves, axis=2) + grain, 0, 255).astype(np.uint8)


def whole(data: bytes, **options) -> np.ndarray:
    """What decode returns where all pixels are decoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MARGIN", 1e9)
        return decode(data, **options)


@pytest.fixture
def drafted(monkeypatch):
    """The sizes of the JPEGs that are loaded, as they come."""
    load, sizes = ImageFile.ImageFile.load, []

    def noted(image):
        if image.tile:
            sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted)
    return sizes


def test_a_large_jpeg_is_decoded_near_the_size_that_is_needed(drafted):
    data = paint.jpeg(np.zeros((1000, 1200, 3), np.uint8))
    # The shorter side is 1000, and the margin 1.5: up to 83 it is worth an eighth, and so on.
    cases = {83: (150, 125), 84: (300, 250), 166: (300, 250), 167: (600, 500), 333: (600, 500)}
    for size, expected in cases.items():
        decode(data, size=size, crop=1.0)
        assert drafted.pop() == expected
    for size in (334, 1000, 1500):
        decode(data, size=size, crop=1.0)
        assert drafted.pop() == (1200, 1000)
    thumbnail(data, size=100)
    assert drafted.pop() == (150, 125)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600))
def test_a_draft_never_has_fewer_pixels_than_needed(width, height, needed):
    image = Image.open(io.BytesIO(TINY))
    image._size = (width, height)
    image.tile = [image.tile[0]._replace(extents=(0, 0, width, height))]
    scale = images._draft(image, min(width, height) / needed / images.MARGIN)
    assert scale in (1, 2, 4, 8)
    assert image.size == (-(-width // scale), -(-height // scale))
    assert scale == 1 or min(image.size) >= images.MARGIN * needed
    assert scale == 8 or min(width, height) < 2 * scale * images.MARGIN * needed


TINY = paint.jpeg(PIXELS)


@pytest.mark.parametrize("shape", [(801, 603), (603, 801), (640, 480), (1999, 130), (777, 777)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}])
def test_scaled_decoding_is_close_to_whole_decoding(shape, options):
    data = saved(Image.fromarray(photograph(*shape)), "JPEG", **{"quality": 95, "subsampling": 0, **options})
    for size, crop in ((32, 0.875), (40, 1.0)):
        expected = whole(data, size=size, crop=crop).astype(int)
        difference = np.abs(decode(data, size=size, crop=crop) - expected)
        assert difference.mean() < 1 and difference.max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(601, 405), (403, 607)])
def test_orientation_is_undone_of_scaled_images(orientation, shape, drafted):
    pixels = photograph(*shape)
    expected = decode(paint.png(pixels), size=32, crop=0.875).astype(int)
    drafted.clear()
    difference = np.abs(decode(paint.oriented(pixels, orientation), size=32, crop=0.875) - expected)
    assert max(drafted[0]) < 310  # scaled indeed
    # The sides do not divide by the scale: half a pixel of what lies beyond them would shift the waves.
    assert difference.mean() < 1.2 and difference.max() <= 10
    small = Image.open(io.BytesIO(thumbnail(paint.oriented(pixels, orientation), size=60)))
    # The shorter side of a scaled image is rounded twice.
    assert (max(small.size), min(small.size)) in ((60, 40), (60, 41))
    assert (small.width > small.height) == (shape[0] > shape[1])


def test_the_frame_of_a_scaled_image_is_exact():
    """Marked corners, by hand: 11 x 6 at a quarter is 3 x 2 pixels, of which 2.75 x 1.5 are the image."""
    pixels = Image.new("RGB", (3, 2))
    pixels.putpixel((0, 0), (255, 0, 0))  # where the image begins
    for orientation, (x, y) in {
        None: (0, 0),
        2: (0.25, 0),
        3: (0.25, 0.5),
        4: (0, 0.5),
        5: (0, 0),
        6: (0.5, 0),
        7: (0.5, 0.25),
        8: (0, 0.25),
    }.items():
        got = images._upright(pixels, (11, 6), 4, orientation)
        sides = (6, 11) if orientation in (5, 6, 7, 8) else (11, 6)
        assert (got.width, got.height, got.scale) == (*sides, 4) and (got.x, got.y) == (x, y)
        # What lies beyond is opposite to the corner where the stored image begins.
        red = np.argwhere(np.asarray(got.image)[:, :, 0])[0]
        assert (red[1] > 0) == (x > 0) and (red[0] > 0) == (y > 0)


def test_the_crop_is_that_of_the_whole_image(monkeypatch):
    resize, boxes = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, *args: boxes.append(args[2]) or resize(image, *args)
    )
    for shape in ((1003, 401), (401, 1003), (403, 401)):
        for size, scale in ((20, 8), (50, 4), (100, 2)):
            data = paint.jpeg(np.zeros((*shape, 3), np.uint8))
            whole(data, size=size, crop=1.0)
            decode(data, size=size, crop=1.0)
            expected, got = np.array(boxes[-2]), np.array(boxes[-1])
            assert np.allclose(got * scale, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["cmyk", "inverted", "gray", "multi-picture"])
def test_every_kind_of_jpeg_is_scaled_alike(kind, drafted):
    image = Image.fromarray(photograph(640, 480))
    if kind == "gray":
        data = saved(image.convert("L"), "JPEG", quality=95)
    elif kind == "multi-picture":
        data = saved(image, "MPO", quality=95, save_all=True, append_images=[image.rotate(180)])
    else:
        data = saved(image.convert("CMYK"), "JPEG", quality=95)
        if kind == "inverted":
            data = data.replace(b"Adobe", b"other")
    expected = whole(data, size=32, crop=0.875).astype(int)
    difference = np.abs(decode(data, size=32, crop=0.875) - expected)
    assert drafted == [(640, 480), (80, 60)]
    assert difference.mean() < 1 and difference.max() <= 8


def test_images_below_twice_the_target_are_decoded_whole():
    for shape in ((127, 150), (96, 64), (64, 64), (10, 12)):
        data = paint.jpeg(photograph(*shape))
        assert np.array_equal(decode(data, size=64, crop=1.0), whole(data, size=64, crop=1.0))


def test_the_pixel_limit_is_that_of_the_whole_image(monkeypatch):
    data = paint.jpeg(photograph(640, 480))
    monkeypatch.setattr(images, "MAX_PIXELS", 640 * 480 - 1)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    for use in (lambda: decode(data, size=8, crop=1.0), lambda: thumbnail(data, size=8)):
        with pytest.raises(Rejected, match="too many pixels: 640 x 480"):
            use()


def test_truncated_images_are_refused_at_any_scale():
    for options in ({}, {"progressive": True}):
        data = paint.jpeg(photograph(640, 480), **options)[:-2000]
        for size in (8, 400):
            with pytest.raises(Rejected, match="truncated"):
                decode(data, size=size, crop=1.0)


# Refusing


def test_broken_images_are_refused_with_a_reason(tmp_path, capfd):
    expected = {
        "empty.jpg": "empty file",
        "text.jpg": "not an image",
        "truncated.jpg": "truncated",
        "truncated.png": "truncated",
        "damaged.tif": "damaged",
        "bomb.png": "too many pixels: 10000 x 10001",
    }
    for name, path in paint.broken(tmp_path).items():
        for use in (lambda data: decode(data, size=8, crop=1.0), lambda data: thumbnail(data, size=8)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(Rejected) as caught:
                    use(path.read_bytes())
            assert str(caught.value) == expected[name]
    assert capfd.readouterr() == ("", "")


def test_a_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(Rejected, match="too many pixels: 10000 x 10001"):
        decode(paint.bomb(), size=8, crop=1.0)


def test_a_bomb_above_pillows_own_limit_is_refused():
    huge = paint.bomb(10, 10).replace((10).to_bytes(4) * 2, (60_000).to_bytes(4) * 2)
    with pytest.raises(Rejected):  # the header's checksum is wrong now
        decode(huge, size=8, crop=1.0)
    bitmap = bytearray(saved(Image.new("RGB", (2, 2)), "BMP"))
    bitmap[18:26] = (60_000).to_bytes(4, "little") * 2
    with pytest.raises(Rejected, match="too many pixels"):
        decode(bytes(bitmap), size=8, crop=1.0)


def test_the_limit_itself_is_accepted(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 96 * 64)
    decode(paint.png(PIXELS), size=8, crop=1.0)
    monkeypatch.setattr(images, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(Rejected, match="too many pixels: 96 x 64"):
        decode(paint.png(PIXELS), size=8, crop=1.0)


def test_very_long_images_are_never_resized_whole(monkeypatch):
    resize, sizes = Image.Image.resize, []
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *args: sizes.append(size) or resize(image, size, *args)
    )
    for shape in ((60_000, 1, 3), (1, 60_000, 3)):
        pixels = np.zeros(shape, np.uint8)
        pixels.reshape(-1, 3)[29_990:30_010] = (10, 200, 30)
        got = decode(paint.png(pixels), size=224, crop=0.875)
        assert (got == (10, 200, 30)).all()
    assert sizes == [(224, 224)] * 2


def test_other_formats_are_not_handed_to_programs():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(Rejected, match="not an image"):
        decode(postscript, size=8, crop=1.0)


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff", b"II*\x00", b"GIF89a", b"BM", b"P6 ", b"RIFF"]),
)
def test_random_bytes_are_refused_or_decoded(tail, magic):
    try:
        decode(magic + tail, size=8, crop=1.0)
    except Rejected as rejected:
        assert 0 < len(str(rejected)) < 80


SOUND = [
    paint.jpeg(PIXELS),
    paint.png(PIXELS),
    *(saved(Image.fromarray(PIXELS), kind) for kind in ("GIF", "TIFF", "WEBP", "BMP", "JPEG2000", "AVIF")),
    saved(Image.fromarray(PIXELS), "TIFF", compression="tiff_lzw"),
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SOUND), st.floats(0, 1), st.booleans(), st.binary(min_size=1, max_size=4))
def test_damage_anywhere_is_refused_or_decoded(data, where, cut, noise):
    at = int(where * (len(data) - 1))
    data = data[:at] + (b"" if cut else noise + data[at + len(noise) :])
    try:
        assert decode(data, size=8, crop=0.875).shape == (8, 8, 3)
    except Rejected as rejected:
        assert 0 < len(str(rejected)) < 80


# Batches and thumbnails


def test_thumbnails_are_small_upright_jpegs(tmp_path):
    for name, path in paint.kinds(tmp_path).items():
        image = Image.open(io.BytesIO(thumbnail(path.read_bytes(), size=48)))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 32)), name
    small = Image.open(io.BytesIO(thumbnail(paint.png(PIXELS[:2, :90]), size=45)))
    assert small.size == (45, 1)
    secret = thumbnail(paint.jpeg(PIXELS, comment=b"secret", exif=Image.Exif()), size=500)
    assert b"secret" not in secret and Image.open(io.BytesIO(secret)).size == (96, 64)
