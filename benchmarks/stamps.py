"""Pictures made of Tux Paint's stamps, photographs cut out with alpha: with classes of ImageNet, and with COCO's boxes.

All draws come from the generators that are passed in, so that the same pictures come out each time.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import data
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Colour = tuple[int, int, int]
Picture = Any  # PIL.Image.Image

MARGIN = 32  # pixels by which a picture is wider than what is cut out of its centre
WHITE, GREY, GREEN = (255, 255, 255), (128, 128, 128), (0, 128, 0)

COCO: dict[int, tuple[str, ...]] = {  # index of COCO's 80 classes -> the stamps that show one
    0: ("people/fireman200b", "people/fireman240a", "space/spacewalk"),
    2: ("vehicles/auto/beetle", "vehicles/auto/sedan", "vehicles/auto/sportscar2"),
    4: ("vehicles/flight/planes/747", "military/vehicles/f22_raptor"),
    5: ("vehicles/masstransit/green_korean_bus",),
    7: ("vehicles/auto/truck", "vehicles/emergency/firetruck", "vehicles/garbagetruck"),
    8: ("vehicles/ship/chineseJunk", "vehicles/ship/walnutBoat"),
    9: tuple(f"town/roadsigns/stoplight_{each}" for each in ("01_red", "02_yellow", "03_green")),
    14: tuple(
        f"animals/birds/{each}"
        for each in ("blackbird", "crow", "duck", "gander", "hen", "pigeon", "rooster", "seagull", "vulture")
    ),
    16: ("animals/mammals/dogs/dog",),
    17: ("animals/mammals/equines/horse",),
    18: tuple(f"animals/mammals/bovines/{each}" for each in ("ram", "sheep", "sheep_lamb")),
    19: tuple(f"animals/mammals/bovines/{each}" for each in ("bull", "cow", "cow_white", "zebu")),
    20: ("animals/mammals/elephant",),
    21: ("animals/mammals/bears/bear", "animals/mammals/bears/european-bear"),
    22: ("animals/mammals/equines/zebra",),
    23: ("animals/mammals/giraffe",),
    32: tuple(f"sports/{each}" for each in ("basketball", "cricketball", "soccer", "tennis_ball")),
    38: ("sports/tennis_racket",),
    41: ("household/dishes/mug",),
    46: ("food/fruit/banana",),
    47: tuple(f"food/fruit/apple_{each}" for each in ("fuji", "granny_smith", "green", "red", "sierra_beauty")),
    49: ("food/fruit/mandarine", "food/fruit/orange", "food/fruit/orange_seville"),
    50: ("food/vegetables/broccoli",),
    51: ("food/vegetables/carrot",),
    61: ("household/toilet",),
    76: ("household/arttools/scissors_small_closed", "household/arttools/scissors_small_open"),
    77: ("animals/mammals/bears/toys/edward_bear",),
}
# Enlarged, these are grounds: they show nothing that is a class of COCO.
TEXTURES = (
    *(f"plants/trees/{each}" for each in ("holm_oak", "birch", "pinecone")),
    *(f"plants/flowers/{each}" for each in ("flower7", "marigold", "adeenia", "chemparathi")),
    *(f"space/{each}" for each in ("moon/moon_full", "planets/3_earth", "planets/4_mars", "planets/5_jupiter")),
    *(f"seasonal/halloween/grave-{each}" for each in "adgi"),
    *("food/fruit/cherimoya", "food/vegetables/lettuce", "food/spices/ginger", "household/home_compost_bin"),
)
# Folders of photographs of what ImageNet is about, for pictures that need no label.
PHOTOGRAPHS = ("animals", "food", "hobbies", "household", "sports", "vehicles")


@cache
def stamp(name: str) -> Picture:
    """A stamp in RGBA, without its empty margin."""
    image = Image.open(data.stamps() / f"{name}.png").convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


def unlabelled() -> list[str]:
    """The photographs that `data.stamp_labels` does not name."""
    labelled = set(data.stamp_labels())
    names = [path.relative_to(data.stamps()).as_posix() for path in data.stamps().glob("**/*.png")]
    return sorted(
        name.removesuffix(".png")
        for name in names
        if name not in labelled and name.startswith(PHOTOGRAPHS) and "cartoon" not in name and "_mirror" not in name
    )


def pixels(pictures: Sequence[Picture]) -> Tensor:
    """Pictures of one size as (N, 3, height, width), RGB, uint8."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def labelled_pictures(ground: Colour, side: int) -> tuple[Tensor, list[frozenset[int]]]:
    """Every labelled stamp (154, 3, side, side) on a plain ground, and its classes of ImageNet.

    As for ImageNet, the picture is scaled to 32 pixels more and its centre cut out; the ground is so wide that the
    stamp is in that centre.
    """
    pictures = []
    for name in data.stamp_labels():
        photo = Image.open(data.stamps() / name).convert("RGBA")
        wide = round(max(photo.size) * (side + MARGIN) / side)
        picture = Image.new("RGB", (wide, wide), ground)
        picture.paste(photo, ((wide - photo.width) // 2, (wide - photo.height) // 2), photo)
        pictures.append(_centre(picture.resize((side + MARGIN, side + MARGIN), Image.Resampling.BICUBIC), side))
    return pixels(pictures), list(data.stamp_labels().values())


def unlabelled_pictures(side: int, random: np.random.Generator) -> Tensor:
    """The other stamps (108, 3, side, side) in random order, on grounds of all kinds, some cut off at the edge."""
    pictures = []
    wide = side + MARGIN
    for name in random.permutation(unlabelled()):
        picture = ground(wide, random)
        photo = scaled(stamp(str(name)), wide * random.uniform(0.7, 1.1), random)
        shift = random.integers(-24, 25, 2)
        corner = [(wide - size) // 2 + int(by) for size, by in zip(photo.size, shift, strict=True)]
        picture.paste(photo, tuple(corner), photo)
        pictures.append(_centre(picture, side))
    return pixels(pictures)


def _centre(picture: Picture, side: int) -> Picture:
    margin = (picture.width - side) // 2
    return picture.crop((margin, margin, margin + side, margin + side))


def ground(side: int, random: np.random.Generator) -> Picture:
    """A plain colour, a slope from one colour to another, or a texture."""
    one, other = random.integers(0, 256, (2, 3))
    kind = random.integers(3)
    if kind == 0:
        return Image.new("RGB", (side, side), tuple(map(int, one)))
    slope = np.linspace(0, 1, side)[:, None, None] * (other - one) + one
    picture = Image.fromarray(np.broadcast_to(slope, (side, side, 3)).round().astype(np.uint8))
    if kind == 2:
        photo = stamp(TEXTURES[random.integers(len(TEXTURES))])
        width, height = photo.size
        middle = photo.crop((width // 4, height // 4, width * 3 // 4, height * 3 // 4))
        middle = middle.resize((side, side), Image.Resampling.BICUBIC)
        picture.paste(middle, (0, 0), middle)
    return picture


def scaled(photo: Picture, side: float, random: np.random.Generator) -> Picture:
    """With the longer side so long, and mirrored half of the time."""
    factor = side / max(photo.size)
    size = [max(1, round(length * factor)) for length in photo.size]
    photo = photo.resize(size, Image.Resampling.BICUBIC)
    return photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.integers(2) else photo


def split_coco() -> tuple[dict[int, tuple[str, ...]], dict[int, tuple[str, ...]]]:
    """The stamps for scored scenes and for calibration: where a class has three or more, every third calibrates."""
    kept = {label: names[2::3] for label, names in COCO.items() if len(names) >= 3}
    scored = {label: tuple(name for name in names if name not in kept.get(label, ())) for label, names in COCO.items()}
    return scored, kept


def scenes(
    count: int, side: int, classes: dict[int, tuple[str, ...]], random: np.random.Generator
) -> tuple[Tensor, list[tuple[NDArray[np.float64], NDArray[np.int64]]]]:
    """Pictures (count, 3, side, side) of one to six objects that hardly hide each other; their boxes and classes.

    A box (left, top, right, bottom) is where alpha is more than half.
    """
    pictures, truth = [], []
    for _ in range(count):
        picture = ground(side, random)
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        for _ in range(random.integers(1, 7)):
            label = int(random.choice(list(classes)))
            photo = stamp(classes[label][random.integers(len(classes[label]))])
            photo = scaled(photo, min(side * random.uniform(0.1, 0.5), 2 * max(photo.size)), random)
            left, top = (int(random.integers(0, side - length + 1)) for length in photo.size)
            inside = photo.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
            if inside is None:
                continue
            box = (left + inside[0], top + inside[1], left + inside[2], top + inside[3])
            if any(_hidden(box, other) > 0.1 for other in boxes):
                continue
            picture.paste(photo, (left, top), photo)
            boxes.append(box)
            labels.append(label)
        pictures.append(picture)
        truth.append((np.array(boxes, np.float64).reshape(-1, 4), np.array(labels, np.int64)))
    return pixels(pictures), truth


def _hidden(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """How much of the smaller of two boxes the other covers."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return max(width, 0) * max(height, 0) / min(areas)
