"""Pictures of every mode and size, whole and damaged."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from cogvid.media.image import load_image, prepare_image, prepare_video


def _picture(height: int = 20, width: int = 30) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 8 % 256, y * 12 % 256, (x + y) * 5 % 256], axis=-1).astype(np.uint8))


def _encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["str", "path", "bytes", "bytearray", "memoryview", "file", "bytesio", "pil"])
def test_every_kind_of_source_gives_the_same_picture(tmp_path: Path, kind: str) -> None:
    data = _encoded(_picture())
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with open(path, "rb") as file:
        source = {
            "str": str(path),
            "path": path,
            "bytes": data,
            "bytearray": bytearray(data),
            "memoryview": memoryview(data),
            "file": file,
            "bytesio": io.BytesIO(data),
            "pil": _picture(),
        }[kind]
        image = load_image(source)
    assert image.mode == "RGB"
    assert image.tobytes() == _picture().tobytes()


def test_pil_images_are_copied_not_changed() -> None:
    original = _picture()
    load_image(original).putpixel((0, 0), (1, 2, 3))
    assert original.tobytes() == _picture().tobytes()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_modes_become_rgb(mode: str) -> None:
    white = Image.new("RGB", (4, 4), "white").convert(
        "LA" if mode in ("La", "LA") else "RGBA" if mode == "RGBa" else "RGB"
    )
    image = load_image(white.convert(mode))
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 254


def test_lab_becomes_rgb() -> None:
    lab = Image.merge("LAB", [Image.new("L", (4, 4), level) for level in (255, 128, 128)])
    assert np.asarray(load_image(lab)).min() >= 250


def test_alpha_is_dropped_and_palette_transparency_ignored() -> None:
    clear = _picture().convert("RGBA")
    clear.putalpha(0)
    assert load_image(clear).tobytes() == _picture().tobytes()
    palette = _picture().quantize(16)
    for transparency in (0, bytes(range(0, 160, 10))):
        palette.info["transparency"] = transparency
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_image(_encoded(palette))
        assert loaded.tobytes() == _picture().quantize(16).convert("RGB").tobytes()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_greys_are_scaled_not_clipped(mode: str) -> None:
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    levels[-1, -1] = 65535
    if mode == "I":
        image = Image.fromarray(levels.astype(np.int32))
    else:
        image = Image.frombytes(mode, (64, 64), levels.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    assert image.mode == mode
    loaded = np.asarray(load_image(image))
    assert np.array_equal(loaded, np.repeat(np.rint(levels / 257).astype(np.uint8)[..., None], 3, axis=2))


def test_16_bit_files_are_scaled() -> None:
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    for format in ("PNG", "TIFF"):
        loaded = np.asarray(load_image(_encoded(Image.fromarray(levels), format)))
        assert np.array_equal(loaded[..., 0].reshape(-1), np.arange(256))
    dark = np.asarray(load_image(_encoded(Image.fromarray(levels // 256))))  # stays dark
    assert dark.max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 5e8, 1e9], [0, 128, 255]),
        ([7e9, 7e9, 7e9], [0, 0, 0]),
    ],
    ids=["unit", "8-bit", "16-bit", "signed", "huge", "flat"],
)
def test_floating_point_greys_are_scaled(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F"
    assert np.asarray(load_image(image))[0, :, 0].tolist() == expected


def test_32_bit_integers_are_scaled() -> None:
    for values, expected in (([0, 9, 255], [0, 9, 255]), ([-(2**31), 0, 2**31 - 1], [0, 128, 255])):
        assert np.asarray(load_image(Image.fromarray(np.array([values], dtype=np.int32))))[0, :, 0].tolist() == expected


def test_non_finite_greys_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^image: got a PIL image, which holds NaN or infinite values, want finite"):
        load_image(Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    first, second = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    data = _encoded(first, format, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert load_image(data).getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    corners = Image.new("RGB", (48, 32), (0, 0, 0))
    corners.paste((255, 0, 0), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(_encoded(corners, format, exif=exif))
    # Exif 2.32, 4.6.4: the sides of the upright picture at which the stored first row and first column are.
    row, column = {
        1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
        5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
    }[orientation]  # fmt: skip
    sides = {row, column}
    assert image.size == ((32, 48) if orientation > 4 else (48, 32))
    point = (8 if "left" in sides else image.width - 8, 8 if "top" in sides else image.height - 8)
    red, green, _ = image.getpixel(point)
    assert red > 200
    assert green < 60


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_does_not_spoil_the_picture() -> None:
    for junk in (
        b"Exif\x00\x00garbage",
        b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff" + b"\x01" * 40,
    ):
        assert load_image(_encoded(_picture(), "JPEG", exif=junk)).size == (30, 20)


def test_threads_leave_the_warnings_of_the_process_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warning filters are global. If two threads change and restore them, one may restore the other's change."""
    data, load, during = _encoded(_picture(64, 64)), ImageFile.ImageFile.load, []

    def spy(self: ImageFile.ImageFile) -> object:
        during.append((warnings.showwarning, *warnings.filters))
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", spy)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        before = (warnings.showwarning, *warnings.filters)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(load_image, [data] * 200))
        assert (warnings.showwarning, *warnings.filters) == before
        assert set(during) == {before}
        warnings.warn("the host's own", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["the host's own"]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + _chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(8193, 8192), (12000, 12000), (60000, 60000), (2**31 - 1, 2**31 - 1)], ids=str)
def test_bombs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    def explode(*_: object) -> None:
        pytest.fail("the picture was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", explode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="pixels") as caught:
            load_image(_claiming(*size))
    assert "\n" not in str(caught.value)


def test_pixel_limit_is_exact_and_applies_to_pil_images() -> None:
    data = _encoded(_picture(20, 30))
    assert load_image(data, max_pixels=600).size == (30, 20)
    for source in (data, _picture(20, 30)):
        with pytest.raises(ValueError, match=r"^image: got a .*, which has 30x20 pixels, want at most 599$"):
            load_image(source, max_pixels=599)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"which cannot be read \(No such file or directory\), want a picture file$"),
        (b"", "which is empty, want a picture$"),
        (b"no picture at all", "which is not a picture, want a format that Pillow .* reads$"),
        (b"\x89PNG\r\n\x1a\n", "which cannot be decoded|is not a picture"),
        (_encoded(_picture(200, 200))[:-300], "truncated"),
        (_encoded(_picture(200, 200), "JPEG")[:-600], "truncated"),
        (_encoded(_picture(200, 200), "GIF")[:-600], "cannot be decoded"),
        (_encoded(_picture(200, 200), "WEBP")[:-300], "cannot be decoded|not a picture"),
        (_encoded(_picture(200, 200), "TIFF")[:-300], "cannot be decoded|not a picture"),
        (_encoded(_picture(200, 200), "BMP")[:-300], "truncated"),
        (_encoded(_picture(), "EPS"), "which is EPS, want a raster format such as PNG or JPEG$"),
        (b"<html><body>not found</body></html>", "is not a picture"),
    ],
    ids=[
        *("missing", "empty", "text", "header", "cut-png", "cut-jpeg", "cut-gif", "cut-webp", "cut-tiff", "cut-bmp"),
        *("eps", "html"),
    ],
)
def test_bad_files_raise_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message) as caught:
            load_image(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"image: got {str(path)!r}, which ")
    assert ", want " in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_load_or_raise_value_error_wherever_the_damage_is() -> None:
    rng = np.random.default_rng(0)
    refused: list[str] = []
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "PPM", "TGA"):
        data = np.frombuffer(_encoded(_picture(32, 32), format), dtype=np.uint8)
        for _ in range(25):
            damaged = data.copy()
            damaged[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4)
            try:
                assert load_image(damaged.tobytes()).mode == "RGB"
            except ValueError as error:
                refused.append(str(error))
    assert len(refused) > 20
    assert "\n" not in "".join(refused)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable for root")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(_encoded(_picture()))
    path.chmod(0o000)
    with pytest.raises(ValueError, match="Permission denied"):
        load_image(path)


def test_directories_pipes_and_other_objects_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    sources: dict[str, object] = {
        "got .*, which is a directory, want a picture file": tmp_path,
        "got .*, which is not a regular file, want a picture file": tmp_path / "pipe",
        "got a bytes object, which is empty, want a picture": b"",
        "got a file object, which is empty, want a picture": io.BytesIO(),
        r"got a file object that gives str, want one that gives bytes \(mode 'rb'\)": io.StringIO("text"),
        "got int, want a path, URL, bytes, file object or PIL image": 3,
        "got NoneType, want a path": None,
        r"got '', which cannot be read \(No such file or directory\), want": "",
        r"got 'a.x00b', which cannot be read \(.*null byte\), want": "a\0b",
    }
    for message, source in sources.items():
        with pytest.raises(ValueError, match=f"^image: {message}"):
            load_image(source)  # type: ignore[arg-type]


def test_long_and_odd_names_make_short_one_line_messages() -> None:
    for name in ("x" * 5000, "a\nb.png", "data:image/png;base64," + "A" * 100_000):
        with pytest.raises(ValueError, match="image") as caught:
            load_image(name)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
@pytest.mark.parametrize("source", [(37, 53), (1, 500), (500, 1), (64, 96), (2, 2)], ids=str)
@pytest.mark.parametrize("size", [(64, 96), (96, 64)], ids=str)
def test_prepared_shape_type_and_range(resize: str, source: tuple[int, int], size: tuple[int, int]) -> None:
    pixels = prepare_image(_picture(*source), *size, resize=resize)
    assert pixels.shape == (1, 3, *size)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert pixels.abs().max() <= 1


def _disc(height: int, width: int) -> Image.Image:
    """A white disc of radius 40 in the middle of grey."""
    y, x = np.mgrid[0:height, 0:width]
    inside = (y - (height - 1) / 2) ** 2 + (x - (width - 1) / 2) ** 2 < 40**2
    return Image.fromarray(np.where(inside[..., None], 255, 90).astype(np.uint8).repeat(3, axis=2))


@pytest.mark.parametrize(
    ("resize", "sides"), [("stretch", (48, 24)), ("crop", (48, 48)), ("pad", (24, 24))], ids=["stretch", "crop", "pad"]
)
def test_aspect_ratio(resize: str, sides: tuple[int, int]) -> None:
    pixels = prepare_image(_disc(160, 320), 96, 96, resize=resize)[0, 0]
    disc = pixels > 0.4
    height, width = int(disc.any(1).sum()), int(disc.any(0).sum())
    assert abs(height - sides[0]) <= 1
    assert abs(width - sides[1]) <= 1
    assert torch.equal(disc, disc.flip(0))  # centred both ways
    assert torch.equal(disc, disc.flip(1))
    black = (pixels == -1).all(1)
    assert int(black.sum()) == (48 if resize == "pad" else 0)


def test_crop_is_a_plain_cut_where_nothing_is_scaled() -> None:
    picture = _picture(96, 200)
    cut = prepare_image(picture, 96, 64, resize="crop")
    assert torch.equal(cut, prepare_image(picture.crop((68, 0, 132, 96)), 96, 64))


def test_all_modes_agree_where_the_aspect_ratio_is_kept_anyway() -> None:
    stretched = prepare_image(_picture(40, 60), 64, 96)
    assert torch.equal(prepare_image(_picture(40, 60), 64, 96, resize="crop"), stretched)
    assert torch.equal(prepare_image(_picture(40, 60), 64, 96, resize="pad"), stretched)


def test_prepare_video_is_prepare_image_of_each_frame() -> None:
    frames = [_picture(40, 60), _picture(30, 30), _picture(64, 96)]
    for resize in ("stretch", "crop", "pad"):
        video = prepare_video(frames, 64, 96, resize=resize)
        assert video.shape == (1, 3, 3, 64, 96)
        for index, frame in enumerate(frames):
            assert torch.equal(video[:, :, index], prepare_image(frame, 64, 96, resize=resize))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: prepare_image(_picture(), 64, 96, resize="fill"),
            "^resize: got 'fill', want one of stretch, crop, pad$",
        ),
        (lambda: prepare_image(_picture(), 0, 96), "^height: got 0, want a positive number of pixels$"),
        (lambda: prepare_image(_picture(), 64, -1), "^width: got -1, want"),
        (lambda: prepare_image(_picture(), 64.0, 96), "^height: got 64.0, want"),  # type: ignore[arg-type]
        (lambda: prepare_video([], 64, 96), "^frames: got none, want at least one frame$"),
        (lambda: prepare_video(torch.zeros(0, 8, 8, 3, dtype=torch.uint8), 64, 96), "^frames: got none"),
        (
            lambda: prepare_video(torch.zeros(2, 3, 8, 8), 64, 96),
            r"^frames: got \[2, 3, 8, 8\] float32, want \[F, H, W, 3\] uint8$",
        ),
    ],
    ids=["resize", "zero", "negative", "float", "no-frames", "no-frames-tensor", "tensor-layout"],
)
def test_bad_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
