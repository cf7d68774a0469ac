"""What the numbers of a run mean, and what to try next, for those who see them the first time."""

from __future__ import annotations

from gdfast.train.state import State

_FELL_WELL = 0.7  # of the first loss: above that, little has been learned
_GAP = 0.03  # between the training and the test part, of a share that was right
_LOSS_GAP = 1.5  # test loss over training loss


def lessons(state: State, lr: float) -> list[str]:
    """One sentence for each thing that a run's curves show."""
    first = _mean(state.steps["loss"][:10])
    last = state.epochs[-1]
    told = [_of_the_fall(first, last["train_loss"], lr)]
    told += _of_the_gap(last)
    if len(state.epochs) >= 4 and (rise := _test_loss_rose(state)):
        told.append(rise)
    return told


def _of_the_fall(first: float, last: float, lr: float) -> str:
    change = f"the training loss went from {first:.3g} to {last:.3g}"
    if last < _FELL_WELL * first:
        return f"{change}: gradient descent works, the learning rate ({lr:g}) fits"
    if last < first:
        return (
            f"{change}: it falls, but slowly: more epochs, or another learning rate than {lr:g} "
            "(--find-lr shows which)"
        )
    return (
        f"{change}: it does not fall: the learning rate ({lr:g}) is too high or too low "
        "(--find-lr shows which), or the labels do not fit the images"
    )


def _of_the_gap(last: dict[str, float]) -> list[str]:
    if "train_accuracy" not in last or "test_accuracy" not in last:
        return []
    gap = last["train_accuracy"] - last["test_accuracy"]
    if gap > _GAP:
        return [
            f"accuracy is {last['train_accuracy']:.3f} in training and {last['test_accuracy']:.3f} "
            "in the test: the model knows its images by heart: more images, stronger augmentation "
            "or weight decay would narrow the gap"
        ]
    return [
        f"accuracy is {last['train_accuracy']:.3f} in training and {last['test_accuracy']:.3f} in "
        "the test: what was learned holds for new images; a larger model or more epochs may add"
    ]


def _test_loss_rose(state: State) -> str:
    losses = [row["test_loss"] for row in state.epochs if "test_loss" in row]
    if not losses or losses[-1] < _LOSS_GAP * min(losses):
        return ""
    best = losses.index(min(losses)) + 1
    return (
        f"the test loss was lowest after epoch {best} and has risen since: it has begun to learn "
        "by heart; fewer epochs (or --patience) do"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
