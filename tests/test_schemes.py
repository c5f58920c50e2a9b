"""Schemes of linear layers: what each computes, in exact integers and in onnxruntime; how they are chosen."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import hawqfx
from hawqfx import Compiled
from hawqfx.allocation.budget import Budget
from hawqfx.allocation.task import increases
from hawqfx.errors import HawqfxError, InfeasibleBudget
from hawqfx.export.exporter import export
from hawqfx.export.inspection import stored_weights
from hawqfx.export.opsets import Packing
from hawqfx.ir.facts import Account, ByteCost, ChosenFormat, Fact, LossIncrease, Quantizers, RoundedWeights
from hawqfx.ir.program import Program
from hawqfx.maths import affine, packing
from hawqfx.maths.formats import (
    BLOCKS,
    BLOCKWISE_BITS,
    DYNAMIC,
    FLOAT,
    Format,
    Scheme,
    blockwise,
    kernel_bits,
    known_format,
    layer_scheme,
)
from hawqfx.maths.latency_model import ConversionTimes, KernelTimes, LatencyModel
from hawqfx.pass_manager.manager import run
from hawqfx.passes.allocation import Allocation
from hawqfx.passes.lowering import Lowering
from hawqfx.runtime import ort, parity
from hawqfx.session.plan import Plan
from tests.tools import context

EVERY: tuple[Scheme, ...] = ("static", "dynamic", "weight-only")
BLOCKWISE = tuple(blockwise(bits, block) for bits in BLOCKWISE_BITS for block in reversed(BLOCKS))
FORMATS = (*map(Format, range(2, 9)), *BLOCKWISE, DYNAMIC, FLOAT)


class Words(nn.Module):
    """A table that is read and multiplied by, a layer-norm, linear layers of rows that fill no whole block."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 150)
        self.norm, self.wide, self.narrow = nn.LayerNorm(150), nn.Linear(150, 260), nn.Linear(260, 150, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        x = x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))
        return nn.functional.linear(x.mean(1), self.table.weight)


class Mixed(nn.Module):
    """A convolution before the linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Conv2d(1, 6, 3), nn.Linear(6, 130), nn.Linear(130, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(torch.relu(self.stem(x)).mean((2, 3)))))


def words() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, 40, (3, 5), generator=random) for _ in range(2)]


def pictures() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(4, 1, 8, 8, generator=random) for _ in range(2)]


def compiled_by(schemes: tuple[Scheme, ...], budget: str = "weight_bits=8", net: type[nn.Module] = Words) -> Compiled:
    torch.manual_seed(0)
    data = words() if net is Words else pictures()
    return hawqfx.compile(net().eval(), budget, data, schemes=schemes, sensitivity="mse")


def test_every_format_is_told_from_the_others() -> None:
    assert [known_format(width.bits, width.scheme, width.block) for width in FORMATS] == list(FORMATS)
    assert sorted(random.Random(0).sample(FORMATS, len(FORMATS))) == list(FORMATS)
    assert len({str(width) for width in FORMATS}) == len(FORMATS)
    unknown = ((5, "weight-only", 32), (4, "weight-only", 16), (4, "dynamic", 0), (9, "static", 0), (4, "static", 32))
    for bits, name, block in unknown:
        with pytest.raises(ValueError, match="no format"):
            known_format(bits, name, block)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("columns", [1, 127, 128, 263])
def test_blocks_are_stored_as_the_kernel_reads_them(columns: int, block: int, bits: int) -> None:
    half, each = 1 << (bits - 1), 8 // bits
    codes = np.random.default_rng(columns).integers(-half, half, (3, columns)).astype(np.int8)
    packed = packing.pack_blocks(codes, bits, block)
    assert packed.shape == (3, -(-columns // block), bits * block // 8)
    flat = packed.reshape(3, -1)
    for row, column in itertools.product(range(3), range(columns)):
        byte = int(flat[row, column // each])
        assert (byte >> column % each * bits) % (1 << bits) - half == codes[row, column]
    if bits < 8:
        with pytest.raises(ValueError, match=f"do not fit {bits} signed bits"):
            packing.pack_blocks(codes + (1 << bits), bits, block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", BLOCKWISE_BITS)
def test_scales_of_blocks_are_the_best_of_either_sign(bits: int, block: int) -> None:
    """Against the errors of all scales of a fine grid."""
    weight = torch.randn(64, 2 * block + 5, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    scale = affine.block_scales(weight, bits, block)
    assert scale.shape == (64, 3)
    assert torch.equal(scale, scale.bfloat16().float())
    low, high = affine.signed_range(bits)
    rows, found = affine.in_blocks(weight, block), scale.double()[..., None]

    def errors(step: Tensor) -> Tensor:
        return ((rows / step).round().clamp(low, high) * step - rows).square().sum(-1)

    largest = rows.abs().amax(-1, keepdim=True) / max(high, 1)
    least = torch.full((64, 3), torch.inf, dtype=torch.float64)
    for part in torch.linspace(0.1, 1.1, 400):
        least = torch.minimum(least, torch.minimum(errors(part * largest), errors(-part * largest)))
    # the search is coarser than this grid, and bfloat16 moves a step by 2^-9: at 8 bits by a quarter of the last code
    assert errors(found).sum() <= least.sum() * (1.02 if bits < 8 else 1.5)
    assert (found < 0).any()
    assert (found > 0).any()


def test_blocks_of_zeros_and_of_tiny_values_have_scales() -> None:
    weight = torch.zeros(2, 64)
    weight[1, :32] = torch.linspace(-1e-30, 1e-30, 32)
    scale = affine.block_scales(weight, 4, 32)
    assert torch.isfinite(scale).all()
    assert (scale != 0).all()
    values = affine.fake_quantize(weight, scale, 0, -8, 7)
    assert (values - weight).abs().max() < 1e-31


class Forked(nn.Module):
    """A tensor that a linear layer and a convolution read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear, self.convolution = nn.Linear(6, 8), nn.Linear(8, 8), nn.Conv1d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return (self.linear(x) * torch.sigmoid(self.convolution(x))).mean(1)


def test_what_a_convolution_reads_too_is_not_dynamic(tmp_path: Path) -> None:
    """No kernel of a convolution quantizes its input in each run (convolutional:41148 of the fuzz)."""
    data = [torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0))]
    compiled = hawqfx.compile(Forked().eval(), "weight_bits=8", data, sensitivity="mse", schemes=("dynamic",))
    sites = {site.name: site for site in compiled.planned.activations}
    assert DYNAMIC in compiled.planned.facts.get(sites["input x"].key, Quantizers).by_format
    assert DYNAMIC not in compiled.planned.facts.get(sites["first relu output"].key, Quantizers).by_format
    compiled.export(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("schemes", "kernel", "count"),
    [(("static",), "Weight", 3), (("dynamic",), "MatMulInteger", 3), (("weight-only",), "MatMulNBits", 3)],
)
@pytest.mark.parametrize("packing", ["portable", "native"])
def test_the_file_computes_what_the_graph_computes(
    schemes: tuple[Scheme, ...], kernel: str, count: int, packing: str, tmp_path: Path
) -> None:
    compiled = compiled_by(schemes)
    path = tmp_path / "model.onnx"
    compiled.export(path, packing)  # type: ignore[arg-type]
    model = onnx.load(path)
    assert sum(node.op_type.startswith(kernel) for node in model.graph.node) == count
    for batch in compiled.session.context.batches:
        same = parity.compare(compiled.program, path, batch)
        assert same.flips <= 2  # ties, where sums in another order cross them
        # sums of floats in another order; where a kernel rounds activations of its own, one at a tie moves by one code
        # of 127, which has moved an output by .0005 of the largest
        assert same.worst < (1e-3 if kernel == "MatMulNBits" else 1e-4)
        assert same.agreement == 1
    (said,) = [entry.value for entry in model.metadata_props if entry.key == "hawqfx_schemes"]
    assert schemes[0] in said.split(", ")
    promised, constants = compiled.weight_bytes, sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert constants <= promised + 400  # shapes, constants of the graph, scales of activations


@pytest.mark.parametrize("packing", ["portable", "native"])
@pytest.mark.parametrize("width", BLOCKWISE, ids=str)
def test_a_weight_only_layer_in_exact_integers(width: Format, packing: Packing, tmp_path: Path) -> None:
    """MatMulNBits of inputs that are on the grid of their blocks: sums of integers, times two scales.  The file has a
    weight's codes in no more than its bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 7, bias=False)).eval()
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (5, 300), generator=draw).float()
    x[:, :: width.block] = 127.0  # every block has a step of one
    session = hawqfx.compile(model, "weight_bits=8", [x], schemes=("weight-only",), sensitivity="mse").session
    (site,) = session.measured.weights
    reads = {layer.input for layer in session.measured.layers}
    chosen = {each.key: ChosenFormat(FLOAT if each.key in reads else width, 0.0) for each in session.measured.sites}
    lowered = run([Lowering()], session.measured.learn(chosen), context())
    quantizer = session.measured.facts.get(site.key, Quantizers).by_format[width]
    codes = session.measured.facts.get(site.key, RoundedWeights).codes[width].double()
    scale = torch.tensor(quantizer.scale).double().reshape(7, -1)
    starts = range(0, 300, width.block)
    parts = [(x.double()[:, at : at + width.block] @ codes[:, at : at + width.block].T) for at in starts]
    exact = sum(part * scale[:, number] for number, part in enumerate(parts))
    assert isinstance(exact, Tensor)
    path = tmp_path / "model.onnx"
    export(lowered, session.context.batches[0], path, packing, {})
    (theirs,) = ort.run(ort.session(path), [x.numpy()])
    # float32 products of exact sums, at most 2^-24 each, and their sum; the largest part exceeds the sum
    most = max(float((part * scale[:, number]).abs().max()) for number, part in enumerate(parts))
    assert np.abs(theirs - exact.numpy()).max() <= 4 * len(parts) * 2**-24 * most
    (weight,) = stored_weights(path)
    assert weight.bits == width.bits
    stored = sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)
    promised = session.measured.facts.get(site.key, ByteCost).bytes[width]
    assert promised <= stored <= promised + 80  # shapes by which 3 bits are laid out


def test_blocks_lose_less_than_channels() -> None:
    """Rounded to the nearest: what compensation brings depends on the inputs as well."""
    torch.manual_seed(0)
    options = {"schemes": EVERY, "sensitivity": "mse", "rounding": "nearest"}
    facts = hawqfx.compile(Words().eval(), "weight_bits=8", words(), **options).planned.facts  # type: ignore[arg-type]
    for key in ("wide.weight", "narrow.weight"):
        increase = facts.get(key, LossIncrease).by_format
        for bits in BLOCKWISE_BITS:
            finest, *_, coarsest = (increase[blockwise(bits, block)] for block in BLOCKS)
            assert finest < coarsest < increase[Format(bits)]
            codes = facts.get(key, RoundedWeights).codes[blockwise(bits, 32)]
            assert int(codes.min()) >= -(1 << (bits - 1))
            assert int(codes.max()) < 1 << (bits - 1)


class Looked(nn.Module):
    """Rows of a table, looked up twice, which a head multiplies by too or not, and the head."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(51, 150), nn.Linear(150, 51, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.table(words)
        return rows, self.head(self.table(words + 1).mean(1))


@pytest.mark.parametrize("packing", ["portable", "native"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", BLOCKWISE, ids=str)
def test_rows_of_a_table_in_blocks_are_exact_and_stored_once(
    width: Format, tied: bool, packing: Packing, tmp_path: Path
) -> None:
    """Rows are codes times scales, bit for bit; a head that multiplies by the table reads the same codes."""
    torch.manual_seed(0)
    table = torch.arange(50).reshape(2, 25)
    session = hawqfx.compile(
        Looked(tied).eval(), "weight_bits=8", [table], schemes=("weight-only",), sensitivity="mse",
        loss=lambda output, target: output[1].square().mean(),
    ).session  # fmt: skip
    measured = session.measured
    keys = {site.key for site in measured.weights}
    assert len(keys) == (1 if tied else 2)
    chosen = {site.key: ChosenFormat(width if site.key in keys else FLOAT, 0.0) for site in measured.sites}
    lowered = run([Lowering()], measured.learn(chosen), context())
    path = tmp_path / "model.onnx"
    export(lowered, session.context.batches[0], path, packing, {})
    rows, scores = ort.run(ort.session(path), [table.numpy()])
    (key,) = keys & {"table.weight", "head.weight"} if tied else {"table.weight"}
    codes = measured.facts.get(key, RoundedWeights).codes[width].float()
    scale = torch.tensor(measured.facts.get(key, Quantizers).by_format[width].scale).reshape(51, -1)
    exact = codes * scale.repeat_interleave(width.block, 1)[:, :150]
    assert torch.equal(torch.from_numpy(rows).reshape(50, 150), exact[:50])
    # sums of 150 floats in another order; a value at a tie of the kernel's own rounding moves one code of 127
    assert np.abs(scores - lowered.run((table,), {})[1].detach().numpy()).max() < 1e-4 * np.abs(scores).max()
    stored = sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer)
    promised = sum(measured.facts.get(key, ByteCost).bytes[width] for key in keys)
    assert promised <= stored <= promised + 200  # shapes; were codes stored twice, at least 2,000 more
    found = stored_weights(path)
    assert [weight.bits for weight in found] == [width.bits] * len(keys)
    assert found[0].name == key
    assert math.prod(found[0].shape) in (51 * 150, 51 * -(-150 // width.block) * width.block)


def test_a_table_whose_rows_are_shorter_than_a_block_stays_static() -> None:
    """Blocks would have to be filled up with zeros, for one scale per row as before."""
    model = nn.Sequential(nn.Embedding(20, 40), nn.Linear(40, 3)).eval()
    data = [torch.arange(20).reshape(20, 1)]
    for sizes, expected in (((64,), set(map(Format, range(2, 9)))), ((32, 64), set(BLOCKWISE[2::3]))):
        compiled = hawqfx.compile(
            model, "weight_bits=8", data, schemes=("weight-only",), sensitivity="mse", block_sizes=sizes
        )
        assert set(compiled.planned.facts.get("0.weight", Quantizers).by_format) == expected


def test_convolutions_have_only_static_integers() -> None:
    compiled = compiled_by(EVERY, net=Mixed)
    facts = compiled.planned.facts
    assert not set(BLOCKWISE) & set(facts.get("stem.weight", Quantizers).by_format)
    reads = {layer.weight: layer.input for layer in compiled.planned.layers}
    assert DYNAMIC not in facts.get(reads["stem.weight"], Quantizers).by_format
    assert DYNAMIC in facts.get(reads["head.weight"], Quantizers).by_format


@pytest.mark.parametrize("schemes", [("static",), ("dynamic",), ("weight-only",), ("dynamic", "weight-only")])
def test_only_the_schemes_that_are_allowed_are_chosen(schemes: tuple[Scheme, ...]) -> None:
    """The head that multiplies by the table is a layer as the others."""
    compiled = compiled_by(schemes)
    assert set(compiled.planned.schemes().values()) <= set(schemes)
    again = compiled_by(EVERY).at("weight_bits=8", schemes=schemes, against_uniform=False)
    assert set(again.planned.schemes().values()) <= set(schemes)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    compiled = compiled_by(("dynamic", "weight-only"), "weight_bits=5")
    compiled.plan.write(tmp_path / "plan.json")
    plan = Plan.read(tmp_path / "plan.json")
    assert plan.to_json() == compiled.plan.to_json()
    torch.manual_seed(0)
    again = hawqfx.compile(Words().eval(), None, words(), plan=plan)
    for name, made in (("one", compiled), ("other", again)):
        made.export(tmp_path / f"{name}.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()
    assert set(plan.bits.values()) <= {*range(2, 9), 32}


def test_memory_of_weights_is_traded_for_loss() -> None:
    """A byte a weight on integer kernels: below that, weight-only layers, whose bits stay as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 250), nn.ReLU(), nn.Linear(250, 128), nn.ReLU(), nn.Linear(128, 4)).eval()
    data = [torch.randn(8, 256, generator=torch.Generator().manual_seed(1))]
    compiled = hawqfx.compile(model, "weight_bits=8", data, schemes=EVERY, sensitivity="mse")
    session = compiled.session
    sizes = {site.key: site.numel for site in compiled.planned.weights}
    whole = sum(sizes.values())
    losses = []
    for most in (4 * whole, whole, int(0.7 * whole)):
        found = session.at(f"weight_memory={most}B", against_uniform=False)
        costs = {s.key: found.planned.facts.get(s.key, ByteCost).bytes for s in found.planned.weights}
        schemes, bits = found.plan.schemes, found.plan.bits
        taken = sum(
            costs[key][found.plan.formats[key]] * kernel_bits(bits[key]) // bits[key]
            if schemes[key] == "weight-only"
            else sizes[key] * (4 if bits[key] == 32 else 1)
            for key in sizes
        )
        assert taken <= most
        assert found.planned.about(Account).limits["weight_memory"].amount == taken
        losses.append(found.planned.about(Account).loss)
    assert losses == sorted(losses)
    assert "weight-only" in found.planned.schemes().values()
    with pytest.raises(InfeasibleBudget, match=r"weight_memory=.* cannot be met: the least is"):
        session.at(f"weight_memory={int(0.7 * whole)}B", schemes=("static",))
    with pytest.raises(InfeasibleBudget, match=r"weight_memory=10B cannot be met: the least is"):
        session.at("weight_memory=10B")


SOME_BLOCKWISE = (blockwise(2, 32), blockwise(4, 128))


def _invented(program: Program, seed: int) -> Program:
    """Random losses at a few widths, and random latencies of every way to run a kernel, in whole nanoseconds."""
    draw = random.Random(seed)

    def seconds(most: float) -> float:
        return round(draw.uniform(0, most) * 1e9) * 1e-9

    facts: dict[str, Fact] = {}
    for site in program.sites:
        kept = [
            b
            for b in program.facts.get(site.key, LossIncrease).by_format
            if b in (Format(4), Format(8), *SOME_BLOCKWISE, DYNAMIC)
        ]
        losses = {width: draw.random() / width.bits for width in kept}
        facts[site.key] = LossIncrease(losses, dict.fromkeys(losses, 0.0))
    makers = {site.nodes[0]: site.key for site in program.activations}
    timed = []
    for layer in program.layers:
        made = [makers[layer.node]] if layer.node in makers else []
        linear = layer.operator == "linear"
        dynamic = seconds(1e-3) if linear else float("inf")
        blocks = tuple((width, seconds(1e-3)) for width in SOME_BLOCKWISE if linear)
        sites = tuple(dict.fromkeys((layer.input, layer.weight, *made)))
        timed.append(
            KernelTimes(layer.node, sites, layer.weight, seconds(1e-3), seconds(3e-3), seconds(3e-3), dynamic, blocks)
        )
    converted = []
    for site in program.activations:
        maker = next((t.node for t in timed if t.node in site.nodes), None)
        readers = tuple(layer.node for layer in program.layers if layer.input == site.key)
        converted.append(ConversionTimes(site.key, maker, readers, *(seconds(1e-3) for _ in range(3))))
    table = LatencyModel(seconds(1e-3), tuple(timed), tuple(converted), "invented")
    return program.learn(facts).learn_about_network(table)


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_of_schemes_equals_brute_force(seed: int, floats: bool) -> None:
    """Mixed has three weights and three activations: every plan that the schemes allow, under a latency."""
    program = _invented(compiled_by(EVERY, net=Mixed).session.measured, seed)
    model = program.about(LatencyModel)
    options = [[*program.facts.get(site.key, LossIncrease).by_format, FLOAT] for site in program.sites]
    losses = {site.key: increases(program, site) for site in program.sites}
    plans = []
    for widths in itertools.product(*options):
        bits = {site.key: width for site, width in zip(program.sites, widths, strict=True)}
        pairs = [(bits[layer.weight], bits[layer.input]) for layer in program.layers]
        if any(weight.is_blockwise and read != FLOAT for weight, read in pairs):
            continue
        if not floats:
            if any(bits[layer.weight] == FLOAT for layer in program.layers):
                continue
            linear = {layer.input for layer in program.layers if layer.operator == "linear"}
            if any(bits[site.key] == FLOAT and site.key not in linear for site in program.activations):
                continue
            if any(layer_scheme(*pair) == "float" for pair in pairs):
                continue
        plans.append((sum(losses[key][width] for key, width in bits.items()), model.seconds(bits)))
    latencies = sorted(seconds for _, seconds in plans)
    most = round(latencies[len(latencies) // 20], 9)
    every = (4, 8, 32) if floats else None
    allocation = Allocation(Budget.parse(f"latency={most:.9f}s"), every, every)
    planned = run([allocation], program, context())
    best = min(loss for loss, seconds in plans if seconds <= most * (1 + 1e-12))
    assert model.seconds(planned.formats()) <= most * (1 + 1e-12)
    # sums of 7 floats in another order
    assert sum(planned.facts.get(s.key, ChosenFormat).increase for s in planned.sites) == pytest.approx(best, rel=1e-12)


def test_a_head_that_multiplies_by_its_table_is_timed_in_blocks() -> None:
    torch.manual_seed(0)
    options = {"sensitivity": "mse", "rounding": "nearest", "weight_bits": (4, 8), "block_sizes": (64,)}
    compiled = hawqfx.compile(Words().eval(), "latency=1s", words(), schemes=EVERY, **options)  # type: ignore[arg-type]
    timed = {kernel.weight: dict(kernel.blockwise) for kernel in compiled.planned.about(LatencyModel).timed}
    assert set(timed["table.weight"]) == {blockwise(4, 64), blockwise(8, 64)}


@pytest.mark.parametrize("net", [Words, Mixed])
def test_weights_in_blocks_alone_are_timed_in_these(
    net: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No timings are known, so that parts without a weight are timed too; Mixed has a convolution, whose static weight
    meets a float input."""
    monkeypatch.setenv("HAWQFX_CACHE", str(tmp_path))
    found = compiled_by(("weight-only",), net=net).at("latency=1s, weight_bits=4", against_uniform=False).planned
    model, account = found.about(LatencyModel), found.about(Account)
    known = {site.key: found.facts.get(site.key, Quantizers).by_format for site in found.weights}
    alone = [kernel for kernel in model.timed if kernel.weight and not any(w.is_static for w in known[kernel.weight])]
    assert len(alone) == (3 if net is Words else 2)
    for kernel in alone:
        assert {kernel.integer, kernel.unpacking, kernel.dynamic} == {math.inf}
        assert {width for width, _ in kernel.blockwise} == set(BLOCKWISE)
    seconds = account.limits["latency"].measured
    assert seconds is not None
    assert 0 < seconds < 1
    (path,) = (path for path in tmp_path.glob("**/*.json"))
    whole = {key.rpartition(" ")[2]: value for key, value in json.loads(path.read_text())["seconds"].items()}
    widest = {key: max((w for w in widths if w.is_blockwise), default=Format(8)) for key, widths in known.items()}
    floats = {site.key: FLOAT for site in found.sites}
    assert model.seconds(floats) == pytest.approx(whole["float"])
    # the rest may take more than all of the quantized network, of which the kernels are left at least a fiftieth
    assert model.seconds(floats | widest) >= whole["quantized"] * (1 - 1e-9)


def test_schemes_that_there_are_not_are_refused() -> None:
    for schemes in (("quick",), ()):
        with pytest.raises(HawqfxError, match="must be some of static, dynamic, weight-only"):
            compiled_by(schemes)  # type: ignore[arg-type]


def test_weights_in_blocks_alone_have_no_other_formats() -> None:
    """A large model holds no codes that no scheme of its may take; what has no blocks stays static."""
    facts = compiled_by(("weight-only",)).planned.facts
    for key in ("wide.weight", "table.weight"):
        assert set(facts.get(key, Quantizers).by_format) == set(BLOCKWISE)
    facts = compiled_by(("weight-only",), net=Mixed).planned.facts
    assert set(facts.get("stem.weight", Quantizers).by_format) == set(map(Format, range(2, 9)))
    torch.manual_seed(0)
    some = hawqfx.compile(
        Words().eval(), "weight_bits=4", words(), schemes=("weight-only",), sensitivity="mse", block_sizes=[64]
    )
    assert {width.block for width in some.planned.facts.get("wide.weight", Quantizers).by_format} == {64}
    for wrong in ((), (16,), "32"):
        with pytest.raises(HawqfxError, match="block_sizes="):
            hawqfx.compile(Words().eval(), "weight_bits=4", words(), block_sizes=wrong)  # type: ignore[arg-type]


def test_uniform_bits_are_a_rival_of_weight_only_networks_too() -> None:
    """A convolution beside them has no blocks: as many bits stand for one format."""
    compiled = compiled_by(("weight-only",), "weight_bits=4", net=Mixed)
    uniform = compiled.uniform(4)
    formats = uniform.plan.formats
    assert {str(formats[site.key]) for site in uniform.planned.weights} == {"4 bits", "4 bits in blocks of 128"}
    assert {formats[site.key] for site in uniform.planned.activations} == {FLOAT}
    assert compiled.rival is not None
    assert compiled.rival.weights == "4/4 bits in blocks of 128"
    words = compiled_by(("weight-only",), "weight_bits=4")
    assert {str(words.uniform(4).plan.formats[site.key]) for site in words.planned.weights} == {
        "4 bits in blocks of 128"
    }
