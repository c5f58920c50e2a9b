"""Random networks of the operators that hawqfx knows, each made from its seed alone.

Three families: "convolutional" (images of one to three axes, through the pieces of images.py), "transformer" (words or
vectors, through those of tokens.py) and "mixed" (images and what is beside them: vectors, words, masks, numbers).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from tests.fuzz import images, tokens
from tests.fuzz.draws import Choices, Made, activation, odd_weights

Family = Literal["convolutional", "transformer", "mixed"]
FAMILIES: tuple[Family, ...] = ("convolutional", "transformer", "mixed")
Inputs = Any  # a tensor, or a mapping of tensors and numbers, as a batch of compile()


@dataclass(frozen=True)
class Case:
    """A network and its inputs.

    Args:
        model: in eval mode.
        batches: of inputs, as compile() takes them.
        others: inputs of other sizes than those, which the network takes too.
        dynamic_shapes: what else than the batch varies, as compile() takes it.
    """

    model: nn.Module
    batches: list[Inputs]
    others: list[Inputs]
    dynamic_shapes: Any = None


@dataclass(frozen=True)
class Drawn:
    """A network, what makes its inputs for a number of samples (and of tokens), and what varies but the batch."""

    model: nn.Module
    inputs: Callable[..., Inputs]
    dynamic_shapes: Any = None
    longer: Mapping[str, int] = field(default_factory=dict)


def _ends(draw: Choices, wide: int) -> tuple[nn.Module, Callable[[Any, Tensor], Any]]:
    """A head, and how (N, wide) and what it was made of become the outputs."""
    head, act = nn.Linear(wide, draw.number(2, 7), bias=draw.chance(70)), activation(draw)
    ways: tuple[Callable[[Any, Tensor], Any], ...] = (
        lambda head, x: head(x), lambda head, x: head(act(x)), lambda head, x: head(x).softmax(-1),
        lambda head, x: (head(x), x), lambda head, x: {"logits": head(x), "features": F.normalize(x)},
        lambda head, x: [head(x).sigmoid(), head(-x)], lambda head, x: head(x).squeeze(-1).log_softmax(-1),
    )  # fmt: skip
    return head, draw.one(ways[0], ways[0], ways[1], *ways)


def _convolutional(draw: Choices) -> Drawn:
    dims, channels = draw.one(1, 2, 2, 2, 3), draw.number(1, 4)
    size = {1: draw.number(20, 40), 2: draw.number(10, 17), 3: draw.number(7, 9)}[dims]
    wide = draw.one(2, 4, 6, 8, 12)
    pieces: list[nn.Module] = [images.conv(draw, channels, wide, dims, keeps=size < 9)]
    for _ in range(draw.number(1, 3)):
        piece, wide = draw.one(*images.PIECES)(draw, wide, dims)
        pieces.append(piece)
    (head, end), pooled = _ends(draw, wide), draw.one("mean", "flatten", "max", "map")

    def compute(my: Any, x: Tensor) -> Any:
        x = my.body(x)
        if pooled == "map":
            return x, my.head(x.flatten(2).mean(2))
        flat = x.flatten(2)
        return end(my.head, flat[..., 0] if pooled == "flatten" else flat.mean(2) if pooled == "mean" else flat.amax(2))

    model = Made(compute, body=nn.Sequential(*pieces), head=head)
    return Drawn(model, lambda rows: draw.normal(rows, channels, *[size] * dims))


def _transformer(draw: Choices) -> Drawn:
    wide, words, bag = draw.one(8, 16, 16, 32, 64), draw.number(10, 40), draw.chance(8)
    of_words = bag or draw.chance(60)
    table: nn.Module = nn.Embedding(words, wide) if of_words else nn.Linear(6, wide)
    if bag:
        table = nn.EmbeddingBag(words, wide, mode=draw.one("mean", "sum"))
    head = nn.Linear(wide, words if of_words else 5, bias=False)
    if of_words and draw.chance(40):
        head.weight = table.weight  # type: ignore[assignment]
    places = draw.one("none", "added", "looked up")
    ends = draw.one("all", "all", "mean", "first", "several")
    gain = draw.one(1.0, 1.0, wide**0.5)

    def compute(my: Any, x: Tensor) -> Any:
        x = my.table(x).unsqueeze(1) if bag else my.table(x) * gain
        if places != "none":
            steps = my.places(torch.arange(x.shape[1])) if places == "looked up" else my.places.weight[: x.shape[1]]
            x = x + steps
        x = my.blocks(x)
        if ends == "several":
            return my.head(x), x.mean(1)
        return my.head(x if ends == "all" else x.mean(1) if ends == "mean" else x[:, 0])

    looked_up = None if places == "none" else nn.Embedding(tokens.LONGEST, wide)
    model = Made(compute, table=table, blocks=tokens.blocks(draw, wide), head=head, places=looked_up)

    def inputs(rows: int, length: int = 7) -> Tensor:
        if of_words:
            return torch.randint(0, words, (rows, length), generator=draw.random)
        return draw.normal(rows, length, 6)

    if draw.chance(75):
        return Drawn(model, inputs)
    return Drawn(model, inputs, {"inputs": ({1: Dim("length", max=48)},)}, {"length": 10})


def _mixed(draw: Choices) -> Drawn:
    """A convolutional stem whose pixels are tokens, and other inputs beside the images."""
    wide, channels, patch = draw.one(8, 16, 32), draw.number(1, 3), draw.one(2, 4)
    stem: nn.Module = nn.Conv2d(channels, wide, draw.one(patch, patch, 3), patch)
    if draw.chance(40):
        stem = nn.Sequential(images.conv(draw, channels, 4, 2), images.conv(draw, 4, wide, 2), nn.AvgPool2d(patch))
    join = draw.one("add", "cat", "film", "cross", "mask", "number", "scalar")
    again = draw.chance(30)
    head, end = _ends(draw, 2 * wide if join == "cat" else wide)

    def compute(my: Any, image: Tensor, **beside: Any) -> Any:
        x = my.stem(image).flatten(2).transpose(1, 2)
        x = my.blocks(my.blocks(x) if again else x)
        if join == "cross":
            x = my.cross(my.table(beside["words"]), x)
        if join == "mask":
            return end(my.head, (x * beside["mask"][:, : x.shape[1], None]).sum(1))
        pooled = x.mean(1)
        if join in ("number", "scalar"):
            return end(my.head, pooled * (beside["number"] if join == "number" else beside["scalar"][:, None]))
        if join == "cross":
            return end(my.head, pooled)
        side = torch.tanh(my.side(beside["vector"])) * my.constant
        if join == "cat":
            return end(my.head, torch.cat([pooled, side], 1))
        return end(my.head, pooled + side if join == "add" else pooled * side + side)

    parts: dict[str, Any] = {"stem": stem, "blocks": tokens.blocks(draw, wide, 2), "head": head}
    if join == "cross":
        parts |= {"cross": tokens.crossing(wide), "table": nn.Embedding(9, wide)}
    if join in ("add", "cat", "film"):
        parts |= {"side": nn.Linear(5, wide), "constant": draw.normal(wide)}
    model = Made(compute, **parts)
    names = {"cross": "words", "mask": "mask", "number": "number", "scalar": "scalar"}

    def inputs(rows: int) -> dict[str, Any]:
        made: dict[str, Callable[[], Any]] = {
            "vector": lambda: draw.normal(rows, 5), "scalar": lambda: draw.normal(rows), "number": lambda: 0.7,
            "words": lambda: torch.randint(0, 9, (rows, 3), generator=draw.random),
            "mask": lambda: torch.rand(rows, 64, generator=draw.random) < 0.8,
        }  # fmt: skip
        name = names.get(join, "vector")
        return {"image": draw.normal(rows, channels, 16, 16), name: made[name]()}

    return Drawn(_Beside(model, names.get(join, "vector")), inputs)


class _Beside(nn.Module):
    """A module whose forward names its inputs, as torch.export asks for."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(
        self, image: Tensor, vector: Any = None, words: Any = None, mask: Any = None, number: Any = None,
        scalar: Any = None,
    ) -> Any:  # fmt: skip
        given = {"vector": vector, "words": words, "mask": mask, "number": number, "scalar": scalar}
        return self.model(image, **{self.name: given[self.name]})


def case(family: Family, seed: int) -> Case:
    """The network of a seed, with two batches of its inputs, and inputs of one and of five samples."""
    draw = Choices(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while True:
            found = _case({"convolutional": _convolutional, "transformer": _transformer, "mixed": _mixed}[family], draw)
            if _runs(found):
                return found


def _case(make: Callable[[Choices], Drawn], draw: Choices) -> Case:
    drawn = make(draw)
    for module in drawn.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
    odd_weights(draw, drawn.model)
    drawn.model.eval().requires_grad_(draw.chance(80))
    batches = [drawn.inputs(rows) for rows in ((3, 3) if draw.chance(50) else (4, 2))]
    others = [drawn.inputs(1), drawn.inputs(5, **drawn.longer)]
    return Case(drawn.model, batches, others, drawn.dynamic_shapes)


@torch.no_grad()
def _runs(found: Case) -> bool:
    """Whether no image gets too small for a layer, and no value too large; the network is drawn again then."""
    try:
        outputs = [run(found.model, batch) for batch in (*found.batches, *found.others)]
    except (RuntimeError, ValueError):  # instance norm has one of its own for a single pixel
        return False
    return all(bool(leaf.isfinite().all()) for leaf in pytree.tree_leaves(outputs))


def run(model: Any, batch: Inputs) -> Any:
    """What a network answers to a batch."""
    return model(**batch) if isinstance(batch, dict) else model(batch)
