"""Measuring: stops when known well enough, restarts after SIGKILL, shares the work among processes."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hawqfx
from hawqfx.errors import CacheError, HawqfxError, UsageError
from hawqfx.frontend.context import Context
from hawqfx.frontend.data import gather
from hawqfx.frontend.losses import cross_entropy
from hawqfx.ir.facts import Sensitivity
from hawqfx.ir.program import Program
from hawqfx.pass_manager.manager import run
from hawqfx.passes.hawq_v2 import HawqV2, _Hutchinson
from hawqfx.pipeline import METRICS
from hawqfx.sensitivity import batching, estimation
from hawqfx.sensitivity.cache import MeasurementCache, digest
from hawqfx.sensitivity.distributed import Team
from hawqfx.sensitivity.forward import forward
from hawqfx.sensitivity.quantity import Quantity
from tests.nets import Mlp, Plain, build, images
from tests.tools import after, context, damaged

ROOT = Path(__file__).parent.parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def facts(program: Program, work: Context, metric: Any) -> dict[str, tuple[float, float, int]]:
    done = run([metric], program, work).facts
    measured = {site.key: done.get(site.key, Sensitivity) for site in program.sites}
    return {key: (fact.curvature, fact.stderr, fact.probes) for key, fact in measured.items()}


def squares(output: Tensor, target: Tensor) -> Tensor:
    """Its Hessian is positive semidefinite, so that traces stand out from their noise."""
    return (output - output.detach()).square().sum(1).mean()


@pytest.fixture(scope="module")
def plain() -> Program:
    return after("cost", Plain)


# --- when to stop


def test_probing_stops_when_every_site_is_known_well_enough(plain: Program) -> None:
    """Each standard error is at most the tolerance of the site's own trace, or of the average contribution."""
    work = context(images(count=4), loss=squares)
    done = facts(plain, work, HawqV2(probes=400, tolerance=0.1))
    probes = [entry[2] for entry in done.values()]
    assert min(probes) < max(probes) < 400  # sites leave one by one, and nobody needs the cap
    # independent draws, so that both differ by the standard errors of both
    other = facts(plain, replace(work, seed=1), HawqV2(probes=150, tolerance=0))
    for site in plain.sites:
        (mean, stderr, _), (truth, left, _) = done[site.key], other[site.key]
        assert abs(mean - truth) <= 5 * (stderr**2 + left**2) ** 0.5, site.key
    for kind in (plain.weights, plain.activations):
        # one site of a kind has at least the average contribution, so it is held to its own trace; batches that differ
        # from each other add up to a little more than each was allowed
        assert any(done[site.key][1] <= 0.15 * done[site.key][0] for site in kind)


def test_a_site_that_is_known_leaves_the_probe(plain: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = _Hutchinson.sample

    def watched(self: Any, probe: int, wanted: Sequence[Quantity]) -> Mapping[Quantity, float]:
        asked.append(len(wanted))
        return original(self, probe, wanted)

    monkeypatch.setattr(_Hutchinson, "sample", watched)
    run([HawqV2(probes=200, tolerance=0.1)], plain, context(images(count=1), loss=squares))
    assert asked[: estimation.LEAST] == [len(plain.sites)] * estimation.LEAST
    assert asked == sorted(asked, reverse=True)
    assert asked[-1] < asked[0]


def test_the_cap_is_said_aloud(plain: Program, caplog: pytest.LogCaptureFixture) -> None:
    run([HawqV2(probes=8, tolerance=0.01)], plain, context())
    assert "quantities have a standard error over 1% after 8 probes a batch, the worst" in caplog.text


def test_without_tolerance_all_probes_are_drawn(plain: Program) -> None:
    assert {entry[2] for entry in facts(plain, context(), HawqV2(probes=12, tolerance=0)).values()} == {12}


# --- batches, seeds, memory


def test_the_result_does_not_depend_on_the_order_of_work(plain: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    work, metric = context(images(count=3)), HawqV2(probes=12, tolerance=0.3)
    forwards = facts(plain, work, metric)
    monkeypatch.setattr(
        "hawqfx.sensitivity.distributed.Workers.share", lambda self, batches: (list(batches)[::-1], Team(0, 1))
    )
    assert facts(plain, work, metric) == forwards


def test_parts_of_batches_estimate_the_same(plain: Program) -> None:
    whole = facts(plain, context(), HawqV2(probes=50, tolerance=0))
    parts = facts(plain, replace(context(), batch=5), HawqV2(probes=50, tolerance=0))
    for key, (mean, stderr, _) in whole.items():
        other, error, _ = parts[key]
        assert other != mean
        assert abs(mean - other) <= 5 * (stderr**2 + error**2) ** 0.5, key


def test_batches_are_parted_until_they_fit_into_memory(plain: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def watched(program: Program, batch: Any, operators: Any, **options: Any) -> Any:
        sizes.append(batch.size)
        return forward(program, batch, operators, **options)

    monkeypatch.setattr("hawqfx.passes.hawq_v2.forward", watched)
    sample = plain.forward_bytes() * batching.PEAK_PER_FORWARD[True]
    monkeypatch.setattr(batching, "free_memory", lambda device: 2 * 4 * sample)
    run([HawqV2(2)], plain, context(images(count=2)))
    assert sizes == [4] * 8
    monkeypatch.setattr(batching, "free_memory", lambda device: 2 * 16 * sample)
    sizes.clear()
    run([HawqV2(2)], plain, context(images(count=2)))
    assert sizes == [16, 16]


def test_an_exported_program_with_a_fixed_batch_is_measured_whole() -> None:
    data = images(count=2)
    exported = torch.export.export(build(Plain), (data[0][0],))
    hawqfx.compile(exported, "weight_bits=5", data, sensitivity=HawqV2(2))
    with pytest.raises(HawqfxError, match="batch=8: the exported program has a fixed batch of 16"):
        hawqfx.compile(exported, "weight_bits=5", data, sensitivity=HawqV2(2), batch=8)


def test_forward_bytes_are_those_of_all_tensors_of_one_sample() -> None:
    program = after("find_sites", Mlp)
    # flatten 64, then linear and tanh of 4, twice, and 3 logits, in float32
    assert program.forward_bytes() == 4 * (64 + 4 * 4 + 3)


def test_too_little_data_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert sum(batch.size for batch in gather(images(count=2), 40)) == 32
    assert "samples=40 were asked for, and the data has 32" in caplog.text
    assert [batch.size for batch in gather(images(count=3), 20)] == [16, 4]
    with pytest.raises(UsageError, match="samples=0"):
        gather(images(), 0)


def test_only_as_much_of_an_endless_loader_is_read_as_asked() -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield from images(count=1)

    assert sum(batch.size for batch in gather(endless(), 50)) == 50


def test_a_metric_that_does_not_exist_is_refused() -> None:
    with pytest.raises(HawqfxError, match="sensitivity='trace': must be one of gauss-newton, hawq-v2, fisher, taylor"):
        hawqfx.compile(build(Plain), "weight_bits=5", images(), sensitivity="trace")


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_leads_to_a_plan(name: str) -> None:
    plans = [hawqfx.compile(build(Plain), "weight_bits=5", images(), sensitivity=name).plan for _ in range(2)]
    assert plans[0].digest == plans[1].digest
    assert set(plans[0].bits) == {site.key for site in after("find_sites", Plain).sites}


# --- a run that was killed, and a run that need not be


def interrupted_loss(folder: Path, calls: int) -> Any:
    """Cross-entropy that kills its process at a given call, once."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        marks = len(list(folder.iterdir()))
        if marks < calls:
            (folder / str(marks)).touch()
            if marks == calls - 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(output, target)

    return loss


SCRIPT = """
import json, sys
from pathlib import Path
from tests.sensitivity.test_estimation import facts, interrupted_loss
from dataclasses import replace
from hawqfx.passes.hawq_v2 import HawqV2
from tests.nets import Plain, images
from tests.tools import after, context
cache, marks, calls, out = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
work = replace(context(images(count=5)), cache=cache, loss=interrupted_loss(marks, calls))
out.write_text(json.dumps(facts(after("cost", Plain), work, HawqV2(probes=12))))
"""


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path: Path, plain: Program) -> None:
    expected = facts(plain, context(images(count=5)), HawqV2(probes=12))
    marks, out = tmp_path / "marks", tmp_path / "out.json"
    marks.mkdir()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cache"), str(marks), "4", str(out)]
    first = subprocess.run(command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, check=False)
    assert first.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("batch-*.json"))) == 3
    (folder / ".batch-000003.json.abc").write_text("half a fi")  # what a kill in the middle of a write leaves
    subprocess.run(command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, check=True)
    found = json.loads(out.read_text())
    for key, entry in expected.items():
        # another number of threads adds up in another order
        assert found[key] == pytest.approx(entry, rel=1e-4, abs=1e-9), key
    assert len(list(folder.glob("batch-*.json"))) == 5


def test_what_was_measured_is_never_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"cache": tmp_path, "sensitivity": HawqV2(4, tolerance=0)}
    first = hawqfx.compile(build(Plain), "weight_bits=5", images(), **options)
    opened: list[int] = []
    original = HawqV2.open

    def watched(self: Any, program: Any, work: Any, index: int, operators: Any) -> Any:
        opened.append(index)
        return original(self, program, work, index, operators)

    monkeypatch.setattr(HawqV2, "open", watched)
    again = hawqfx.compile(build(Plain), "weight_bits=5", images(), **options)
    assert again.plan.digest == first.plan.digest
    hawqfx.compile(build(Plain), "weight_bits=4", images(), rounding="nearest", **options)
    assert opened == []
    for change in (
        {"seed": 1},
        {"sensitivity": HawqV2(5, tolerance=0)},
        {"loss": lambda output, target: 2 * cross_entropy(output, target)},
        {"loss": lambda output, target: 3 * cross_entropy(output, target)},
        {"samples": 17},
        {"batch": 8},
    ):
        opened.clear()
        hawqfx.compile(build(Plain), "weight_bits=5", images(), **options | change)
        assert opened, change
    opened.clear()
    hawqfx.compile(build(Plain, seed=1), "weight_bits=5", images(), **options)
    assert opened


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "a folder"])
@pytest.mark.parametrize("name", ["batch-000001.json", "batch_size.json"])
def test_a_damaged_file_is_measured_again(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"cache": tmp_path, "sensitivity": HawqV2(4, tolerance=0)}
    first = hawqfx.compile(build(Plain), "weight_bits=5", images(), **options)
    (file,) = tmp_path.glob(f"*/{name}")
    damaged(file, damage)
    again = hawqfx.compile(build(Plain), "weight_bits=5", images(), **options)
    assert f"{name} is damaged" in caplog.text
    assert again.plan == first.plan
    assert again.table().columns[3]._cells == first.table().columns[3]._cells  # traces
    caplog.clear()
    if damage != "a folder":  # which is left where it is, and warned of each time
        hawqfx.compile(build(Plain), "weight_bits=5", images(), **options)
        assert "damaged" not in caplog.text


def test_numbers_of_other_batches_are_not_taken(tmp_path: Path) -> None:
    """Where the size of batches is lost, runs of another size find files of the same numbers."""
    cache = MeasurementCache.open(tmp_path, "measurement")
    cache.put(1, range(8, 16), {"q": [1.0, 2.0, 3.0, 4.0]})
    assert cache.get(1, range(8, 16)) == {"q": [1.0, 2.0, 3.0, 4.0]}
    assert cache.get(1, range(16, 32)) is None


def test_a_cache_that_cannot_be_trusted_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cache": tmp_path / "cache", "sensitivity": HawqV2(4)}
    held = object()
    with pytest.raises(CacheError, match="cannot tell one object from another"):
        hawqfx.compile(
            build(Plain), "weight_bits=5", images(), **options, loss=lambda o, t: cross_entropy(o, t) * bool(held)
        )
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be used: .*file is no folder"):  # before anything runs
        hawqfx.compile(build(Plain), "weight_bits=5", images(), cache=tmp_path / "file" / "below")


LOSS = """
from hawqfx.sensitivity.cache import digest
print(list({"a", "b", "c"}))
print(digest([lambda output, target: output[..., :4] if output.ndim in {2, 3} and "a" in {"a", "b", "c"} else target]))
"""


def test_the_cache_knows_a_loss_again_in_another_process() -> None:
    """One with an ellipsis, and with sets, whose order in memory differs between processes."""
    orders, names = set(), set()
    for seed in "12":
        command, environment = [sys.executable, "-c", LOSS], {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        order, name = done.stdout.splitlines()
        orders.add(order)
        names.add(name)
    assert len(orders) == 2
    assert len(names) == 1


def test_the_digest_tells_values_of_every_kind_apart() -> None:
    def scaled(factor: float) -> Any:
        return lambda output, target: factor * cross_entropy(output, target)

    values: list[Any] = [
        None, ..., 1, 1.0, True, "1", b"1", slice(1), Path("1"), torch.float32, torch.device("cpu"), [1], (1,), {1},
        frozenset([1]), {1: 1}, torch.tensor(1), torch.tensor(1.0), torch.nn.Linear(1, 1), torch.nn.Linear(1, 2),
        functools.partial(max, 1), functools.partial(max, 2), scaled(1), scaled(2), max, min, scaled(1).__code__,
    ]  # fmt: skip
    names = [digest([value]) for value in values]
    assert len(set(names)) == len(values)
    assert names == [digest([value]) for value in values]


# --- several processes

WORKER = """
import json, os, signal, sys
from pathlib import Path
from dataclasses import replace
import torch
from hawqfx.sensitivity.distributed import launched
from hawqfx.passes.hawq_v2 import HawqV2
from tests.nets import Plain, images
from tests.sensitivity.test_estimation import facts
from tests.tools import after, context
out, mode, batches = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with launched(torch.device("cpu")) as rank:
    work = context(images(count=batches), seed=rank if mode == "different" else 0)
    if mode == "dies" and rank == 1:
        work = replace(work, progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    found = facts(after("cost", Plain), work, HawqV2(probes=12, tolerance=0.3))
    if rank == 0:
        out.write_text(json.dumps(found))
if rank == 0:
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    out.with_name("threads.json").write_text(json.dumps(threads))
"""


def torchrun(processes: int, folder: Path, mode: str, batches: int = 3) -> subprocess.CompletedProcess[str]:
    (folder / "worker.py").write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return subprocess.run(
        [*launcher, str(folder / "worker.py"), str(folder / "out.json"), mode, str(batches)],
        cwd=ROOT,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize(("processes", "batches"), [(2, 3), (4, 2)])  # fewer than batches, and two to a batch
def test_processes_together_give_what_one_gives(tmp_path: Path, plain: Program, processes: int, batches: int) -> None:
    expected = facts(plain, context(images(count=batches)), HawqV2(probes=12, tolerance=0.3))
    done = torchrun(processes, tmp_path, "same", batches)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    largest = max(abs(mean) for mean, _, _ in expected.values())
    for key, entry in expected.items():
        # another number of threads adds float32 up in another order; traces near zero feel that more
        assert found[key] == pytest.approx(entry, rel=1e-6, abs=1e-6 * largest), key
    # a thread of theirs that outlives the group may abort the process when it ends
    assert [name for name in json.loads((tmp_path / "threads.json").read_text()) if "gloo" in name] == []


def test_a_process_that_dies_ends_the_run(tmp_path: Path) -> None:
    done = torchrun(2, tmp_path, "dies")  # a hang would run into the time limit
    assert done.returncode != 0
    assert not (tmp_path / "out.json").exists()


def test_processes_that_measure_different_things_are_refused(tmp_path: Path) -> None:
    done = torchrun(2, tmp_path, "different")
    assert done.returncode != 0
    assert "the processes have different models, data, losses or seeds" in done.stderr
