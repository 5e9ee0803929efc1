"""Listing, reading and decoding images: by hand, against torchvision, and fuzzed."""

import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import paint
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from selective_ray import images
from selective_ray.errors import UsageError, UserError
from selective_ray.images import Rejected, decode, list_images, read, read_batch, thumbnail

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


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


# Listing


def test_listing_is_sorted_recursive_and_blind_to_hidden_and_other_files(tmp_path):
    touch(tmp_path, "b.jpg", "a/z.PNG", "a/é.Jpeg", "B.gif", "notes.txt", "a/.hidden.jpg", ".git/x.jpg")
    table = list_images(str(tmp_path))
    assert table.schema.names == ["uri", "size", "version"]
    assert [str(t) for t in table.schema.types] == ["string", "int64", "string"]
    expected = [str(tmp_path / name) for name in ("B.gif", "a/z.PNG", "a/é.Jpeg", "b.jpg")]
    assert table["uri"].to_pylist() == expected
    status = (tmp_path / "B.gif").stat()
    assert table["size"].to_pylist() == [1, 1, 1, 1]
    assert table["version"][0].as_py() == f"{status.st_mtime_ns}-1"


NAMES = [
    "a b.jpg",
    "quote'\".jpg",
    "new\nline.jpg",
    "<script>.jpg",
    "naïve-漢字.jpg",
    "100%41.jpg",
    "file:.jpg",
]


def test_any_name_is_listed_and_read_back(tmp_path):
    for i, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(bytes([i]))
    uris = list_images(str(tmp_path))["uri"].to_pylist()
    assert uris == sorted(str(tmp_path / name) for name in NAMES)
    assert [read(uri)[0] for uri in uris] == [NAMES.index(Path(uri).name) for uri in uris]


def test_names_that_are_not_utf8_become_percent_encoded_uris(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xff %41.jpg")).write_bytes(b"raw")
    except OSError:
        pytest.skip("this file system stores UTF-8 names only")
    (uri,) = list_images(str(tmp_path))["uri"].to_pylist()
    assert uri == f"file://{tmp_path}/caf%FF%20%2541.jpg"
    assert read(uri) == b"raw"


def test_sources_may_be_file_uris_and_relative_paths(tmp_path, monkeypatch):
    touch(tmp_path, "my images/a.jpg")
    expected = [str(tmp_path / "my images/a.jpg")]
    monkeypatch.chdir(tmp_path)
    for source in (
        f"file://{tmp_path}/my%20images",
        f"file://localhost{tmp_path}/my%20images",
        "x/../my images/",
    ):
        assert list_images(source)["uri"].to_pylist() == expected


@pytest.mark.parametrize("source", ["s3://bucket/images", "gs://b", "https://host/x", "file://host/x", ""])
def test_sources_elsewhere_are_wrong_usage(source):
    with pytest.raises(UsageError, match="local folders"):
        list_images(source)


def test_what_cannot_be_listed_gets_a_sentence_with_the_remedy(tmp_path, monkeypatch):
    touch(tmp_path, "texts/a.txt", "texts/b.csv", "texts/in/README", "one.jpg")
    (tmp_path / "empty/in").mkdir(parents=True)
    cases = {
        "missing": r"there is no folder .*missing; check the path",
        "one.jpg": "one.jpg is a file, not a folder; give the folder",
        "one.jpg/x": "there is no folder",
        "empty": "empty is empty; give one that holds images",
        "texts": r"none of the 3 files in .*texts is an image; .*\.jpg \.jpeg .*: rename them, or",
    }
    for name, sentence in cases.items():
        with pytest.raises(UserError, match=sentence) as caught:
            list_images(str(tmp_path / name))
        assert not isinstance(caught.value, UsageError)

    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot list .*texts: permission denied; make it readable"):
        list_images(str(tmp_path / "texts"))


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    touch(tmp_path, "data/a/1.jpg", "data/b/2.jpg", "elsewhere/3.jpg", "elsewhere/in/4.jpg")
    data = tmp_path / "data"
    (data / "a/again").symlink_to(data)  # up
    (data / "above").symlink_to(tmp_path)
    (data / "aa").symlink_to(data / "b")  # sideways: the folder keeps its own name
    (data / "n").symlink_to(tmp_path / "elsewhere")
    (data / "m").symlink_to(tmp_path / "elsewhere")
    (data / "link.jpg").symlink_to(tmp_path / "elsewhere/3.jpg")
    (data / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    uris = list_images(str(data))["uri"].to_pylist()
    expected = ["a/1.jpg", "b/2.jpg", "broken.jpg", "link.jpg", "m/3.jpg", "m/in/4.jpg"]
    assert uris == [str(data / name) for name in expected]
    _, reasons = read_batch([str(data / "broken.jpg")], size=8, crop=1.0)
    assert reasons == {0: "file not found"}


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


def test_a_batch_keeps_slots_and_says_why(tmp_path):
    sound, broken = paint.kinds(tmp_path / "sound"), paint.broken(tmp_path / "broken")
    contents = {path: path.read_bytes() for path in (*sound.values(), *broken.values())}
    uris = [
        str(sound["rgb.png"]),
        str(broken["empty.jpg"]),
        str(tmp_path / "gone.jpg"),
        str(tmp_path),
        str(sound["la.png"]),
    ]
    pixels, reasons = read_batch(uris, size=16, crop=0.875)
    assert reasons == {1: "empty file", 2: "file not found", 3: "cannot be read: Is a directory"}
    assert pixels.shape == (5, 16, 16, 3) and pixels.dtype == np.uint8
    assert not pixels[1:4].any()
    for slot in (0, 4):
        assert np.array_equal(pixels[slot], decode(read(uris[slot]), size=16, crop=0.875))
    again, _ = read_batch(uris, size=16, crop=0.875)
    assert np.array_equal(pixels, again)
    assert contents == {path: path.read_bytes() for path in contents}


def test_a_batch_takes_its_own_reader():
    def refuse(uri):
        raise PermissionError(13, "Permission denied")

    _, reasons = read_batch(["a", "b"], size=4, crop=1.0, read=refuse)
    assert reasons == {0: "permission denied", 1: "permission denied"}
    pixels, reasons = read_batch([], size=4, crop=1.0)
    assert pixels.shape == (0, 4, 4, 3) and reasons == {}


def test_thumbnails_are_small_upright_jpegs(tmp_path):
    for name, path in paint.kinds(tmp_path).items():
        image = Image.open(io.BytesIO(thumbnail(path.read_bytes(), size=48)))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 32)), name
    small = Image.open(io.BytesIO(thumbnail(paint.png(PIXELS[:2, :90]), size=45)))
    assert small.size == (45, 1)
    secret = thumbnail(paint.jpeg(PIXELS, comment=b"secret", exif=Image.Exif()), size=500)
    assert b"secret" not in secret and Image.open(io.BytesIO(secret)).size == (96, 64)
