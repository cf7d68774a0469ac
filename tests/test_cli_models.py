"""`gdfast val`, `predict`, `export` and `data`, as a user types them, on a run of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mnist_files import digits, write_pair
from PIL import Image

from gdfast.cli import main
from gdfast.train import predict


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pair(folder, "train", *digits(250))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "run"
    words = ["train", "cnn", "--data", f"mnist:{folder}", "--epochs", "3", "--out", str(out)]
    assert main(words) == 0
    return out


def outcome(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def scalars(path: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((path / "metrics.json").read_text())
    return metrics


class TestVal:
    def test_gives_the_run_s_own_measures(
        self, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        status, output, errors = outcome(capsys, "val", run, "--json", "--out", tmp_path / "val")
        assert (status, errors) == (0, "")
        measures = json.loads(output)
        assert measures["test_accuracy"] == scalars(run)["best_test_accuracy"]
        written = {path.name for path in (tmp_path / "val").iterdir()}
        assert written == {"metrics.json", "confusion.png", "mistakes.png"}
        assert scalars(tmp_path / "val")["test_accuracy"] == measures["test_accuracy"]

    def test_of_other_data_and_plain_pytorch(
        self, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        write_pair(tmp_path, "t10k", *digits(100))
        words = ("val", run, "--data", f"mnist:{tmp_path}", "--json")
        ours, native = (
            json.loads(outcome(capsys, *words, "--backend", name)[1]) for name in ("auto", "native")
        )
        assert ours["test_loss"] == pytest.approx(native["test_loss"], rel=1e-4)
        assert ours["test_loss"] != pytest.approx(scalars(run)["test_loss"], rel=1e-4)

    @pytest.mark.parametrize("place", ["nowhere", "file"])
    def test_without_a_run(
        self, place: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("x")
        status, _, errors = outcome(capsys, "val", tmp_path / place)
        assert status == 2 and "expected a run's folder with args.yaml" in errors
        assert errors.count("\n") == 1


class TestPredict:
    @pytest.fixture
    def images(self, tmp_path: Path) -> Path:
        folder = tmp_path / "images"
        folder.mkdir()
        pixels, _ = digits(3)
        for number, each in enumerate(pixels):
            Image.fromarray(np.asarray(each)).save(folder / f"{number}.png")
        return folder

    def test_names_every_image(
        self, run: Path, images: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        status, output, errors = outcome(capsys, "predict", run, images, "--out", out)
        assert (status, errors) == (0, "") and "3 images; everything is in" in output
        answers = json.loads((out / "predictions.json").read_text())
        assert [Path(answer["image"]).name for answer in answers] == ["0.png", "1.png", "2.png"]
        model = predict.load(run).model
        for answer in answers:
            pixels = np.asarray(Image.open(answer["image"]))
            with torch.no_grad():
                logits = model(torch.from_numpy(pixels / np.float32(255))[None, None])[0]
            assert answer["class"] == str(int(logits.argmax()))
            chances = torch.softmax(logits.double(), 0)
            assert answer["probabilities"][answer["class"]] == pytest.approx(float(chances.max()))
            with Image.open(out / answer["picture"]) as picture:
                assert picture.width > 500

    def test_goes_on_after_a_bad_image(
        self, run: Path, images: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        (images / "1.png").write_bytes(b"")
        words = ("predict", run, images, "--out", tmp_path / "out", "--no-pictures")
        status, output, errors = outcome(capsys, *words)
        assert status == 1 and "1.png: expected an image, found an empty file" in errors
        assert "2 images" in output
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]

    def test_refuses_what_it_cannot_use(
        self, run: Path, images: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, str(tmp_path / "foreign.safetensors"))
        named = {"task": "cnn", "model": "cnn", "options": '{"num_classes": 1000000000000}'}
        save_file({"a": torch.ones(1)}, str(tmp_path / "bomb.safetensors"), named)
        other = {**named, "options": '{"num_classes": 11}'}
        save_file({"a": torch.ones(1)}, str(tmp_path / "other.safetensors"), other)
        (tmp_path / "text.pt").write_text("hello world")
        for words, message in (
            ((tmp_path / "none", images), "expected a run's folder or a file of weights"),
            ((images, images), "found a folder without them"),
            ((images / "0.png", images), "expected safetensors"),
            ((tmp_path / "foreign.safetensors", images), "found others (no 'model')"),
            ((tmp_path / "bomb.safetensors", images), "found others (num_classes 1000000000000)"),
            ((tmp_path / "other.safetensors", images), "expected the weights of a SimpleCNN"),
            ((tmp_path / "text.pt", images), "expected a state_dict that torch saved"),
            ((run, images, "--device", "foo"), "device: expected auto, cpu, or a device"),
            ((run, tmp_path / "none.png"), "expected an image or a folder, found no such file"),
            ((run, images, "--gallery", images), "gallery: expected no such option"),
        ):
            status, _, errors = outcome(capsys, "predict", *words, "--out", tmp_path / "out")
            assert status == 2 and message in errors and errors.count("\n") == 1, errors


class TestExport:
    def test_onnxruntime_agrees(
        self, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        for module in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(module, reason=f"needs {module}")
        import onnxruntime

        path = tmp_path / "model.onnx"
        status, output, errors = outcome(capsys, "export", run, "--out", path)
        assert (status, errors) == (0, "") and "checked with onnxruntime" in output
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        images = torch.rand(7, 1, 28, 28)
        (logits,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = predict.load(run).model(images)
        assert np.allclose(logits, expected.numpy(), atol=1e-4)
        about = session.get_modelmeta().custom_metadata_map
        assert json.loads(about["gdfast.classes"]) == [str(n) for n in range(10)]

    def test_says_what_is_missing(
        self, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import importlib

        real = importlib.import_module

        def without_onnx(name: str, package: str | None = None) -> object:
            if name.split(".")[0] == "onnx":
                raise ModuleNotFoundError("No module named 'onnx'", name="onnx")
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", without_onnx)
        status, _, errors = outcome(capsys, "export", run)
        assert status == 2 and 'pip install "gdfast[export]"' in errors
        assert not (run / "model.onnx").exists()


class TestData:
    def test_show_draws_every_augmentation(
        self, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        grid = tmp_path / "grid.png"
        status, output, _ = outcome(capsys, "data", "show", f"mnist:{folder}", "--out", grid)
        assert status == 0 and "8 rows of images are in" in output
        with Image.open(grid) as picture:
            assert picture.width > 800 and len(picture.getcolors(1 << 24) or []) > 100

    def test_check_passes_good_data_and_lists_bad(
        self, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        status, output, _ = outcome(capsys, "data", "check", f"mnist:{folder}")
        assert status == 0 and output.endswith("nothing wrong was found\n")
        for name in ("cat", "dog"):
            (tmp_path / "pets" / name).mkdir(parents=True)
            Image.new("RGB", (5, 5), "red" if name == "cat" else "blue").save(
                tmp_path / "pets" / name / "a.png"
            )
            (tmp_path / "pets" / name / "b.png").write_bytes(b"")
        status, output, _ = outcome(capsys, "data", "check", f"folder:{tmp_path / 'pets'}")
        assert status == 1 and output.count("found an empty file") == 2
        assert output.endswith("problems\n")

    def test_check_of_an_unknown_kind(self, capsys: pytest.CaptureFixture[str]) -> None:
        status, _, errors = outcome(capsys, "data", "check", "cifar:x")
        assert status == 2 and "expected one that begins with digits, mnist, folder" in errors
