"""Drawn faces of people who do not exist: synthetic data, for trying face recognition offline.

Each person has a head, hair, eyes, brows, nose and mouth of their own; each photograph a pose, an
expression, a light and a background. Figures on such data say that training works, not how well it
would recognise real people.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gdfast.data.faces import HEIGHT, WIDTH, FaceData, FaceSet, fit
from gdfast.extras import require

PEOPLE, PHOTOS = 40, 10  # as many as ORL has
_SEED = 20_260
_LARGER = 3  # drawn larger, then scaled down: smooth edges
_SKINS = ((246, 214, 190), (228, 186, 150), (198, 146, 110), (150, 102, 72), (98, 64, 46))
_HAIRS = (
    (28, 22, 20),
    (70, 46, 30),
    (122, 82, 48),
    (206, 170, 106),
    (150, 70, 40),
    (176, 174, 172),
)
_IRISES = ((70, 44, 26), (96, 120, 150), (84, 110, 76), (40, 28, 22))
_STYLES = ("bald", "short", "fringe", "parted", "long")


def load(*, height: int = HEIGHT, width: int = WIDTH, colour: bool = False) -> FaceData:
    """40 synthetic people in 10 drawn photographs each, the same at every call.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    photos = render(PEOPLE, PHOTOS, height=height, width=width, colour=colour, seed=_SEED)
    return FaceData("identities (synthetic)", photos, tuple(f"p{n + 1}" for n in range(PEOPLE)))


def render(
    people: int, photos: int, *, height: int, width: int, colour: bool = False, seed: int = 0
) -> FaceSet:
    """Draw so many synthetic people, so many photographs each; they depend on `seed` alone.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    images = []
    for person in range(people):
        face = _Person.draw(np.random.default_rng((seed, person)))
        for photo in range(photos):
            picture = _photograph(face, np.random.default_rng((seed, person, photo)))
            grey = picture @ np.array([0.299, 0.587, 0.114])
            pixels = picture if colour else grey[:, :, None]
            images.append(fit(pixels.round().clip(0, 255).astype(np.uint8), height, width))
    names = tuple(f"p{p + 1}/{n + 1}" for p in range(people) for n in range(photos))
    return FaceSet(np.stack(images), np.repeat(np.arange(people), photos), names)


@dataclass(frozen=True)
class _Person:
    """Lengths are in halves of a mean head's width; y points down, 0 is between the eyes' level
    and the nose."""

    skin: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    style: str
    cheeks: float
    jaw: float
    chin: float
    crown: float
    hairline: float
    ears: float
    eyes_apart: float
    eyes_level: float
    eye_width: float
    eye_height: float
    eye_slant: float
    brow_level: float
    brow_thick: float
    brow_slant: float
    nose_length: float
    nose_width: float
    mouth_level: float
    mouth_width: float
    lips: float
    beard: float
    glasses: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Person:
        def any_of(colours: tuple[tuple[int, int, int], ...]) -> np.ndarray:
            first, second = (
                np.array(colours[n], float) for n in rng.integers(len(colours), size=2)
            )
            return first + (second - first) * rng.random()

        between = rng.uniform
        return cls(
            skin=any_of(_SKINS),
            hair=any_of(_HAIRS),
            iris=any_of(_IRISES),
            style=_STYLES[rng.choice(len(_STYLES), p=(0.1, 0.25, 0.2, 0.25, 0.2))],
            cheeks=between(0.84, 1.06),
            jaw=between(0.55, 0.95),
            chin=between(1.15, 1.5),
            crown=between(1.1, 1.35),
            hairline=between(0.6, 0.9),
            ears=between(0.1, 0.24),
            eyes_apart=between(0.36, 0.5),
            eyes_level=between(-0.22, -0.04),
            eye_width=between(0.15, 0.24),
            eye_height=between(0.06, 0.12),
            eye_slant=between(-0.05, 0.05),
            brow_level=between(0.16, 0.3),
            brow_thick=between(0.03, 0.1),
            brow_slant=between(-0.08, 0.08),
            nose_length=between(0.4, 0.68),
            nose_width=between(0.12, 0.26),
            mouth_level=between(0.68, 0.86),
            mouth_width=between(0.24, 0.46),
            lips=between(0.05, 0.13),
            beard=rng.choice([0.0, 0.0, 0.0, 0.35, 0.8]),
            glasses=rng.choice([0.0, 0.0, 0.0, between(0.22, 0.3)]),
        )


class _Canvas:
    """Polygons on a head that is turned: `yaw`, `pitch` and `roll` in radians."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.height, self.width = HEIGHT * _LARGER, WIDTH * _LARGER
        self.yaw, self.pitch, self.roll = rng.normal(0, (0.22, 0.12, 0.07)).clip(-0.5, 0.5)
        self.scale = self.width * rng.uniform(0.32, 0.38)
        self.middle = np.array([self.width / 2, self.height * 0.5]) + rng.normal(0, 4, 2) * _LARGER
        ground = np.full(3, rng.uniform(20, 190)) + rng.normal(0, 10, 3)
        pillow = require("PIL.Image", "train", "drawing faces")
        size = (self.width, self.height)
        self.image = pillow.new("RGB", size, _colour(ground))
        self._pen: Any = require("PIL.ImageDraw", "train", "drawing faces").Draw(self.image)

    def place(self, points: np.ndarray, lift: float = 0.0) -> list[tuple[float, float]]:
        """Where points [n, 2] of the face, `lift` above it, are seen, in pixels."""
        x, y = np.asarray(points, float).T
        z = np.sqrt(np.clip(1 - (x / 1.1) ** 2 - (y / 1.6) ** 2, 0, None)) * 0.8 + lift
        x = x * np.cos(self.yaw) + z * np.sin(self.yaw)
        y = y * np.cos(self.pitch) + z * np.sin(self.pitch)
        turned = np.stack(
            [
                x * np.cos(self.roll) - y * np.sin(self.roll),
                x * np.sin(self.roll) + y * np.cos(self.roll),
            ],
            axis=1,
        )
        return [(float(u), float(v)) for u, v in turned * self.scale + self.middle]

    def fill(self, points: np.ndarray, colour: np.ndarray, lift: float = 0.0) -> None:
        self._pen.polygon(self.place(points, lift), fill=_colour(colour))

    def line(self, points: np.ndarray, colour: np.ndarray, thick: float, lift: float = 0.0) -> None:
        wide = max(1, round(thick * self.scale))
        self._pen.line(self.place(points, lift), fill=_colour(colour), width=wide, joint="curve")


def _photograph(person: _Person, rng: np.random.Generator) -> np.ndarray:
    """One picture [HEIGHT, WIDTH, 3] of the person, float64 in 0 to 255 or a little beyond."""
    canvas = _Canvas(rng)
    smile, open_mouth = rng.normal(0.02, 0.05), max(0.0, rng.normal(-0.03, 0.06))
    lids = 0.15 if rng.random() < 0.1 else rng.uniform(0.7, 1.1)  # a blink, sometimes
    _head(canvas, person, rng)
    _eyes(canvas, person, lids, rng.normal(0, 0.03))
    _nose_and_mouth(canvas, person, smile, open_mouth)
    if person.glasses and rng.random() < 0.8:
        for side in (-1, 1):
            middle = np.array([side * person.eyes_apart, person.eyes_level])
            rim = _ellipse(middle, person.glasses, person.glasses * 0.8)
            canvas.line(rim, np.full(3, 40.0), 0.035, lift=0.1)
        bridge = np.array([[-1.0, 0], [1, 0]]) * (person.eyes_apart - person.glasses)
        bridge[:, 1] = person.eyes_level
        canvas.line(bridge, np.full(3, 40.0), 0.035, lift=0.1)
    pillow = require("PIL.Image", "train", "drawing faces")
    small = canvas.image.resize((WIDTH, HEIGHT), pillow.Resampling.BOX)
    blurred = small.filter(
        require("PIL.ImageFilter", "train", "drawing faces").GaussianBlur(rng.uniform(0.2, 0.9))
    )
    return _lit(np.asarray(blurred, dtype=np.float64), rng)


def _head(canvas: _Canvas, person: _Person, rng: np.random.Generator) -> None:
    outline = _outline(person)
    if person.style == "long":
        mane = _ellipse(np.array([0, 0.1]), person.cheeks + 0.25, person.crown + 0.28)
        canvas.fill(np.concatenate([mane, [[1.1, 1.5], [-1.1, 1.5]]])[:-2], person.hair)
        sides = [[-1.15, 0], [-1.1, 1.5], [1.1, 1.5], [1.15, 0]]
        canvas.fill(np.array(sides) * [person.cheeks, 1], person.hair)
    shoulders = [[-1.9, 2.4], [-1.4, 1.75], [-0.45, 1.5], [0.45, 1.5], [1.4, 1.75], [1.9, 2.4]]
    canvas.fill(np.array(shoulders), rng.uniform(30, 220, 3))
    neck = [[-0.5, 0.8], [0.5, 0.8], [0.5, 1.75], [-0.5, 1.75]]
    canvas.fill(np.array(neck), person.skin * 0.82)
    for side in (-1, 1):
        ear = _ellipse(np.array([side * (person.cheeks + 0.02), 0.05]), person.ears, 0.28)
        canvas.fill(ear, person.skin * 0.9)
    canvas.fill(outline, person.skin)
    if person.beard:
        low = outline[outline[:, 1] > 0.4]
        inner = _ellipse(np.array([0, 0.35]), person.cheeks * 0.72, 0.55)
        tone = person.skin + (person.hair - person.skin) * person.beard
        canvas.fill(low, tone)
        canvas.fill(inner, person.skin)
    _hair(canvas, person, outline)


def _hair(canvas: _Canvas, person: _Person, outline: np.ndarray) -> None:
    if person.style == "bald":
        return
    top = outline[outline[:, 1] < -0.25]
    top = top[np.argsort(np.arctan2(-top[:, 1], top[:, 0]))] * 1.1  # right to left, over the crown
    line = -person.hairline
    if person.style == "fringe":
        below = [[-0.8, line + 0.3], [0, line + 0.42], [0.8, line + 0.3]]
    elif person.style == "parted":
        below = [[-0.85, line + 0.3], [-0.3, line - 0.15], [0.2, line + 0.12], [0.85, line + 0.3]]
    else:
        below = [[-0.8, line + 0.15], [-0.5, line - 0.1], [0.5, line - 0.1], [0.8, line + 0.15]]
    canvas.fill(np.concatenate([top, np.array(below) * [person.cheeks, 1]]), person.hair)


def _eyes(canvas: _Canvas, person: _Person, lids: float, gaze: float) -> None:
    for side in (-1, 1):
        middle = np.array([side * person.eyes_apart, person.eyes_level])
        tall = person.eye_height * lids
        canvas.fill(_ellipse(middle, person.eye_width * 1.25, tall * 1.7), person.skin * 0.88)
        almond = _ellipse(np.zeros(2), person.eye_width, tall)
        almond[:, 1] -= side * almond[:, 0] * person.eye_slant / person.eye_width
        canvas.fill(almond + middle, np.full(3, 236.0))
        iris = min(tall, person.eye_height) * 0.95
        looking, pupil = middle + np.array([gaze, 0]), iris * 0.45
        canvas.fill(_ellipse(looking, iris, min(iris, tall)), person.iris)
        canvas.fill(_ellipse(looking, pupil, min(pupil, tall)), np.zeros(3))
        lid = almond[almond[:, 1] <= 0.02] + middle
        canvas.line(lid[np.argsort(lid[:, 0])], person.skin * 0.4, 0.03)
        reach = np.linspace(-1.2, 1.2, 7)
        arch = -0.06 * (1 - (reach / 1.2) ** 2) - side * reach * person.brow_slant
        brow = np.stack([reach * person.eye_width, arch - person.brow_level], axis=1)
        dark = person.hair * 0.75 + person.skin * 0.1
        canvas.line(brow + middle, dark, person.brow_thick)


def _nose_and_mouth(canvas: _Canvas, person: _Person, smile: float, open_mouth: float) -> None:
    tip = person.eyes_level + person.nose_length
    wide = person.nose_width
    shade = person.skin * 0.78
    canvas.fill(np.array([[0.02, person.eyes_level], [wide * 0.7, tip], [0.02, tip]]),
                person.skin * 0.9, lift=0.12)  # fmt: skip
    base = np.array([[-wide, tip - 0.08], [-wide * 0.8, tip], [0, tip + 0.04], [wide * 0.8, tip],
                     [wide, tip - 0.08]])  # fmt: skip
    canvas.line(base, shade, 0.04, lift=0.15)
    for side in (-1, 1):
        nostril = np.array([side * wide * 0.5, tip])
        canvas.fill(_ellipse(nostril, 0.05, 0.03), person.skin * 0.4, lift=0.15)
    reach = np.linspace(-1, 1, 9)
    bend = smile * (1 - 2 * reach**2) + person.mouth_level
    across = reach * person.mouth_width
    bow = person.lips * (1 - reach**2)
    lip = person.skin * [0.86, 0.6, 0.6]
    upper = np.stack([across, bend - bow * 0.8 - open_mouth * (1 - reach**2) * 0.3], axis=1)
    lower = np.stack([across, bend + bow + open_mouth * (1 - reach**2)], axis=1)
    canvas.fill(np.concatenate([upper, lower[::-1]]), lip)
    gap = np.stack([across * 0.9, bend + open_mouth * (1 - reach**2) * 0.6], axis=1)
    parted = np.stack([across * 0.9, bend], axis=1)
    canvas.fill(np.concatenate([parted, gap[::-1]]), np.array([60.0, 24, 24]))
    canvas.line(parted, person.skin * 0.42, 0.025)


def _outline(person: _Person) -> np.ndarray:
    """The head's edge [n, 2]: half an ellipse for the crown, a jaw that narrows to the chin."""
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    x, y = np.cos(angles) * person.cheeks, np.sin(angles)
    below = y > 0
    narrow = 1 - (1 - person.jaw) * np.clip(y, 0, 1) ** 2
    return np.stack([np.where(below, x * narrow, x),
                     np.where(below, y * person.chin, y * person.crown)], axis=1)  # fmt: skip


def _ellipse(middle: np.ndarray, wide: float, tall: float) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return np.stack([np.cos(angles) * wide, np.sin(angles) * tall], axis=1) + middle


def _lit(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lit from one side, brighter or darker, with a camera's noise."""
    height, width, _ = image.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35)
    light = 1 + strength * (np.cos(angle) * x + np.sin(angle) * y)
    light -= 0.25 * np.clip(x**2 + 0.7 * y**2 - 0.2, 0, 1)  # a head is round
    noise = rng.normal(0, rng.uniform(1, 5), image.shape)
    return image * (light * rng.uniform(0.75, 1.15))[:, :, None] + noise


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(each) for each in np.clip(values, 0, 255))
    return red, green, blue
