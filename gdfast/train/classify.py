"""Training an image classifier, from data to a folder of results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn, optim

import gdfast
from gdfast import backends, data, models, native
from gdfast.backends import choices, tuning
from gdfast.backends.choices import Choice
from gdfast.backends.registry import AUTO, REFERENCE
from gdfast.data import Batches, DataError, ImageData
from gdfast.errors import UserError
from gdfast.extras import require
from gdfast.metrics import Classification, classification
from gdfast.train import checkpoint, plots, rng
from gdfast.train.errors import InterruptedRun, RunError, SettingsError
from gdfast.train.folder import RunFolder
from gdfast.train.loop import Trainer
from gdfast.train.progress import Progress
from gdfast.train.recipe import Settings
from gdfast.train.state import State

_EVALUATION_BATCH = 500
# What the loop records of a step and of an epoch, with `_accuracy` and `_Run._evaluate`.
_STEP_COLUMNS = {"lr", "images", "loss", "accuracy"}
_EPOCH_COLUMNS = {
    "epoch", "step", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
    "images_per_second",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a finished run gives: its folder, its model, and what `metrics.json` holds."""

    folder: Path
    model: nn.Module
    metrics: dict[str, Any]


def train(
    settings: Settings,
    *,
    out: str | Path | None = None,
    download: bool = False,
    stream: TextIO | None = None,
) -> Result:
    """Train a classifier and leave everything in the run folder `out` (else a numbered one).

    Progress goes to `stream`, standard output if None. Data is read before the folder is made.

    Raises:
        DataError, SettingsError, RunError: bad data, settings or folder.
        MissingExtraError: a package that training needs is not installed.
        DivergedError: the loss is not finite any more.
        InterruptedRun: the user stopped it; `resume` goes on.
    """
    _require_extras()
    images = data.load(settings.data, download=download)
    settings = _settle(settings, images)
    rng.seed_all(settings.seed)
    run = _Run(settings, images, stream or sys.stdout)
    run.start(RunFolder.create(settings.model, out))
    return run.finish()


def resume(
    run: str | Path, *, data_spec: str | None = None, stream: TextIO | None = None
) -> Result:
    """Go on with an interrupted run; its outcome is bit for bit that of one never interrupted.

    `run` is the run's folder or its checkpoint. `data_spec` says where the data lies now, if it has
    moved; it must be the same data. Raises what `train` raises.
    """
    _require_extras()
    path = Path(run)
    if path.is_dir():
        path = path / checkpoint.NAME
    content = checkpoint.load(path)
    with _misfits(path):
        settings = Settings.from_dict(content["settings"])
        spec = settings.data if data_spec is None else data_spec
        images = data.load(spec)
        _settle(settings, images)  # the device and the backend may be gone
        if images.fingerprint() != content["data_fingerprint"]:
            raise DataError(
                f"data: {spec}: expected the data that the run in {path.parent} began with, "
                "found other images or labels"
            )
        resumed = _Run(settings, images, stream or sys.stdout)
        resumed.restore(RunFolder.reopen(path.parent), content)
    return resumed.finish()


class _Run:
    """One run: what `train` and `resume` build and take to its end."""

    def __init__(self, settings: Settings, images: ImageData, stream: TextIO) -> None:
        self.settings = settings
        self.images = images
        self.fingerprint = images.fingerprint()
        self.device = torch.device(settings.device)
        self.model = models.create(settings.model)
        make_optimizer: Callable[..., optim.Optimizer] = gdfast.optim.SGD
        if settings.backend == REFERENCE:
            # Plain PyTorch in every part, so that comparing with it means something.
            gdfast.restore_(self.model)
            make_optimizer = torch.optim.SGD
        self.model.to(self.device)
        recipe = settings.recipe
        self.optimizer = make_optimizer(
            self.model.parameters(), lr=recipe.lr, momentum=recipe.momentum
        )
        self.batches = Batches(
            images.train, recipe.batch_size, seed=settings.seed, device=self.device
        )
        self.test = Batches(images.test, _EVALUATION_BATCH, device=self.device)
        if recipe.epochs is None:
            raise SettingsError("train: epochs: expected 1 or more in a run's settings, got None")
        self.epochs = recipe.epochs
        self.progress = Progress(stream, self.epochs, len(self.batches))
        self.state = State()
        self.choices: dict[str, Choice] = {}
        self.kernels_before = plots.first_convolution(self.model)

    def start(self, folder: RunFolder) -> None:
        """Begin in a new folder."""
        self.folder = folder
        folder.write_yaml("args.yaml", self.settings.to_dict())
        self._describe()

    def restore(self, folder: RunFolder, content: dict[str, Any]) -> None:
        """Put everything back to where a checkpoint stood."""
        self.folder = folder
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.state = State.from_dict(content["state"])
        # Checkpoints of the first versions have none.
        self.choices = choices.from_plain(content.get("choices", {}))
        self.state.check(self.epochs, len(self.batches), _STEP_COLUMNS, _EPOCH_COLUMNS)
        expected, self.kernels_before = self.kernels_before, content["kernels_before"]
        if getattr(self.kernels_before, "shape", None) != getattr(expected, "shape", None):
            raise ValueError("kernels_before is not like the first layer's kernels")
        rng.restore(content["rng"])
        self._describe()
        self.progress.say(
            f"going on in epoch {self.state.epoch + 1}, after batch {self.state.batch}"
            if self.state.epoch < self.epochs
            else "all epochs are done: writing the results again"
        )
        for name, now in _conditions().items():
            if (then := content["conditions"][name]) != now:
                self.progress.say(
                    f"note: begun with {name} {then}, going on with {now}: "
                    "sums may be rounded differently"
                )

    def finish(self) -> Result:
        """Train to the end and write the results."""
        trainer = Trainer(
            model=self.model,
            loss_fn=nn.CrossEntropyLoss(),
            optimizer=self.optimizer,
            batches=self.batches,
            recipe=self.settings.recipe,
            epochs=self.epochs,
            measure=_accuracy,
            evaluate=self._evaluate,
            save=self._save,
            progress=self.progress,
            state=self.state,
        )
        try:
            with backends.backend(self.settings.backend), tuning.recorded(self.choices):
                trainer.fit()
                result = self._predict()
        except InterruptedRun as stop:
            stop.folder = self.folder.path
            raise
        finally:
            self.progress.clear()
        return self._write_results(result)

    def _predict(self) -> Classification:
        self.model.eval()
        with torch.inference_mode():
            logits = torch.cat([self.model(images) for images, _ in self.test.epoch()]).cpu()
        return classification(logits, self.images.test.labels)

    def _evaluate(self) -> dict[str, float]:
        result = self._predict()
        return {"test_loss": result.loss, "test_accuracy": result.accuracy}

    def _save(self) -> None:
        state = self.state
        if state.steps:
            names = list(state.steps)
            rows = [[n, *row] for n, row in enumerate(zip(*state.steps.values(), strict=True), 1)]
            self.folder.write_csv("steps.csv", ["step", *names], rows)
        if state.epochs:
            rows = [list(row.values()) for row in state.epochs]
            self.folder.write_csv("results.csv", list(state.epochs[0]), rows)
        content = {
            "settings": self.settings.to_dict(),
            "data_fingerprint": self.fingerprint,
            "conditions": _conditions(),
            "choices": choices.to_plain(self.choices),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": state.to_dict(),
            "kernels_before": self.kernels_before,
            "rng": rng.capture(),
        }
        self.folder.write(checkpoint.NAME, checkpoint.to_bytes(content))

    def _write_results(self, result: Classification) -> Result:
        state, settings, folder = self.state, self.settings, self.folder
        last = state.epochs[-1]
        metrics = {
            **{name: last[name] for name in ("test_accuracy", "test_loss")},
            **{name: last[name] for name in ("train_accuracy", "train_loss")},
            "seconds": state.seconds,
            "images_per_second": state.images_per_second(),
            "epochs": state.epoch,
            "steps": len(state.steps["loss"]),
            "train_images": len(self.images.train),
            "test_images": len(self.images.test),
            "parameters": _parameters(self.model),
            **_conditions(),
            **settings.to_dict(),
        }
        title = f"{settings.model} on {self.images.name}, seed {settings.seed}"
        folder.write_figure("curves.png", plots.curves(state, title))
        if self.kernels_before is not None:
            after = plots.first_convolution(self.model)
            assert after is not None
            name = f"{title}: {len(after)} kernels of the first layer"
            folder.write_figure("kernels.png", plots.kernels(self.kernels_before, after, name))
        folder.write_figure(
            "mistakes.png",
            plots.mistakes(self.images.test.images, result, self.images.classes, title),
        )
        folder.write_weights(
            "weights.safetensors", self.model.state_dict(), {"model": settings.model}
        )
        folder.write_json("metrics.json", metrics)
        self.progress.say(
            f"test accuracy {last['test_accuracy']:.4f} on {len(self.images.test):,} images, "
            f"{state.seconds:.1f} s, {state.images_per_second():,.0f} images/s; "
            f"everything is in {folder.path}"
        )
        return Result(folder.path, self.model, metrics)

    def _describe(self) -> None:
        settings, recipe = self.settings, self.settings.recipe
        backend = settings.backend
        if backend == AUTO:
            query = backends.Query(self.device, torch.float32)
            backend = f"auto ({backends.preview('conv2d', query)})"
        say = self.progress.say
        say(
            f"{settings.model}: {_parameters(self.model):,} parameters; {settings.data}: "
            f"{len(self.images.train):,} images to train on, {len(self.images.test):,} to test"
        )
        say(
            f"lr {recipe.lr:g} {recipe.schedule}, warm-up {recipe.warmup}, "
            f"momentum {recipe.momentum:g}, batch {recipe.batch_size}, epochs {recipe.epochs}, "
            f"seed {settings.seed}; backend {backend}, {self.device}, "
            f"threads {torch.get_num_threads()}; {self.folder.path}"
        )


def _settle(settings: Settings, images: ImageData) -> Settings:
    """Settings with nothing left open: they mean the same in a run's every continuation."""
    try:
        backend = backends.chosen(settings.backend)
    except ValueError as error:
        raise SettingsError(f"train: {error}") from None
    for each in backends.available():
        if each.name == backend and not each.ok:
            raise SettingsError(f"train: backend: {backend!r} cannot be used here: {each.reason}")
    kind, colon, where = settings.data.partition(":")
    return replace(
        settings,
        data=f"{kind}:{Path(where).expanduser().resolve()}" if colon else kind,
        device=str(_device(settings.device)),
        backend=backend,
        recipe=replace(settings.recipe, epochs=settings.recipe.epochs or images.epochs),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"train: device: expected auto, cpu, or a device that is here, got {name!r}: {reason}"
        ) from None
    return device


@contextlib.contextmanager
def _misfits(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a checkpoint's content into one line."""
    try:
        yield
    except UserError:
        raise
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        text = str(error) or type(error).__name__
        reason = f"no {text}" if isinstance(error, KeyError) else text.splitlines()[0]
        raise RunError(
            f"train: {path}: expected a whole checkpoint, found one that does not fit: {reason}"
        ) from error


def _conditions() -> dict[str, Any]:
    """What else decides the last bits of a result."""
    return {
        "threads": torch.get_num_threads(),
        "instruction_set": native.cpu.isa() if native.cpu else None,
        "precision": "strict" if backends.is_strict() else "fast",
        "torch": str(torch.__version__),
        "gdfast": gdfast.__version__,
    }


def _accuracy(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    return {"accuracy": int((outputs.argmax(1) == labels).sum()) / len(labels)}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _require_extras() -> None:
    # Before the first step, not after the last.
    for module in ("matplotlib", "safetensors", "yaml"):
        require(module, "train", "gdfast train")
