"""A training run, from its model and data to a folder of results."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn, optim

import gdfast
from gdfast import backends, native
from gdfast.backends import choices, tuning
from gdfast.backends.choices import Choice
from gdfast.backends.registry import AUTO, REFERENCE
from gdfast.data import DataError
from gdfast.data.loader import Loader
from gdfast.train import checkpoint, distributed, optimizer, plots, rng
from gdfast.train.board import Board
from gdfast.train.ema import EMA
from gdfast.train.errors import InterruptedRun
from gdfast.train.folder import RunFolder
from gdfast.train.lessons import lessons
from gdfast.train.loop import Trainer
from gdfast.train.predict import BEST, WEIGHTS
from gdfast.train.progress import Progress
from gdfast.train.recipe import Settings
from gdfast.train.state import LOOP_COLUMNS, State
from gdfast.train.task import Data, Task
from gdfast.train.tasks import TASKS, settle


@dataclass(frozen=True)
class Result:
    """What a finished run gives: its folder, its model, and what `metrics.json` holds."""

    folder: Path
    model: nn.Module
    metrics: dict[str, Any]


class Run:
    """One run: what `train` and `resume` (see `start`) build and take to its end."""

    folder: RunFolder
    board: Board

    def __init__(
        self,
        settings: Settings,
        data: Data,
        group: distributed.Group,
        stream: TextIO | None,
        *,
        fresh: bool = True,
    ) -> None:
        if settings.backend == REFERENCE:
            # Plain PyTorch in every part, so that comparing with it means something.
            make_optimizer: Callable[..., optim.Optimizer] = torch.optim.SGD
        else:
            make_optimizer = gdfast.optim.SGD
        self.fingerprint = data.fingerprint()
        self.group = group
        self.device = torch.device(settings.device)
        self.task: Task = TASKS[settings.task].load()(settings, data)
        self.data_name = data.name
        self.settings = settings = settle(settings, self.task.epochs)
        recipe = settings.descent
        assert recipe.epochs is not None
        self.epochs: int = recipe.epochs
        if fresh:
            self.task.begin()
        self.model = self.task.model
        if settings.backend == REFERENCE:
            gdfast.restore_(self.model)
        elif group.ranks == 1 or self.device.type == "cpu":
            # Statistics over several GPUs are another layer's, which cannot be fused.
            gdfast.swap_(self.model, fuse=True)
        self.model.to(self.device)
        self.optimizer = optimizer.create(make_optimizer, self.model, recipe)
        self.ema = EMA(self.model, recipe.ema) if recipe.ema else None
        self.batches = Loader(
            self.task.source,
            recipe.batch_size,
            seed=settings.seed,
            workers=settings.workers,
            device=self.device,
            rank=group.rank,
            ranks=group.ranks,
        )
        if not len(self.batches):
            raise DataError(
                f"data: {settings.data}: expected an image to train on for each of "
                f"{group.ranks} processes, found {self.batches.images}"
            )
        stream = (stream or sys.stdout) if group.leads else io.StringIO()
        self.progress = Progress(stream, self.epochs, len(self.batches))
        self.state = State()
        self.choices: dict[str, Choice] = {}
        self.kernels_before = plots.first_convolution(self.model)

    def create_folder(self, out: str | Path | None) -> None:
        """Make a new folder, the same for all processes."""
        path = str(RunFolder.create(self.settings.task, out).path) if self.group.leads else None
        self.folder = RunFolder(Path(self.group.from_leader(path)))

    def start(self, out: str | Path | None) -> None:
        """Begin in a new folder."""
        self.create_folder(out)
        if self.group.leads:
            self.folder.write_yaml("args.yaml", self.settings.to_dict())
        self._describe()

    def restore(self, folder: Path, content: dict[str, Any]) -> None:
        """Put everything back to where a checkpoint stood."""
        self.folder = RunFolder.reopen(folder)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(content["ema"])
        self.state = State.from_dict(content["state"])
        self.choices = choices.from_plain(content["choices"])
        steps = {"lr", "images", "loss", *self.task.terms}
        self.state.check(
            self.epochs, len(self.batches), steps, {*LOOP_COLUMNS, "train_loss", self.task.score}
        )
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
        for name, now in self._conditions().items():
            if (then := content["conditions"][name]) != now:
                self.progress.say(
                    f"note: begun with {name} {then}, going on with {now}: "
                    "sums may be rounded differently"
                )

    def trainer(self) -> Trainer:
        """The loop, ready to begin or to go on."""
        return Trainer(
            task=self.task,
            model=self.group.wrap(self.model, self.device),
            optimizer=self.optimizer,
            batches=self.batches,
            recipe=self.settings.descent,
            epochs=self.epochs,
            ema=self.ema,
            evaluate=self._evaluate,
            save=self._save,
            save_best=self._save_best,
            progress=self.progress,
            state=self.state,
            group=self.group,
        )

    def finish(self) -> Result:
        """Train to the end and write the results."""
        try:
            with backends.backend(self.settings.backend), tuning.recorded(self.choices):
                self.trainer().fit()
                # Of the weights as they are now: a continued run has measured none of them yet.
                if self.group.leads:
                    self._evaluate()
        except InterruptedRun as stop:
            stop.folder = self.folder.path
            raise
        finally:
            self.progress.clear()
            self.board.close()
        metrics = self.group.from_leader(self._write_results() if self.group.leads else None)
        return Result(self.folder.path, self._measured_model(), metrics)

    def _measured_model(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.model

    def _evaluate(self) -> dict[str, float]:
        model = self._measured_model().eval()
        with torch.inference_mode():
            measures = self.task.evaluate(model)
        self._refuse_bad_data()
        return measures

    def _refuse_bad_data(self) -> None:
        """Raise DataError where more items turned out to be bad than may be."""
        skipped = len(self.batches.skipped) + self.task.skipped()
        share, total = self.settings.max_bad, sum(self.task.sizes())
        if skipped > share * total:
            first = next(iter(self.batches.skipped.values()), "an item of the test part")
            raise DataError(
                f"data: {self.settings.data}: expected at most {share:.1%} bad items, found "
                f"{skipped:,} of {total:,}: {first}. `gdfast data check` lists all; --max-bad "
                "allows more"
            )

    def _save(self) -> None:
        if not self.group.leads:
            return
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
            "conditions": self._conditions(),
            "choices": choices.to_plain(self.choices),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "state": state.to_dict(),
            "kernels_before": self.kernels_before,
            "rng": rng.capture(),
        }
        self.folder.write(checkpoint.NAME, checkpoint.to_bytes(content))
        self.board.show(self.folder.path, state)

    def _save_best(self) -> None:
        if self.group.leads:
            self._write_weights(BEST)

    def _write_weights(self, name: str) -> None:
        weights = self.task.exported(self._measured_model()).state_dict()
        metadata = {"gdfast": gdfast.__version__, "task": self.settings.task}
        self.folder.write_weights(name, weights, {**metadata, **self.task.metadata()})

    def _write_results(self) -> dict[str, Any]:
        state, settings, folder, task = self.state, self.settings, self.folder, self.task
        last = state.epochs[-1]
        train_images, test_images = task.sizes()
        skipped = len(self.batches.skipped) + task.skipped()
        metrics = {
            **{name: value for name, value in last.items() if name not in LOOP_COLUMNS},
            f"best_{task.score}": max(row[task.score] for row in state.epochs),
            "best_epoch": state.best_epoch(task.score),
            "seconds": state.seconds,
            "seconds_per_step": state.training_seconds / len(state.steps["loss"]),
            "images_per_second": state.images_per_second(),
            "epochs_done": state.epoch,
            "steps": len(state.steps["loss"]),
            "train_images": train_images,
            "test_images": test_images - task.skipped(),
            "skipped_images": skipped,
            "parameters": _parameters(self.model),
            **self._conditions(),
            **settings.to_dict(),
            **task.write_results(self._measured_model(), folder),
        }
        title = plots.title(settings.task, self.data_name, settings.seed)
        folder.write_figure("curves.png", plots.curves(state, task.score, title))
        if self.kernels_before is not None:
            after = plots.first_convolution(self.model)
            assert after is not None
            name = f"{title}: {len(after)} kernels of the first layer"
            folder.write_figure("kernels.png", plots.kernels(self.kernels_before, after, name))
        self._write_weights(WEIGHTS)
        folder.write_json("metrics.json", metrics)
        score = task.score.replace("_", " ")
        self.progress.say(
            f"{score} {last[task.score]:.4f} on {test_images:,} images, {state.seconds:.1f} s, "
            f"{state.images_per_second():,.0f} images/s; everything is in {folder.path}"
        )
        if skipped:
            self.progress.say(
                f"{skipped:,} bad items were left out: gdfast data check {settings.data}"
            )
        for lesson in lessons(state, settings.descent.lr):
            self.progress.say(f"- {lesson}")
        return metrics

    def _conditions(self) -> dict[str, Any]:
        """What else decides the last bits of a result."""
        return {
            "threads": torch.get_num_threads(),
            "processes": self.group.ranks,
            "instruction_set": native.cpu.isa() if native.cpu else None,
            "precision": "strict" if backends.is_strict() else "fast",
            "torch": str(torch.__version__),
            "gdfast": gdfast.__version__,
        }

    def _describe(self) -> None:
        settings, recipe = self.settings, self.settings.descent
        backend = settings.backend
        if backend == AUTO:
            query = backends.Query(self.device, torch.float32)
            backend = f"auto ({backends.preview('conv2d', query)})"
        say = self.progress.say
        train_images, test_images = self.task.sizes()
        say(
            f"{settings.task}: {_parameters(self.model):,} parameters; {settings.data}: "
            f"{train_images:,} images to train on, {test_images:,} to test"
        )
        say(
            f"lr {recipe.lr:g} {recipe.schedule}, warm-up {recipe.warmup}, "
            f"momentum {recipe.momentum:g}, batch {recipe.batch_size}, epochs {recipe.epochs}, "
            f"seed {settings.seed}; backend {backend}, {self.device}, "
            f"threads {torch.get_num_threads()}; {self.folder.path}"
        )
        if self.group.ranks > 1:
            say(f"{self.group.ranks} processes share every batch")
            norms = any(isinstance(each, nn.BatchNorm2d) for each in self.model.modules())
            if norms and self.device.type == "cpu":
                say("note: on the CPU batch normalisation takes each process's images alone")


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
