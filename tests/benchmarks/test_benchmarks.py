"""The benchmarks measure what they say: contestants do equal work, noise is told, results are kept and judged."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from benchmarks import (
    bags,
    bench,
    dlrm,
    frameworks,
    jobs,
    ours,
    regret,
    report,
    results,
    rivals,
    scaling,
    sequence,
    small,
    tables,
    timing,
)
from benchmarks.contestants import Built, Contestant, Skipped, sittings
from benchmarks.targets import TARGETS, targets
from benchmarks.workload import CARDINALITIES, ONE_ID, UNEVEN, Workload, sizes
from embtables import optimizers
from embtables.models import DLRM
from embtables.plan.probe import Entrant, Probe, Race

WORK = Workload([700, 40, 3, 300], dim=8, batch=64, batches=3)
WORKS = {
    "one id": WORK,
    "bags": Workload([700, 40, 3, 300], dim=8, batch=64, batches=3, bags=[4, 1, 2, 1], uneven=True),
    "one table": Workload([700], dim=8, batch=64, batches=3),
    "one table, bags": Workload([700], dim=8, batch=64, batches=3, bags=[10]),
}


def contestants(work: Workload) -> dict[str, Contestant]:
    """All that keep full tables, of embtables and of others, by what the tests call them."""
    found = [*ours.contestants(work, methods=["full"]), *rivals.contestants(work)]
    full = [c for c in found if isinstance(c, Contestant)]
    return {f"{c.name} | {c.optimizer}": c for c in full if c.name != rivals.QR}


# Solved once: of every test a second would go into plans.
CONTESTANTS = contestants(WORK)
EVERYWHERE = {(where, who): contestant for where, w in WORKS.items() for who, contestant in contestants(w).items()}


@pytest.fixture
def work() -> Workload:
    return WORK


def built(work: Workload, contestant: Contestant) -> Built:
    """A contestant with the weights that all have here."""
    tables_of = contestant.build(work)
    assert len(tables_of.weights) == len(work.sizes)
    for view, weight in zip(tables_of.weights, weights(work)):
        view.copy_(weight)
    return tables_of


def weights(work: Workload) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, work.dim, generator=generator) for n in work.sizes]


# ---- the workload ----------------------------------------------------------------------------------------------------


def test_criteos_tables() -> None:
    assert len(CARDINALITIES) == 26
    assert sum(sizes(1)) == 33_762_577
    assert sum(sizes(10)) == sum(n if n <= 1000 else n // 10 for n in CARDINALITIES) == 3_377_806


def test_layouts_hold_the_same_ids(work: Workload) -> None:
    for i in range(work.batches):
        ids = work.ids[i]
        assert ids.shape == (64, 4) and bool((ids >= 0).all()) and bool((ids < torch.tensor(work.sizes)).all())
        assert torch.equal(torch.stack(work.columns[i], dim=1), ids)
        assert torch.equal(work.by_feature[i].view(4, 64).t(), ids)
        assert torch.equal(work.rows_by_feature[i].view(4, 64).t() - work.bases, ids)
        assert torch.equal(work.rows[i].view(64, 4) - work.bases, ids)
    assert not torch.equal(work.ids[0], work.ids[1])


@pytest.mark.parametrize("where", WORKS)
def test_layouts_of_bags_hold_the_same_ids(where: str) -> None:
    work = WORKS[where]
    for w in (work, work.narrow):
        for i in range(w.batches):
            wanted = ids_of(work, i)
            flat, bounds = w.by_feature[i].tolist(), w.offsets[i].tolist()
            assert [flat[s:e] for s, e in zip(bounds, bounds[1:])] == [bag for bags in wanted for bag in bags]
            rows, bounds = w.rows[i].tolist(), w.row_offsets[i].tolist()
            by_example = [
                [n + base for n in bags[b]] for b in range(w.batch) for bags, base in zip(wanted, w.bases.tolist())
            ]
            assert [rows[s:e] for s, e in zip(bounds, bounds[1:])] == by_example
            for column, offsets, of_feature in zip(w.columns[i], w.column_offsets[i], wanted):
                assert [column[s:e].tolist() for s, e in zip(offsets[:-1], offsets[1:])] == of_feature
    assert work.narrow.rows[0].dtype == work.narrow.offsets[0].dtype == torch.int32
    assert work.rows[0].dtype == work.offsets[0].dtype == torch.int64


def test_bags_are_as_long_as_they_are_said_to_be() -> None:
    even, uneven = (Workload([50, 9], 4, 4096, 4, bags=[10, 1], uneven=each) for each in (False, True))
    for work in (even, uneven):
        lengths = torch.cat([offsets.diff().view(2, -1) for offsets in work.offsets], dim=1).double()
        assert bool((lengths[1] == 1).all())
        assert lengths[0].mean().item() == pytest.approx(10, rel=0.05)
        assert lengths[0].std().item() == pytest.approx(0 if work is even else math.sqrt(10 * 11), rel=0.1)
        assert bool((lengths[0] == 0).any()) == (work is uneven)


def test_ids_are_zipf() -> None:
    drawn = torch.cat(Workload([1000], 1, 4096, 16).ids).flatten()
    expected = np.arange(1, 1001) ** -1.05
    expected /= expected.sum()
    share = np.bincount(drawn.numpy(), minlength=1000) / len(drawn)
    np.testing.assert_allclose(share[:10], expected[:10], rtol=0.08)


# ---- equal work ------------------------------------------------------------------------------------------------------


def ids_of(work: Workload, batch: int) -> list[list[list[int]]]:
    """The ids of each feature and example, from what all layouts are made of."""
    bounds = work.offsets[batch].tolist()
    flat = work.by_feature[batch].tolist()
    every = [flat[s:e] for s, e in zip(bounds, bounds[1:])]
    return [every[i : i + work.batch] for i in range(0, len(every), work.batch)]


@pytest.mark.parametrize(("where", "who"), EVERYWHERE)
def test_contestants_do_the_same_forward(where: str, who: str) -> None:
    """Against a computation by hand, in float64."""
    work = WORKS[where]
    tables_of = built(work, EVERYWHERE[where, who])
    expected = torch.cat(
        [
            torch.stack([weight.double()[bag].sum(0) for bag in bags])
            for weight, bags in zip(weights(work), ids_of(work, 1))
        ],
        dim=1,
    )
    with torch.no_grad():
        torch.testing.assert_close(tables_of.vectors(1).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("where", "who"), [key for key, contestant in EVERYWHERE.items() if contestant.step])
def test_contestants_do_the_same_step(where: str, who: str) -> None:
    """Against a computation by hand, in float64."""
    work, contestant = WORKS[where], EVERYWHERE[where, who]
    tables_of = built(work, contestant)
    before = [w.double() for w in weights(work)]
    for batch in (1, 2):
        tables_of.train(batch, work.grad)
    # embtables' and torch's defaults, or what benchmarks/rivals.py sets.
    rate = 0.001 if contestant.ours and contestant.optimizer.endswith("adam") else 0.01
    if contestant.ours and "optimizer=None" not in who:
        fused = optimizers.optimizer_from_config(contestant.optimizer)
        assert fused is not None
        rate = fused.lr
    after = by_hand(work, before, contestant.optimizer, (1, 2), rate)
    for number, (found, wanted, old) in enumerate(zip(tables_of.weights, after, before)):
        assert not torch.equal(wanted, old)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5, msg=f"{who}, table {number}")


def by_hand(
    work: Workload, before: list[torch.Tensor], optimizer: str, batches: tuple[int, ...], rate: float
) -> list[torch.Tensor]:
    grads = work.grad.double().view(work.batch, len(work.sizes), work.dim)
    after = []
    for feature, weight in enumerate(w.clone() for w in before):
        state, second = torch.zeros_like(weight), torch.zeros_like(weight)
        for step, batch in enumerate(batches, 1):
            bags_of = ids_of(work, batch)[feature]
            ids = torch.tensor([n for bag in bags_of for n in bag])
            of_ids = grads[:, feature].repeat_interleave(torch.tensor([len(bag) for bag in bags_of]), 0)
            grad = torch.zeros_like(weight).index_add_(0, ids, of_ids)
            touched = torch.zeros(len(weight), 1, dtype=torch.bool)
            touched[ids] = True
            if optimizer == "sgd":
                weight -= rate * grad
            elif optimizer == "rowwise_adagrad":
                state += grad.square().mean(1, keepdim=True)
                weight -= torch.where(touched, rate * grad / (state.sqrt() + 1e-8), 0)
            elif optimizer == "adagrad":
                state += grad.square()
                weight -= torch.where(touched, rate * grad / (state.sqrt() + 1e-8), 0)
            else:
                moved = touched if optimizer == "adam" else torch.ones_like(touched)
                state = torch.where(moved, 0.9 * state + 0.1 * grad, state)
                second = torch.where(moved, 0.999 * second + 0.001 * grad.square(), second)
                change = state / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                weight -= torch.where(moved, rate * change, 0)
        after.append(weight)
    return after


def test_quotient_remainder_bags() -> None:
    bag = rivals.QuotientRemainderBag(1000, 4)
    ids = torch.tensor([0, 7, 999, 10])
    quotients, remainders = bag.quotients.weight, bag.remainders.weight
    wanted = torch.stack([quotients[i // 10] * remainders[i % 10] for i in ids.tolist()])
    torch.testing.assert_close(bag(ids, torch.arange(4)), wanted)
    assert quotients.numel() + remainders.numel() <= 0.12 * 1000 * 4


def test_a_dlrm_step_in_two_parts_is_a_step(work: Workload) -> None:
    """Backward through the dense part and then through the tables gives what one backward gives."""
    tables_of = built(work, CONTESTANTS[f"{rivals.FLAT} | sgd"])
    step = dlrm.Step(work, tables_of)
    torch.manual_seed(0)
    given = dlrm.Given(work.names, work.dim)
    model = DLRM(given, 13, bottom_units=(512, 256), top_units=(512, 256))  # type: ignore[arg-type]
    weight = torch.nn.Parameter(torch.cat(weights(work)))
    dense, sparse = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True), torch.optim.SGD([weight], lr=0.01)
    for number in range(3):
        seconds = step(number)
        assert seconds > 0
        given.vectors = F.embedding(work.rows[number], weight).view(work.batch, -1)
        batch = step.batches[number]
        dense.zero_grad()
        sparse.zero_grad()
        F.binary_cross_entropy_with_logits(model(batch), batch.labels).backward()
        dense.step()
        sparse.step()
    torch.testing.assert_close(torch.cat(list(tables_of.weights)), weight.detach())
    assert not torch.allclose(weight, torch.cat(weights(work)))
    for mine, other in zip(step.model.parameters(), model.parameters()):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("model", ["dlrm", "deepfm"])
@pytest.mark.parametrize("is_ours", [True, False])
def test_frameworks_train_the_same_rows(model: str, is_ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frameworks, "sizes", lambda divisor: [500, 30, 3])
    settings = frameworks.Settings(model, is_ours, steps=2, batch=32, threads=1)
    (row,) = frameworks.run(settings, timing.ignore)
    if row["status"] == "skipped":
        pytest.skip(f"{row['contestant']} {row['reason']}")
    assert row["examples_per_second"] > 0 and row["peak_bytes"] > 10**7
    assert math.isclose(row["examples_per_second"], 1e3 * 32 / row["median_ms"])


def test_a_missing_rival_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch, work: Workload) -> None:
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", None)
    monkeypatch.setitem(sys.modules, "torchrec", None)
    found = rivals.contestants(work)
    names = {c.name: c.reason for c in found if isinstance(c, Skipped)}
    assert {*rivals.TBES, rivals.TORCHREC} <= set(names)
    assert "cannot be imported" in names[rivals.TBE]
    assert any(isinstance(c, Contestant) and c.name == rivals.LOOP for c in found)


def test_every_combination_of_a_rivals_settings_takes_part() -> None:
    steps = {(c.name, c.optimizer) for c in EVERYWHERE.values() if c.step}
    assert len(rivals.TBES) == 8 and {(name, "rowwise_adagrad") for name in rivals.TBES} <= steps
    assert len(rivals.LOOPS) == 4 and {(name, "adagrad") for name in rivals.LOOPS} <= steps
    alone = [who for where, who in EVERYWHERE if where == "one table, bags"]
    assert alone and not any("one flat table" in who or "torchrec" in who for who in alone)
    assert rivals.rival_of(rivals.TBE_ONE_UNCHECKED) == rivals.TBE and rivals.rival_of("other") == "other"


def test_quotient_remainder_bags_take_bags() -> None:
    work = WORKS["bags"]
    bags_of = rivals.quotient_remainder(work)
    with torch.no_grad():
        vectors = bags_of.vectors(0)
    empty = work.offsets[0].diff().view(4, -1).t() == 0
    assert bool(empty.any()) and torch.equal((vectors.view(64, 4, 8) == 0).all(2), empty)


def test_a_step_of_a_sequence_model_is_the_same_step() -> None:
    """``Embedding`` and ``nn.Embedding`` train one model to the same weights, and the other optimizer to others."""
    every = sequence.items(300)
    generator = torch.Generator().manual_seed(0)
    # Small vectors, to which attention is even: elsewhere many gradients are rounding alone.
    start = torch.randn(300, sequence.DIM, generator=generator) / 10
    ids = [torch.randint(300, (8, sequence.LENGTH + 1), generator=generator) for _ in range(2)]
    labels = torch.tensor([0.0, 1.0] * 4)
    after = {}
    for key, given in every.items():
        assert given.weight is not None
        given.weight.copy_(start)
        step = sequence.step(given, ids, labels)
        for number in range(3):
            step(number)
        after[key] = given.weight.clone()
    plain, same = after[sequence.PLAIN, "adagrad"], after[ours.FULL, "adagrad"]
    torch.testing.assert_close(same, plain)
    assert (plain - start).abs().max() > 0.01
    assert not torch.allclose(after[ours.FULL, "rowwise_adagrad"], plain, atol=1e-3)
    (row, *_), settings = sequence.run(sequence.Settings(300, 8, 1, 1), timing.ignore), sequence.Settings(300)
    assert row["contestant"] == ours.FULL and row["scale"] == settings.scale == "300 rows"


def test_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are made, and the report shows the medians beside what 99 of 100 calls take."""
    monkeypatch.setattr(small, "sizes", lambda divisor: [2000, 30, 3])
    rows = [{"suite": "small"} | row for row in small.run(small.Settings(rows=50, threads=1, rounds=1), timing.ignore)]
    every = {(row["phase"], row["batch"], row["contestant"], row["precision"]) for row in rows}
    assert len(every) == len(rows)
    for batch in small.SERVED_BATCHES:
        for precision in small.PRECISIONS:
            assert ("served", batch, ours.name_of("pruned"), precision) in every
        assert ("served", batch, rivals.LOOP, "fp32") in every
    assert {name for phase, _, name, _ in every if phase == "step"} == {ours.FULL, small.DENSE, small.SPARSE}
    assert {*rivals.LOOPS, *rivals.TBES, ours.FULL} <= {name for phase, _, name, _ in every if phase == "forward"}
    frame = pd.DataFrame(rows).assign(median_ms=0.002, p99_ms=0.007, others=0.0, distrust="")
    found = results.Results(frame, {})
    assert "| embtables full | 2 / 7 |" in report.small_calls(found)
    assert "| 1 thread, embtables pruned, int8 | 2 / 7 | 2 / 7 | 2 / 7 |" in report.small_calls(found)
    judged = {target.what: target.measure(found) for target in TARGETS}
    lookup = judged["lookup, 26 tables, batch 1, median"]
    assert lookup is not None and lookup.value == pytest.approx(2)
    # Of equal work: lookups and served full tables, but no backward without an update.
    looked_up = {rivals.rival_of(name) for phase, _, name, _ in every if phase == "forward" and name != ours.FULL}
    compared = len(looked_up) + 2 * len(small.SERVED_BATCHES)
    assert f"In none of {compared} comparisons" in report.faster_rivals(found)
    slow = (frame["contestant"] == ours.name_of("pruned")) & (frame["batch"] == 100) & (frame["precision"] == "int8")
    frame.loc[slow, "median_ms"] = 0.02
    said = targets(results.Results(frame, {}))
    assert "| 26 tables served, pruned | full, served | ≤ 3× | 10.00× |" in said
    assert "- 26 tables served, pruned, against full, served: int8, batch 100: 10.00×" in said


def test_small_steps_without_an_update_leave_the_weights() -> None:
    """A backward of ``nn.EmbeddingBag`` alone, against a whole step of ours."""
    work = Workload([50], 16, 8, 2)
    bag = torch.nn.EmbeddingBag(50, 16, mode="sum")
    before = bag.weight.detach().clone()
    for batch in (0, 1):
        small._without_update(work, bag)(batch)
        wanted = torch.zeros(50, 16).index_add_(0, work.by_feature[batch], work.grad)
        torch.testing.assert_close(bag.weight.grad, wanted)
    assert torch.equal(bag.weight, before)


def test_every_method_takes_part(work: Workload) -> None:
    from embtables.methods import kinds

    found = {(c.name, c.optimizer): c for c in ours.contestants(Workload([20_000, 5_000], 16, 8, 1))}
    for kind in kinds():
        for optimizer in ours.OPTIMIZERS:
            if not isinstance(found[ours.name_of(kind), optimizer], Contestant):
                assert (kind, optimizer) == ("robe", "rowwise_adagrad")
    skipped = found[ours.name_of("robe"), "rowwise_adagrad"]
    assert isinstance(skipped, Skipped) and "robe" in skipped.reason


# ---- memory ----------------------------------------------------------------------------------------------------------


def participant(name: str, size: int) -> Contestant:
    return Contestant(name, "sgd", False, size, lambda work: Built(lambda batch: torch.empty(0)))


def test_contestants_share_a_sitting_while_they_fit() -> None:
    every = [
        participant("first", 2),
        participant("a", 5),
        participant("b", 6),
        participant("c", 3),
        participant("d", 9),
    ]
    groups, left_out = sittings(every, 10)
    assert [[c.name for c in group] for group in groups] == [["first", "a", "c"], ["first", "b"]]
    assert [s.name for s in left_out] == ["d"] and "needs 0.0 GB beside" in left_out[0].reason


def test_peak_memory_holds_the_tables() -> None:
    """In processes of their own: with 22 MB of tables and twice that of state, and without one."""
    peaks = []
    for method, optimizer in ((None, ""), ("full", "adam")):
        job = jobs.Job("memory", dlrm.Memory(method, optimizer, divisor=100, batch=64, threads=1, steps=2))
        assert jobs.Job.loads(job.dumps()) == job
        (row,) = jobs.in_a_process(job)
        peaks.append(row)
    above = peaks[1]["peak_bytes"] - peaks[0]["peak_bytes"]
    assert peaks[1]["training_bytes"] == 3 * 4 * 16 * sum(sizes(100)) + 8
    assert 0.9 < above / peaks[1]["training_bytes"] < 1.6


# ---- timing ----------------------------------------------------------------------------------------------------------


class Clock:
    """Stands for `time`: passes as contestants say; `slow` makes everything slower as time goes by."""

    def __init__(self, slow: float = 0.0, idle: float = 0.0) -> None:
        self.now, self.cpu, self.slow, self.idle = 0.0, 0.0, slow, idle

    def work(self, seconds: float) -> None:
        seconds *= 1 + self.slow * self.now
        self.now += seconds
        self.cpu += seconds * (1 - self.idle)

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.cpu


def timed(monkeypatch: pytest.MonkeyPatch, clock: Clock, seconds: dict[str, float], rounds: int = 20) -> Any:
    monkeypatch.setattr(timing, "time", clock)
    calls: list[tuple[str, int]] = []

    def contestant(name: str) -> timing.Call:
        def call(batch: int) -> float:
            calls.append((name, batch))
            clock.work(seconds[name])
            return seconds[name] / 2

        return call

    return timing.interleaved({name: contestant(name) for name in seconds}, rounds), calls


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    timings, calls = timed(monkeypatch, Clock(), {"quick": 0.002, "slow": 0.03, "very slow": 0.4})
    assert {name: len(t.wall) for name, t in timings.items()} == {"quick": 200, "slow": 20, "very slow": 5}
    for name, seconds in (("quick", 0.002), ("slow", 0.03), ("very slow", 0.4)):
        assert timings[name].row()["median_ms"] == pytest.approx(1e3 * seconds)
        assert timings[name].row()["cpu_ms"] == pytest.approx(1e3 * seconds)
        assert timings[name].returned == [seconds / 2] * len(timings[name].wall)
        batches = [batch for who, batch in calls if who == name]
        assert batches == list(range(len(batches)))  # as many different batches for each
    # The order of a round is drawn anew, and everybody has a turn.
    turns = [who for i, (who, _) in enumerate(calls[9:], 9) if who != calls[i - 1][0] and who != "very slow"]
    assert len({tuple(turns[i : i + 2]) for i in range(0, len(turns), 2)}) > 1


def test_the_first_call_of_a_turn_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It pays for what the others have thrown out of the caches."""
    clock, last = Clock(), [""]
    monkeypatch.setattr(timing, "time", clock)

    def contestant(name: str) -> timing.Call:
        def call(batch: int) -> None:
            clock.work(0.01 if last[0] == name else 0.05)
            last[0] = name

        return call

    for taken in timing.interleaved({name: contestant(name) for name in "abc"}, 10).values():
        assert taken.wall == pytest.approx([0.01] * len(taken.wall))


def test_a_drift_of_the_machine_meets_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    timings, _ = timed(monkeypatch, Clock(slow=0.5), {"a": 0.01, "b": 0.02})
    a, b = timings["a"], timings["b"]
    assert max(a.wall) > 1.5 * min(a.wall)
    assert timing.quartiles(b.wall)[1] / timing.quartiles(a.wall)[1] == pytest.approx(2, rel=0.1)


def test_noise_is_told() -> None:
    quiet = [0.010, 0.0101, 0.0099, 0.0102, 0.010, 0.0098]
    assert timing.distrust(quiet, quiet) == ""
    assert timing.distrust(quiet, [2 * s for s in quiet]) == ""  # two threads
    jumping = [0.010, 0.020, 0.010, 0.030, 0.010, 0.025]
    assert "quartiles" in timing.distrust(jumping, jumping)
    assert "waited for a core 30% of the time" in timing.distrust(quiet, [0.7 * s for s in quiet])
    assert "only 2 calls" in timing.distrust(quiet[:2], quiet[:2])


def test_what_others_took(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"busy": 100.0, "own": 10.0}
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(timing, "_busy_seconds", lambda: values["busy"])
    monkeypatch.setattr(timing, "_own_seconds", lambda: values["own"])
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    others = timing.Others()
    clock.now, values["busy"], values["own"] = 10.0, 114.0, 20.0
    assert others.share() == pytest.approx(0.2)  # 4 of 20 seconds
    monkeypatch.setattr(timing, "_busy_seconds", lambda: None)
    assert others.share() is None


def test_rows_of_a_real_measurement(work: Workload) -> None:
    settings = tables.Settings(threads=1, rounds=2)
    found: list[Contestant | Skipped] = [c for c in CONTESTANTS.values() if c.optimizer in ("sgd", "rowwise_adagrad")]
    rows = pd.DataFrame(tables.measure(work, settings, [*found, Skipped("gone", "sgd", False, "it is gone")]))
    mine = rows[(rows["contestant"] == ours.FULL) & (rows["status"] == "ok")]
    assert set(mine["phase"]) == {"forward", "step"}
    timed_rows = rows[rows["status"] == "ok"]
    assert bool((timed_rows["min_ms"] <= timed_rows["median_ms"]).all()) and bool((timed_rows["cpu_ms"] > 0).all())
    assert rows[rows["contestant"] == "gone"]["reason"].tolist() == ["it is gone"]


def test_a_contestant_that_breaks_does_not_stop_the_others(work: Workload) -> None:
    def fail(_: Workload) -> Built:
        raise RuntimeError("no such\nthing")

    first = next(iter(CONTESTANTS.values()))
    broken = Contestant("broken", "sgd", False, 0, fail)
    rows = tables.measure(work, tables.Settings(threads=1, rounds=1), [first, broken])
    assert [r["reason"] for r in rows if r["status"] == "skipped"] == ["RuntimeError: no such thing"]
    assert any(r["status"] == "ok" for r in rows)


# ---- results ---------------------------------------------------------------------------------------------------------


def made_up(full: float = 1.0) -> pd.DataFrame:
    """Rows as a run gives them, with medians that are easy to divide."""
    base: dict[str, Any] = {"suite": "tables", "scale": "1/10", "dim": 16, "batch": 2048, "threads": 2, "ops": "native"}
    base |= {"phase": "step", "status": "ok", "sitting": 0, "others": 0.01, "distrust": ""}
    rows = [
        base | {"contestant": ours.FULL, "optimizer": "rowwise_adagrad", "median_ms": full},
        base | {"contestant": rivals.TBE_ONE_UNCHECKED, "optimizer": "rowwise_adagrad", "median_ms": 2.0},
        base | {"contestant": rivals.TBE, "optimizer": "rowwise_adagrad", "median_ms": 4.0, "others": 0.4},
        base | {"contestant": "embtables hash", "optimizer": "rowwise_adagrad", "median_ms": 1.2},
        base | {"contestant": rivals.LOOP, "optimizer": "adam", "median_ms": 9.0, "distrust": "quartiles 90%"},
        base | {"contestant": ours.FULL, "optimizer": "adam", "median_ms": 1.5},
        base | {"contestant": rivals.QR, "optimizer": "adagrad", "status": "skipped", "reason": "it does not fit"},
    ]
    alone = base | {"suite": "memory", "phase": "", "contestant": dlrm.ALONE, "optimizer": "", "peak_bytes": 500e6}
    rows.append(alone)
    rows.append(alone | {"contestant": ours.FULL, "optimizer": "adam", "peak_bytes": 620e6, "training_bytes": 100e6})
    least = {"min_ms": 0.5, "cpu_ms": 1.5, "calls": 20}  # of every call, so that a ratio of minima is 1
    return pd.DataFrame([{"job": "made up"} | row | least for row in rows])


def verdicts(rows: pd.DataFrame) -> dict[tuple[str, str], tuple[str, str]]:
    found = results.Results(rows, {})
    measured = {target: target.measure(found) for target in TARGETS}
    return {(t.what, t.against): ("" if m is None else t.shown(m.value), t.verdict(m)) for t, m in measured.items()}


def test_targets_are_judged_by_the_numbers() -> None:
    found = verdicts(made_up())
    step = "step, full, row-wise Adagrad"
    assert found[step, "FBGEMM TBE, best setting"] == ("2.00×", "met")
    assert found[step, "FBGEMM TBE, default"] == ("4.00×", "**not met** †")  # others took 40 % of the machine
    assert found["step, hash", "full"] == ("1.20×", "**not met**")
    adam = found["step, full, Adam on touched rows", "`nn.EmbeddingBag` loop, SparseAdam"]
    assert adam == ("6.00×", "met †")
    assert found["step, unified, two lookups", "full"] == ("", "not measured")
    peak = found["peak memory of training, full", "plan's training bytes, beside the dense part"]
    assert peak == ("1.20×", "**not met**")
    assert verdicts(made_up(full=1.25))[step, "FBGEMM TBE, best setting"] == ("1.60×", "**not met**")


def test_sittings_are_compared_through_what_they_share() -> None:
    rows = made_up()
    full = rows[(rows["contestant"] == ours.FULL) & (rows["optimizer"] == "rowwise_adagrad")]
    # In a second sitting everything took three times as long.
    later = pd.concat([full, rows[rows["contestant"] == rivals.TBE_ONE_UNCHECKED]]).assign(sitting=1)
    later["median_ms"] *= 3
    rows = pd.concat([rows[rows["contestant"] != rivals.TBE_ONE_UNCHECKED], later])
    steps = results.Results(rows, {}).configuration()
    best, hashed = (rivals.TBE_ONE_UNCHECKED, "rowwise_adagrad"), ("embtables hash", "rowwise_adagrad")
    assert results.ratio(steps, best, results.FULL) == results.Measured(pytest.approx(2.0), "", pytest.approx(1.0))
    across = results.ratio(steps, best, hashed)
    assert across is not None and across.value == pytest.approx(2 / 1.2)


def test_the_report_says_where_a_rival_is_faster_and_what_not_to_trust() -> None:
    found = results.Results(made_up(), {})
    assert "In none of 2 comparisons" in report.faster_rivals(found)
    slower = results.Results(made_up(full=2.5), {})
    said = report.faster_rivals(slower)
    assert said.startswith("In 1 of 2 comparisons")
    assert "- FBGEMM TBE, step with rowwise-adagrad, 1/10, D = 16, 2 threads: 0.80× our time at batch 2048 (one" in said
    short = report.faster_in_short(slower)
    assert short.endswith(":\n\n- FBGEMM TBE, step with rowwise-adagrad: once, 0.80× our time, at batch 2048")
    both = pd.concat([made_up(full=2.5), made_up(full=4.0).assign(batch=64)])
    short = report.faster_in_short(results.Results(both, {}))
    assert (
        "- FBGEMM TBE, step with rowwise-adagrad: 2 times, 0.50× to 0.80× our time, at batches of 64 to 2048" in short
    )
    noise = report.noise(found)
    assert "The machine was too noisy: other processes took up to 40%" in noise
    assert "Do not trust these 1 of 6 rows" in noise and "nn.EmbeddingBag" in noise and "quartiles 90%" in noise
    assert "it does not fit" in report.skipped(found)
    quiet = made_up().assign(others=0.0, distrust="")
    assert report.noise(results.Results(quiet, {})).startswith("The machine was quiet enough for all 6 rows")


@pytest.mark.parametrize("rows", [made_up(), pd.DataFrame({"job": []})], ids=["rows", "none"])
def test_every_part_of_the_report_can_be_taken_out(rows: pd.DataFrame) -> None:
    text = report.page(results.Results(rows, {"machine": {"cores": 2}}))
    for name in report.PARTS:
        assert f"<!-- part:{name} -->" in text
        report.part(text, name)
    with pytest.raises(ValueError, match="no part 'other'; it has faster, targets"):
        report.part(text, "other")


def test_packed_bags_are_compared_side_by_side() -> None:
    """The contestants sum rows of one table: what they differ by is how far a scalar moves where it is rounded."""
    found = bags.contestants(60, 16)
    ids, offsets = (
        torch.randint(60, (400,), generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 1, 130, 400]),
    )
    with torch.no_grad():
        sums = {name: look_up(ids, offsets) for name, look_up in found.items()}
    expected = sums[bags.PLAIN]
    largest = 400 * float(expected[0].abs().max())
    for name, bits in ((bags.name_of("fp32"), 22), (bags.name_of("int8"), 6), (bags.BYTES, 6), (bags.NIBBLES, 2)):
        assert torch.allclose(sums[name], expected, rtol=0, atol=largest / 2**bits), name
        assert name.endswith("fp32") or not torch.equal(sums[name], expected)
    rows = bags.run(bags.Settings(60, 16, batch=3, rounds=1), timing.ignore)
    assert len(rows) == len(bags.LENGTHS) * len(found)
    run = results.Results(pd.DataFrame(rows).assign(median_ms=[float(i) + 1 for i in range(len(rows))], others=0.0), {})
    lines = report.pooled_bags(run).splitlines()
    assert len(lines) == 2 + len(found) and lines[2].startswith("| embtables full, fp32 | 60 rows, D = 16 | 1,000")
    assert lines[2].split("|")[4].strip() == f"{[*found].index(bags.PLAIN) + 1:.2f}"


def one_table(leads: dict[tuple[str, int, int], float]) -> pd.DataFrame:
    """Rows of ``pooled``: the time of ``nn.EmbeddingBag`` against ours by bags, batch and threads."""
    base: dict[str, Any] = {"job": "", "suite": "pooled", "scale": "1,000,000 rows", "dim": 16, "ops": "native"}
    base |= {"phase": "forward", "status": "ok", "sitting": 0, "others": 0.0, "distrust": "", "min_ms": 1.0}
    rows = []
    for (length, batch, threads), lead in leads.items():
        same = base | {"bags": length, "batch": batch, "threads": threads}
        rows.append(same | {"contestant": ours.FULL, "optimizer": "rowwise_adagrad", "median_ms": 1.0})
        for name, more in ((rivals.LOOP, 0.5), (f"{rivals.LOOP}, int32", 0.0)):
            rows.append(same | {"contestant": name, "optimizer": "adagrad", "median_ms": lead + more})
    return pd.DataFrame(rows)


def test_a_target_over_several_configurations_is_judged_by_the_worst() -> None:
    leads = {("one id", 1, 1): 1.5, ("10 ids", 256, 1): 1.1, ("10 ids", 256, 2): 0.8, ("50 ids", 16, 2): 2.0}
    outside = {(UNEVEN, 256, 1): 0.1, ("50 ids", 16_384, 1): 0.2}  # of what is required
    found = results.Results(one_table(leads | outside), {})
    text = targets(found)
    assert "50, ids checked | `nn.EmbeddingBag` | ≥ 1× | 0.80× | 1.00× | **not met** |" in text
    where = "ids checked, against `nn.EmbeddingBag`: 10 ids, batch 256, 2 thr.: 0.80×"
    assert text.count(where) == 1 and "Not met, at the worst:" in text
    said = report.faster_rivals(found)
    assert said.startswith("In 3 of 6 comparisons")
    assert (
        "- nn.EmbeddingBag, forward, 1,000,000 rows, D = 16, bags of 10 ids, 2 threads: 0.80× our time at batch 256"
        in said
    )
    assert "(int32)" in said
    pooled = report.pooled(found)
    assert "| 2 threads, nn.EmbeddingBag |  |  | 800 |  |" in pooled and "1,300" not in pooled
    met = targets(results.Results(one_table({("one id", 1, 1): 1.5}), {}))
    assert "| `nn.EmbeddingBag` | ≥ 1× | 1.50× | 1.00× | met |" in met and "Not met" not in met


def test_a_rivals_lead_is_shown_first(tmp_path: Path) -> None:
    text = report.page(results.Results(made_up(), {}))
    assert text.index("Where a rival is faster") < text.index("## Targets")


def test_scaling_is_drawn_from_what_was_measured(tmp_path: Path) -> None:
    settings = tables.Settings(rows=1000, tables=3, batch=4, threads=1, rounds=1)
    assert (settings.scale, tables.Settings(rows=1000).scale) == ("3 × 1,000 rows", "1,000 rows")
    work = tables.workload(settings)
    assert work.sizes == [1000] * 3 and not work.has_bags
    found = [c for c in tables.participants(work, settings) if isinstance(c, Contestant)]
    assert {c.optimizer for c in found} == {"rowwise_adagrad", "adagrad"}
    base: dict[str, Any] = {"job": "", "dim": 16, "threads": 2, "ops": "native", "phase": "step", "status": "ok"}
    base |= {"sitting": 0, "others": 0.0, "distrust": "", "min_ms": 1.0, "cpu_ms": 1.0, "calls": 5}
    rows = []
    for suite, scale, length, batch, ms in (
        ("pooled", "1,000,000 rows", "10 ids", 2048, 3.0),
        ("pooled", "1,000,000 rows", "50 ids", 2048, 9.0),
        ("pooled", "1,000,000 rows", "10 ids", 16, 0.5),
        ("pooled", "1/10", "10 ids", 2048, 77.0),
        ("scaling", "10,000 rows", "10 ids", 2048, 1.0),
        ("scaling", "100 × 10,000 rows", ONE_ID, 256, 6.0),
        ("scaling of 24", "1,000,000 rows", "10 ids", 2048, 4.0),
    ):
        same = base | {"suite": suite, "scale": scale, "bags": length, "batch": batch}
        if suite == "scaling of 24":
            same |= {"suite": "scaling", "dim": 24}
        rows.append(same | {"contestant": ours.FULL, "optimizer": "rowwise_adagrad", "median_ms": ms})
        for name, factor in ((rivals.TBE, 4), (rivals.TBE_UNCHECKED, 2)):
            rows.append(same | {"contestant": name, "optimizer": "rowwise_adagrad", "median_ms": factor * ms})
    run = results.Results(pd.DataFrame(rows), {})
    points = [(axis, value, times[ours.FULL], times[rivals.TBE]) for axis, value, times in scaling.points(run)]
    assert points == [
        ("rows of one table", 10_000, 1.0, 2.0),
        ("rows of one table", 1_000_000, 3.0, 6.0),
        ("embedding_dim", 16, 3.0, 6.0),
        ("embedding_dim", 24, 4.0, 8.0),
        ("batch", 16, 0.5, 1.0),
        ("batch", 2048, 3.0, 6.0),
        ("ids of a bag", 10, 3.0, 6.0),
        ("ids of a bag", 50, 9.0, 18.0),
        ("tables", 100, 6.0, 12.0),
    ]
    run.rows.to_csv(tmp_path / results.RESULTS, index=False)
    assert "![milliseconds of a step](scaling.svg)" in report.write(tmp_path)
    svg = (tmp_path / scaling.FIGURE).read_text(encoding="utf-8")
    assert "rows of one table" in svg and "FBGEMM TBE" in svg
    report.write(tmp_path)
    assert (tmp_path / scaling.FIGURE).read_text(encoding="utf-8") == svg
    run.rows[run.rows["suite"] == "scaling"].to_csv(tmp_path / results.RESULTS, index=False)
    report.write(tmp_path)
    svg = (tmp_path / scaling.FIGURE).read_text(encoding="utf-8")
    assert "rows of one table" in svg and "ids of a bag" not in svg  # as no pooled row was measured


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--suites", "tables,tabels"], "--suites has no 'tabels': choose among machine, tables"),
        (["--threads", "1000"], "--threads 1000: this machine has"),
        (["--quick", "--full"], "not allowed with argument"),
    ],
    ids=["suite", "threads", "modes"],
)
def test_bad_arguments(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_plans_name_every_job_once() -> None:
    for mode in jobs.MODES:
        names = [job.name for job in jobs.planned(mode, jobs.SUITES, 2)]
        assert len(set(names)) == len(names) > 5
    assert len(jobs.planned("full", ["tables"], 2)) == 48
    # A table with four kinds of bags in six batches, one thread and two; and 26 tables with three kinds.
    assert len(jobs.planned("default", ["pooled"], 2)) == 4 * 6 * 2 + 3
    for job in jobs.planned("default", jobs.SUITES, 2):
        assert jobs.Job.loads(job.dumps()).name == job.name
    assert all(job.suite == "dlrm" for job in jobs.planned("default", ["dlrm"], 1))


def test_a_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []
    stop_at = 3

    def in_a_process(job: jobs.Job, progress: timing.Progress) -> list[dict[str, Any]]:
        ran.append(job.name)
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        progress(0.5)
        return made_up().drop(columns="job").to_dict("records")

    monkeypatch.setattr(jobs, "in_a_process", in_a_process)
    command = ["--quick", "--threads", "1", "--suites", "memory,tables,dlrm", "--out", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):
        bench.main(command)
    every = [job.name for job in jobs.planned("quick", ["memory", "tables", "dlrm"], 1)]
    assert ran == every[:3] and len(every) == 4
    kept = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(kept["job"]) == set(every[:2])

    stop_at = 0
    ran.clear()
    assert bench.main(command) == 0
    assert ran == every[2:]
    printed = capsys.readouterr()
    assert "Targets" in printed.out and "<!--" not in printed.out
    assert set(pd.read_csv(tmp_path / "out" / "results.csv")["job"]) == set(every)
    assert (tmp_path / "out" / "report.md").read_text() == report.page(results.Results.read(tmp_path / "out"))

    ran.clear()
    assert bench.main([*command, "--fresh"]) == 0 and ran == every
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    run["machine"]["processor"] = "another"
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    assert bench.main(command) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "holds a run with another machine, which cannot be continued: name another --out, or give --fresh" in error


def test_a_failed_job_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_a_process(job: jobs.Job, progress: timing.Progress) -> list[dict[str, Any]]:
        raise jobs.JobFailed("MemoryError")

    monkeypatch.setattr(jobs, "in_a_process", in_a_process)
    assert bench.main(["--quick", "--threads", "1", "--suites", "dlrm", "--out", str(tmp_path)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "DLRM: 1/10, fp32, 1 thread failed: MemoryError" in said and "tries them again" in said
    assert pd.read_csv(tmp_path / "results.csv").empty


def test_the_process_of_a_job_says_why_it_ended() -> None:
    job = jobs.Job("memory", dlrm.Memory("no_such_method", "adam", threads=1))
    with pytest.raises(jobs.JobFailed, match="unknown method"):
        jobs.in_a_process(job)


def test_a_job_that_is_killed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A program that kills itself, in the place of Python.
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(jobs.sys, "executable", str(program))
    with pytest.raises(jobs.JobFailed, match="it was killed, as the system does where memory runs out"):
        jobs.in_a_process(jobs.Job("memory", dlrm.Memory(None, threads=1)))


def test_a_report_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results.csv: run `python -m benchmarks.bench"):
        results.Results.read(tmp_path)


# ---- what is published -----------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "docs" / "results" / "speed"


def test_the_published_reports_are_what_their_csv_files_say(tmp_path: Path) -> None:
    copied = shutil.copytree(PUBLISHED, tmp_path / "speed")
    report.write(copied)
    pages = sorted(path.relative_to(PUBLISHED) for path in PUBLISHED.glob("**/report.md"))
    assert len(pages) > 1
    for page in pages:
        assert (PUBLISHED / page).read_text(encoding="utf-8") == (copied / page).read_text(encoding="utf-8")


def test_the_worst_of_several_machines_decides(tmp_path: Path) -> None:
    def run(folder: str, caches: str, times: dict[str, float]) -> None:
        (tmp_path / folder).mkdir()
        same = {"suite": "tables", "scale": "1/10", "dim": 16, "batch": 2048, "threads": 2, "phase": "step"}
        same |= {"status": "ok", "ops": "native", "optimizer": "rowwise_adagrad", "sitting": 0, "others": 0.0}
        rows = [{**same, "contestant": name, "median_ms": ms, "min_ms": ms} for name, ms in times.items()]
        pd.DataFrame(rows).to_csv(tmp_path / folder / "results.csv", index=False)
        about = {"processor": "Some(R) Chip(TM) Processor @ 2GHz", "caches": f"L2 1024K, L3 {caches}"}
        (tmp_path / folder / "run.json").write_text(json.dumps({"machine": about}))

    run("a", "2048K", {ours.FULL: 1.0, ours.name_of("hot_cold"): 1.1, ours.name_of("banded_whole"): 1.1})
    run("b", "4096K", {ours.FULL: 1.0, ours.name_of("hot_cold"): 1.2})
    text = report.write(tmp_path)
    assert "| what | against | required | Some Chip @ 2GHz, L3 2 MiB | Some Chip @ 2GHz, L3 4 MiB | the worst |" in text
    assert "| step, hot_cold | full | ≤ 1.15× | 1.10× | 1.20× | **not met** |" in text
    assert "| step, banded, whole rows | full | ≤ 1.15× | 1.10× |  | met |" in text
    assert "| step, hash | full | ≤ 1× |  |  | not measured |" in text
    assert (tmp_path / "a" / "report.md").is_file() and (tmp_path / "b" / "report.md").is_file()
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    with pytest.raises(ValueError, match=r"holds two runs of Some Chip @ 2GHz, L3 4 MiB: keep one of them"):
        report.write(tmp_path)


def test_pages_show_what_the_results_say() -> None:
    command = [sys.executable, "-m", "benchmarks.readme_tables", "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert checked.returncode == 0, checked.stderr or "run `python -m benchmarks.readme_tables`"


def test_pages_take_parts_that_there_are() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert set(re.findall("<!-- results:speed-(.*?) -->", text)) == set(report.PARTS)


# ---- what probes chose -----------------------------------------------------------------------------------------------


def test_regrets_are_differences_to_the_best_that_was_measured() -> None:
    entrants = [
        Entrant(method=m, loss=loss, error=0.001, valid=0.7, epochs=1) for m, loss in (("robe", 0.02), ("hash", 0.03))
    ]
    races = (Race(budget_bytes=100, entrants=tuple(entrants)), Race(budget_bytes=77, entrants=tuple(entrants)))
    fields: dict[str, Any] = {"data": "", "model": "dlrm", "monitor": "auc", "reference": 0.8, "reference_epochs": 1}
    found = Probe(**fields, regularization=0.1, tables={}, how={}, races=races)
    rows = [
        ("full", None, 0.8, 1000),
        ("full", None, 0.9, 1000),
        ("full(precision=int2)", None, 0.6, 99),
        ("full(precision=int8)", None, 0.8, 300),  # does not fit
        ("frequency_cutoff", "10%", 0.65, 100),
        ("robe", "10%", 0.7, 100),
        ("robe", "10%", 0.72, 100),
        ("hash", "10%", 0.69, 100),
        ("unified", "10%", 0.75, 100),
        ("drop_feature", "50%", 0.78, 90),  # of another budget
    ]
    columns = ["method", "budget", "test_auc", "inference_bytes"]
    frame = pd.DataFrame(rows, columns=columns).assign(status="ok", full_bytes=1000)
    (cell,) = regret.cells("made", found, frame)  # no sweep has the budget of the other race
    assert (cell.budget, cell.chosen, cell.best) == ("10%", "robe", "unified")
    assert cell.regret("robe") == pytest.approx(0.04) and cell.regret(regret.RULE) is None
    assert sorted(cell.baselines) == ["frequency_cutoff", "full(precision=int2)"]
    table = regret.choices([cell])
    assert "| 0.7100 ± 0.0141 | unified | 0.7500 | 0.0400 | not measured | frequency_cutoff 0.6500 | +0.0600 |" in table
    assert "| +0.0200 ± 0.0010 | +0.1400 |" in table
    assert regret.in_short([cell]) == (
        "The regret is at most 0.002 in 0 of 1 cells, and 0.0400 in the worst, made at 10%."
    )
    assert [(entrant.method, pytest.approx(loss)) for entrant, loss in cell.losses()] == [
        ("robe", 0.14),
        ("hash", 0.16),
    ]
    grouped = regret.by_group([cell], "all", lambda cell, entrant: "all")
    assert "| all | 2 | -0.1250 | 0.1250 |" in grouped
    assert "| made | 10% | robe, hash | robe, hash |" in regret.orders([cell])


def test_spearman_is_the_correlation_of_ranks() -> None:
    assert regret.spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert math.isnan(regret.spearman([1, 2], [1, 2]))


def test_the_published_choices_of_probes_are_what_their_files_say() -> None:
    folder = regret.RESULTS / "probes"
    assert (folder / "report.md").read_text(encoding="utf-8") == regret.published(folder)
