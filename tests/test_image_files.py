"""Image files and folders of them: what is read, and what is refused, and how that is told."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gdfast import data
from gdfast.data import DataError, decode, folder
from gdfast.data.check import check
from gdfast.data.classified import Shape, to_channels
from gdfast.data.problems import Problems


def picture(size: tuple[int, int] = (12, 10), seed: int = 0, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    return Image.fromarray(pixels if channels > 1 else pixels[:, :, 0])


def claim_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(content)) + name + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + body


class TestDecode:
    def test_gives_bytes_with_channels(self, tmp_path: Path) -> None:
        picture().save(tmp_path / "a.png")
        assert np.array_equal(decode.read(tmp_path / "a.png"), np.asarray(picture()))
        grey = decode.read(tmp_path / "a.png", "L")
        assert grey.shape == (12, 10, 1) and decode.size(tmp_path / "a.png") == (12, 10)

    @pytest.mark.parametrize("suffix", ["jpg", "bmp", "webp", "tiff", "gif", "ppm"])
    def test_reads_every_format(self, suffix: str, tmp_path: Path) -> None:
        path = tmp_path / f"a.{suffix}"
        picture().save(path)
        assert decode.read(path).shape == (12, 10, 3)
        assert f".{suffix}" in decode.suffixes(path)

    def test_turns_images_upright(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned by 90 degrees
        picture().save(tmp_path / "a.png", exif=exif)
        upright = decode.read(tmp_path / "a.png")
        assert np.array_equal(upright, np.rot90(np.asarray(picture()), -1))
        assert decode.size(tmp_path / "a.png") == upright.shape[:2] == (10, 12)

    def test_transparency_is_white_and_16_bits_keep_their_scale(self, tmp_path: Path) -> None:
        Image.new("RGBA", (2, 2), (200, 0, 0, 0)).save(tmp_path / "a.png")
        assert (decode.read(tmp_path / "a.png") == 255).all()
        Image.fromarray(np.full((2, 2), 128 * 257, np.uint16)).save(tmp_path / "b.png")
        assert (decode.read(tmp_path / "b.png", "L") == 128).all()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "found an empty file"),
            (b"GIF", "found another file"),
            (b"%PDF-1.4 " + bytes(99), "found another file"),
            (claim_png(12_000, 12_000), "claims 12,000 x 12,000"),
            (claim_png(60_000, 60_000), "exceeds limit"),
            (claim_png(64, 64), "damaged or truncated"),
        ],
        ids=["empty", "short", "pdf", "bomb", "large bomb", "no pixels"],
    )
    def test_refuses_what_is_no_image(self, content: bytes, message: str, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            decode.read(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    def test_refuses_half_a_photograph(self, tmp_path: Path) -> None:
        picture((200, 300)).save(tmp_path / "a.jpg")
        whole = (tmp_path / "a.jpg").read_bytes()
        (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match="damaged or truncated"):
            decode.read(tmp_path / "a.jpg")
        for odd in (tmp_path, tmp_path / "none.jpg"):
            with pytest.raises(DataError, match=r"found (something else|no such file)"):
                decode.read(odd)


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    root = tmp_path / "animals"
    for number, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for index in range(10):
            picture((20, 16), seed=100 * number + index).save(root / name / f"{index}.png")
    return root


class TestFolder:
    def test_splits_each_class(self, animals: Path) -> None:
        loaded = data.load(f"folder:{animals}")
        assert loaded.classes == ("cat", "dog") and loaded.name == "animals"
        assert loaded.train.labels.tolist() == [0] * 8 + [1] * 8
        assert loaded.test.labels.tolist() == [0, 0, 1, 1]
        assert np.array_equal(loaded.test.image(1), np.asarray(picture((20, 16), seed=7)))
        assert loaded.fingerprint() == data.load(f"folder:{animals}").fingerprint()
        picture((20, 16), seed=5).save(animals / "cat" / "new.png")
        assert loaded.fingerprint() != data.load(f"folder:{animals}").fingerprint()

    def test_takes_the_split_that_is_there(self, animals: Path, tmp_path: Path) -> None:
        root = tmp_path / "split"
        root.mkdir()
        (animals / "dog" / "9.png").unlink()
        animals.rename(root / "train")
        with pytest.raises(DataError, match="both train and test"):
            data.load(f"folder:{root}")
        (root / "val" / "cat").mkdir(parents=True)
        picture().save(root / "val" / "cat" / "x.png")
        loaded = data.load(f"folder:{root}")
        assert (len(loaded.train), len(loaded.test), loaded.classes) == (19, 1, ("cat", "dog"))
        problems, _ = check(f"folder:{root}")
        assert [str(problem) for problem in problems] == [
            f"{root / 'val' / 'dog'}: expected images of this class, found none"
        ]

    @pytest.mark.parametrize("kind", ["file", "nothing", "empty", "one class"])
    def test_refuses_what_has_no_classes(self, kind: str, tmp_path: Path) -> None:
        root = tmp_path / "here"
        if kind == "file":
            root.write_text("x")
        elif kind != "nothing":
            (root / ("only" if kind == "one class" else "")).mkdir(parents=True)
        with pytest.raises(DataError, match=f"data: folder:{root}: expected .*, found"):
            data.load(f"folder:{root}")

    def test_bad_images_are_left_out_up_to_a_share(self, animals: Path) -> None:
        (animals / "dog" / "4.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"at most 1.0% bad items, found 1 of 20: .*4\.png: "):
            data.load(f"folder:{animals}")
        loaded = data.load(f"folder:{animals}", max_bad=0.05)
        assert len(loaded.train) + len(loaded.test) == 19

    def test_check_lists_everything(self, animals: Path) -> None:
        (animals / "dog" / "0.png").write_bytes(b"")
        (animals / "dog" / "1.png").write_bytes(claim_png(9, 9))
        (animals / "dog" / "2.png").write_bytes((animals / "cat" / "3.png").read_bytes())
        (animals / "dog" / "notes.txt").write_text("x")
        picture().save(animals / "dog" / "really.jpg", format="png")
        problems, summary = check(f"folder:{animals}")
        told = "\n".join(str(problem).removeprefix(f"{animals}/") for problem in problems)
        for line in (
            "dog/0.png: expected an image, found an empty file",
            "dog/1.png: expected a whole image, found a damaged or truncated file",
            f"dog/2.png: the same picture as {animals}/cat/3.png",
            "dog/notes.txt: no image: its name ends in .txt",
            "dog/really.jpg: its content is PNG, which its name denies",
        ):
            assert line in told, told
        assert len(problems) == 5 and problems.skipped() == 2
        assert "2 classes: cat, dog" in summary

    def test_problems_of_one_file_count_once(self) -> None:
        problems = Problems()
        for line in (3, 9):
            problems.add(Path("a.xml"), "expected a box, found none", line=line)
        problems.add(Path("b"), "no images", item=False)
        assert problems.skipped() == 1 and str(next(iter(problems))).startswith("a.xml:3: ")
        problems.refuse_beyond(0.5, 2, "voc:x")
        with pytest.raises(DataError, match="found 1 of 2"):
            problems.refuse_beyond(0.4, 2, "voc:x")


class TestShape:
    def test_photographs_keep_their_proportions(self) -> None:
        image = np.zeros((100, 200, 3), np.uint8)
        image[:, 90:110] = 255
        fitted = Shape(3, (70, 70)).fit(image)
        assert fitted.shape == (70, 70, 3)
        bright = (fitted[35, :, 0] > 127).sum()
        assert 15 <= bright <= 17  # 20 pixels at a scale of 0.8

    def test_channels(self) -> None:
        red = np.full((2, 2, 3), (255, 0, 0), np.uint8)
        assert (to_channels(red, 1) == 76).all() and to_channels(red, 1).shape == (2, 2, 1)
        assert np.array_equal(to_channels(red[:, :, :1], 3)[0, 0], (255, 255, 255))

    def test_normalised_values(self) -> None:
        batch = Shape(3, (2, 2), normalised=True).to_tensor([np.full((2, 2, 3), 255, np.uint8)])
        assert batch[0, :, 0, 0].tolist() == pytest.approx([2.2489, 2.4286, 2.64], abs=1e-4)


def test_folder_module_reads_grey(animals: Path) -> None:
    assert folder.load(animals, mode="L").train.image(0).shape == (20, 16, 1)
