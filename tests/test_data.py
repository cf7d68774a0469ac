"""Data: what is read, how it is batched, and what bad files say."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mnist_files import IMAGES, LABELS, digits, idx, write_pair
from torch.utils.data import DataLoader

from gdfast import data
from gdfast.data import DataError, datasets, mnist, transforms


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint8) % 10


class TestDigits:
    def test_split_is_stratified_and_whole(self) -> None:
        loaded = data.load("digits")
        train, test = loaded.train, loaded.test
        assert len(train) + len(test) == 1797
        assert train.images.shape == (len(train), 1, 28, 28) and train.images.dtype == torch.uint8
        share = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
        assert ((share - 0.2).abs() < 0.005).all()

    def test_images_are_the_originals_enlarged(self) -> None:
        from sklearn.datasets import load_digits

        # Image 0 is the first of its class, so it comes first in the training split.
        small = np.asarray(load_digits().images)[0] / 16 * 255
        centres = (np.arange(28) + 0.5) * 8 / 28 - 0.5
        wide = np.array([np.interp(centres, np.arange(8), row) for row in small])
        large = np.array([np.interp(centres, np.arange(8), column) for column in wide.T]).T
        found = data.load("digits").train.images[0, 0].numpy()
        assert np.abs(found - large).max() <= 0.5 + 1e-3

    def test_split_never_changes(self) -> None:
        assert data.load("digits").fingerprint() == data.load("digits").fingerprint()
        # The split is part of every figure that was measured on it.
        assert data.load("digits").test.labels[:8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


class TestMnist:
    @pytest.mark.parametrize("zipped", [False, True])
    @pytest.mark.parametrize("below", ["", "MNIST/raw"])
    def test_reads_both_pairs(self, tmp_path: Path, zipped: bool, below: str) -> None:
        write_pair(tmp_path / below, "train", images(7), labels(7), zipped)
        write_pair(tmp_path / below, "t10k", images(3, seed=1), labels(3), zipped)
        loaded = data.load(f"mnist:{tmp_path}")
        assert torch.equal(loaded.train.images[:, 0], torch.from_numpy(images(7)))
        assert torch.equal(loaded.test.images[:, 0], torch.from_numpy(images(3, seed=1)))
        assert loaded.train.labels.tolist() == labels(7).tolist()

    @pytest.mark.parametrize("split", ["train", "t10k"])
    def test_one_pair_is_split_in_order(self, tmp_path: Path, split: str) -> None:
        write_pair(tmp_path, split, images(10), labels(10))
        loaded = data.load(f"mnist:{tmp_path}")
        assert loaded.train.labels.tolist() == [*range(8)]
        assert loaded.test.labels.tolist() == [8, 9]

    def test_names_with_a_dot(self, tmp_path: Path) -> None:
        (tmp_path / "t10k-images.idx3-ubyte").write_bytes(idx(IMAGES, images(5)))
        (tmp_path / "t10k-labels.idx1-ubyte").write_bytes(idx(LABELS, labels(5)))
        assert len(data.load(f"mnist:{tmp_path}").train) == 4

    def test_the_real_test_pair(self, test_data: Path) -> None:
        loaded = data.load(f"mnist:{test_data / 'mnist'}")
        assert (len(loaded.train), len(loaded.test)) == (8000, 2000)
        assert loaded.train.labels[:5].tolist() == [7, 2, 1, 0, 4]
        for part in ("images", "labels"):
            path = next((test_data / "mnist").glob(f"t10k-{part}*.gz"))
            assert hashlib.sha256(path.read_bytes()).hexdigest() == mnist._SHA256["t10k", part]


# What is wrong with a folder, how it comes about, and what the one line must say.
def _no_folder(folder: Path) -> None:
    folder.rmdir()


def _a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_text("hello")


def _empty(folder: Path) -> None:
    pass


def _images_alone(folder: Path) -> None:
    write_pair(folder, "t10k", images(10), labels(10))
    (folder / "t10k-labels-idx1-ubyte").unlink()


def _change(part: str, content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        write_pair(folder, "t10k", images(10), labels(10))
        path = next(folder.glob(f"t10k-{part}*"))
        path.write_bytes(content(path.read_bytes()))

    return change


def _swapped(folder: Path) -> None:
    write_pair(folder, "t10k", images(10), labels(10))
    first, second = sorted(folder.iterdir())
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def _mixed_up(folder: Path) -> None:
    write_pair(folder, "t10k", images(10), labels(12))


def _a_folder_for_a_file(folder: Path) -> None:
    write_pair(folder, "t10k", images(10), labels(10))
    (folder / "t10k-images-idx3-ubyte").unlink()
    (folder / "t10k-images-idx3-ubyte").mkdir()


def _header(*shape: int, magic: int = IMAGES) -> Callable[[bytes], bytes]:
    return lambda content: idx(magic, np.zeros(0), shape) + content[16:]


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (_no_folder, "expected a folder of idx files, found no such folder"),
    "a file": (_a_file, "expected a folder of idx files, found a file"),
    "empty": (_empty, "found neither; --download"),
    "labels missing": (_images_alone, "expected t10k-labels-idx1-ubyte or .*found neither"),
    "swapped": (_swapped, r"magic 2051\), found .*magic 2049\): are images and labels swapped"),
    "mixed up": (_mixed_up, "expected 10 labels, one for each image of .*, found 12"),
    "a folder for a file": (_a_folder_for_a_file, "expected a file, found a folder"),
    "empty file": (_change("images", lambda _: b""), "expected an idx header, found the end"),
    "cut header": (_change("images", lambda c: c[:9]), "expected an idx header, found the end"),
    "not idx": (_change("images", lambda _: b"PNG and so on"), "expected .*, found magic 1347"),
    "other type": (_change("labels", lambda c: b"\0\0\x0d" + c[3:]), "found magic 3329"),
    "cut": (_change("images", lambda c: c[:-1]), "expected 10 x 28 x 28 = 7,840 bytes"),
    "too long": (_change("labels", lambda c: c + b"\1"), "expected 10 = 10 bytes.*found more"),
    "no images": (_change("images", _header(0, 28, 28)), "expected at least one item"),
    "lying count": (_change("images", _header(11, 28, 28)), "11 x 28 x 28 = 8,624 bytes"),
    "huge": (_change("images", _header(*[0xFFFFFFFF] * 3)), "expected at most 1,073,741,824"),
    "other size": (_change("images", _header(10, 14, 56)), "28 x 28 images, found 14 x 56"),
    "label 10": (_change("labels", lambda c: c[:-1] + b"\x0a"), "0 to 9, found 10 for image 9"),
    "cut gzip": (_change("images", lambda c: gzip.compress(c)[:-9]), "expected a whole gzip file"),
    "broken gzip": (
        _change("images", lambda c: gzip.compress(c)[:60] + b"\0\1\2" * 2000),
        "expected a whole gzip file",
    ),
    "gzip of less": (
        _change("images", lambda c: gzip.compress(c[:-784])),
        "as the header says, found 7,056: the file is truncated",
    ),
    "gzip of more": (_change("images", lambda c: gzip.compress(c + c)), "found more"),
    "one image": (
        lambda folder: write_pair(folder, "t10k", images(1), labels(1)),
        "expected 2 images or more, found 1",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    spoil, message = BAD_FOLDERS[name]
    folder = tmp_path / "data"
    folder.mkdir()
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        data.load(f"mnist:{folder}")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_gzip_bomb_takes_no_memory(tmp_path: Path) -> None:
    # 64 MiB of zeros in 64 KiB, behind a header that admits to ten images only.
    bomb = idx(IMAGES, np.zeros(0), (10, 28, 28)) + bytes(64 << 20)
    write_pair(tmp_path, "t10k", images(10), labels(10))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(gzip.compress(bomb))
    del bomb
    tracemalloc.start()
    with pytest.raises(DataError, match="found more"):
        data.load(f"mnist:{tmp_path}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_header_beyond_what_gzip_can_hold_is_refused_unread(tmp_path: Path) -> None:
    write_pair(tmp_path, "t10k", images(10), labels(10))
    small = idx(IMAGES, np.zeros(100), (900_000, 28, 28))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(gzip.compress(small))
    with pytest.raises(DataError, match=r"705,600,000 bytes as the header says, found a file of"):
        data.load(f"mnist:{tmp_path}")


@pytest.mark.parametrize("spec", ["", "mnist", "mnist:", "digits:here", "cifar", "Digits"])
def test_an_unknown_spec_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match="expected digits, mnist:DIR or folder:DIR, got"):
        data.load(spec)


class TestLoader:
    def loader(self, **options: object) -> data.Loader:
        part = data.ImageSet(
            torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10)
        )
        return data.Loader(part, 4, **options)  # type: ignore[arg-type]

    def test_values_and_sizes(self) -> None:
        batches = list(self.loader().epoch())
        assert [len(batch.targets) for batch in batches] == [4, 4, 2] and len(self.loader()) == 3
        joined = torch.cat([batch.images for batch in batches]).flatten()
        assert torch.equal(joined, torch.arange(10, dtype=torch.float32) / 255)

    def test_an_epoch_shows_each_image_once_in_an_order_of_its_own(self) -> None:
        loader = self.loader(seed=5)
        orders = [torch.cat([b.targets for b in loader.epoch(n)]).tolist() for n in (0, 1, 0)]
        assert all(sorted(order) == [*range(10)] for order in orders)
        assert orders[0] == orders[2] != orders[1]
        torch.manual_seed(99)  # the order is the seed's and nobody else's
        assert torch.cat([b.targets for b in loader.epoch(1)]).tolist() == orders[1]
        assert torch.cat([b.targets for b in self.loader(seed=6).epoch()]).tolist() != orders[0]

    def test_starts_at_any_batch(self) -> None:
        loader = self.loader(seed=5)
        whole, rest = list(loader.epoch(3)), list(loader.epoch(3, start=2))
        assert torch.equal(rest[0].images, whole[2].images) and len(rest) == 1
        assert not list(loader.epoch(3, start=3))


class TestTorchvisionNames:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        write_pair(tmp_path / "MNIST/raw", "train", images(9), labels(9), zipped=True)
        write_pair(tmp_path / "MNIST/raw", "t10k", images(4, seed=1), labels(4))
        return tmp_path

    def test_items_are_pillow_images(self, root: Path) -> None:
        image, label = datasets.MNIST(root, train=False)[2]
        assert (image.mode, image.size, label) == ("L", (28, 28), 2)
        assert np.array_equal(np.array(image), images(4, seed=1)[2])

    def test_to_tensor_gives_the_same_from_image_and_array(self, root: Path) -> None:
        dataset = datasets.MNIST(root, transform=transforms.ToTensor())
        tensor, label = dataset[8]
        assert label == 8 and tensor.dtype == torch.float32 and tensor.shape == (1, 28, 28)
        expected = torch.from_numpy(images(9)[8]).float()[None] / 255
        assert torch.equal(tensor, expected)
        assert torch.equal(transforms.ToTensor()(datasets.MNIST(root)[8][0]), expected)

    def test_compose_and_normalize(self, root: Path) -> None:
        steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.25,))])
        dataset = datasets.MNIST(root, True, steps, target_transform=lambda label: -label)
        image, label = dataset[3]
        assert label == -3
        torch.testing.assert_close(image[0], (dataset.data[3] / 255 - 0.5) / 0.25)

    def test_to_tensor_of_colour_and_float(self) -> None:
        colour = images(3).transpose(1, 2, 0)  # H, W, C
        tensor = transforms.ToTensor()(colour)
        assert torch.equal(tensor, torch.from_numpy(images(3)).float() / 255)
        assert torch.equal(transforms.ToTensor()(np.ones((2, 3))), torch.ones(1, 2, 3).double())

    def test_bad_arguments(self) -> None:
        with pytest.raises(TypeError, match="expected a Pillow image or an array, got list"):
            transforms.ToTensor()([1, 2])
        with pytest.raises(ValueError, match="expected 2 or 3 dimensions, got 1"):
            transforms.ToTensor()(np.zeros(3))
        with pytest.raises(ValueError, match="std: expected values other than zero"):
            transforms.Normalize(0.5, (0.1, 0.0))

    def test_a_data_loader_with_workers_takes_it(self, root: Path) -> None:
        dataset = datasets.MNIST(root, transform=transforms.ToTensor())
        loader = DataLoader(dataset, batch_size=4, num_workers=1)
        batches = list(loader)
        assert [tuple(batch[0].shape) for batch in batches] == [(4, 1, 28, 28)] * 2 + [
            (1, 1, 28, 28)
        ]
        assert torch.cat([batch[1] for batch in batches]).tolist() == [*range(9)]

    def test_missing_files_say_how_to_get_them(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte or .*download=True"):
            datasets.MNIST(tmp_path)


class TestDownload:
    """Against a server on this machine that stands in for the mirrors."""

    @pytest.fixture
    def served(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
        files: dict[str, bytes] = {}
        pixels, classes = digits(10)
        write_pair(tmp_path / "origin", "train", pixels, classes, zipped=True)
        write_pair(tmp_path / "origin", "t10k", pixels[:5], classes[:5], zipped=True)
        sums = {}
        for path in (tmp_path / "origin").iterdir():
            files[path.name] = path.read_bytes()
            split, part = path.name.split("-")[:2]
            sums[split, part] = hashlib.sha256(files[path.name]).hexdigest()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = files.get(self.path.rpartition("/")[2])
                self.send_response(200 if content is not None else 404)
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *arguments: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(mnist, "_SHA256", sums)
        monkeypatch.setattr(mnist, "MIRRORS", (f"http://127.0.0.1:{server.server_port}/",))
        yield files
        server.shutdown()
        server.server_close()

    def test_fetches_what_is_missing_and_nothing_else(
        self, tmp_path: Path, served: dict[str, bytes]
    ) -> None:
        folder = tmp_path / "new" / "mnist"
        loaded = data.load(f"mnist:{folder}", download=True)
        assert (len(loaded.train), len(loaded.test)) == (10, 5)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == served
        served.clear()  # now the server has nothing, and nothing is asked of it
        data.load(f"mnist:{folder}", download=True)

    def test_datasets_put_it_where_torchvision_does(
        self, tmp_path: Path, served: dict[str, bytes]
    ) -> None:
        assert len(datasets.MNIST(tmp_path / "root", train=False, download=True)) == 5
        found = sorted(path.name for path in (tmp_path / "root/MNIST/raw").iterdir())
        assert found == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]

    @pytest.mark.parametrize("trouble", ["missing", "altered", "no server"])
    def test_a_failed_download_leaves_nothing(
        self,
        tmp_path: Path,
        served: dict[str, bytes],
        monkeypatch: pytest.MonkeyPatch,
        trouble: str,
    ) -> None:
        name = "train-images-idx3-ubyte.gz"
        message = "expected a download, found: .*"
        if trouble == "missing":
            del served[name]
            message += "404"
        elif trouble == "altered":
            served[name] = zlib.compress(b"something else")
            message += "SHA-256 .* instead of"
        else:
            monkeypatch.setattr(mnist, "MIRRORS", ("http://127.0.0.1:1/",))
        with pytest.raises(DataError, match=message):
            data.load(f"mnist:{tmp_path / 'new'}", download=True)
        assert not [p for p in tmp_path.rglob("*") if name in p.name and "origin" not in str(p)]
        assert not list(tmp_path.rglob("*.tmp"))
