"""Stochastic rounding to bfloat16, in PyTorch and in native code: against float64 and Python's integers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from native_cases import BACKENDS, NATIVE
from scalar import MASK, mix64
from torch import Tensor

from embtables import SGD, Adagrad, Adam, EmbeddingTables, RowWiseAdagrad, TableConfig, ops, plan
from embtables.ops.stochastic import random_bits, rounded
from embtables.optimizers import FusedOptimizer, averaged

pytestmark = pytest.mark.core

RULES: list[FusedOptimizer] = [
    SGD(lr=0.03125, l2=0.25),
    RowWiseAdagrad(lr=0.05, eps=1e-4),
    Adagrad(lr=0.05, clip_row_norm=2.0),
    Adam(lr=0.01),
]


def bits_of(step: int, width: int, row: int, column: int) -> int:
    """By the definition: four scalars of a weight share the 64 bits of a hash."""
    place = row * width + column
    hashed = mix64((mix64(mix64(step) ^ width) + place // 4) & MASK)
    return hashed >> 16 * (place % 4) & 0xFFFF


def neighbors(value: float) -> tuple[float, float]:
    """The greatest number of bfloat16 that is no greater, and the least that is no smaller."""
    exponent = max(math.frexp(value)[1] - 8, -133)
    below = math.ldexp(math.floor(math.ldexp(value, -exponent)), exponent)
    above = math.ldexp(math.ceil(math.ldexp(value, -exponent)), exponent)
    return below, above


@pytest.mark.parametrize("width", [1, 3, 16])
def test_random_bits_follow_from_the_step_and_the_place(width: int) -> None:
    rows, step = torch.tensor([0, 2, 7, 2**33]), 3
    expected = [[bits_of(step, width, row, column) for column in range(width)] for row in rows.tolist()]
    assert random_bits(torch.tensor(step), rows, width).tolist() == expected
    # Written down, so that nobody changes both sides at once.
    assert random_bits(torch.tensor(1), torch.tensor([0]), 4).tolist() == [[0x4BFE, 0x2944, 0x3145, 0x5E0E]]


def test_the_mean_is_the_number_and_no_result_is_farther_than_a_neighbor() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(40) * 10.0 ** generator.integers(-38, 38, 40)
    values = np.concatenate([values, [1.0 + 2.0**-9, -1.0 - 2.0**-8, 2.0 - 2.0**-20, 3e-39, -2e-40]]).astype(np.float32)
    draws = 4000
    random = random_bits(torch.tensor(5), torch.arange(draws), len(values))
    found = rounded(torch.from_numpy(values).expand(draws, -1).contiguous(), random).double().numpy()
    for value, column in zip(values.astype(np.float64), found.T):
        below, above = neighbors(float(value))
        assert set(column) <= {below, above}
        share = (value - below) / (above - below) if above > below else 0.0
        error = (above - below) * math.sqrt(share * (1 - share) / draws)
        # 16 bits say the probability to 2**-16 of a step.
        assert abs(column.mean() - value) <= 4 * error + (above - below) * 2**-16, value


def test_what_bfloat16_holds_stays() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-133, 3.3895e38, math.inf, -math.inf]).bfloat16().float()
    for step in range(50):
        random = random_bits(torch.tensor(step), torch.tensor([0]), len(exact))[0]
        found = rounded(exact, random)
        assert torch.equal(found.view(torch.int16), exact.bfloat16().view(torch.int16))
        nothing = torch.tensor([math.nan, 0.0]).view(torch.int32)
        nothing[1] = 0x7F800001  # a number of its own kind that is none, whose last bit alone says so
        assert rounded(nothing.view(torch.float32), random[:2]).isnan().all()


def updated(
    rule: FusedOptimizer, weight: Tensor, index: Tensor, grad: Tensor, step: int, backend: str, before: float = 0.25
) -> tuple[Tensor, list[Tensor]]:
    """The weight and state after a step; all of the state is ``before`` until then."""
    state = [torch.full((len(weight), columns), before) for columns in rule.state_widths(weight.shape[1])]
    weight = weight.clone()
    hyper = torch.tensor(rule.hyper_values(), dtype=torch.float64)
    with ops.using(backend):
        ops.update(weight, [*state, torch.tensor(step)], index, grad, hyper, rule.kind)
    return weight, state


def expected_row(rule: FusedOptimizer, row: np.ndarray, grad: np.ndarray, step: int) -> np.ndarray:
    """One row after a step, in float64; all of its state was 0.25."""
    if rule.clip_row_norm:
        grad = grad * min(1.0, rule.clip_row_norm / np.linalg.norm(grad))
    grad = grad + rule.l2 * row
    if isinstance(rule, RowWiseAdagrad):
        return row - rule.lr * grad / (math.sqrt(0.25 + (grad**2).mean()) + rule.eps)
    if isinstance(rule, Adagrad):
        return row - rule.lr * grad / (np.sqrt(0.25 + grad**2) + rule.eps)
    if isinstance(rule, Adam):
        first = (rule.beta1 * 0.25 + (1 - rule.beta1) * grad) / (1 - rule.beta1**step)
        second = (rule.beta2 * 0.25 + (1 - rule.beta2) * grad**2) / (1 - rule.beta2**step)
        return row - rule.lr * first / (np.sqrt(second) + rule.eps)
    return row - rule.lr * grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_updates_are_right_in_the_mean(rule: FusedOptimizer, backend: str) -> None:
    """Every row is the same, and so each is a draw of the same update."""
    draws, step = 4000, 3
    row, grad = torch.tensor([0.7, -1.25, 0.01, 3.0, -0.002]).bfloat16(), torch.tensor([0.3, -0.01, 1.0, -2.0, 0.125])
    weight, index = row.expand(draws, -1).contiguous(), torch.arange(draws)
    # Its occurrences are halves, summed in float32.
    halves = (grad / 2).expand(2 * draws, -1).contiguous()
    found, _ = updated(rule, weight, torch.cat([index, index]), halves, step, backend)
    expected = expected_row(rule, row.double().numpy(), grad.double().numpy(), step)
    for value, column in zip(expected, found.double().numpy().T):
        below, above = neighbors(float(value))
        assert set(column) == {below, above}
        share = (value - below) / (above - below)
        assert abs(column.mean() - value) <= 4 * (above - below) * math.sqrt(share * (1 - share) / draws)


@NATIVE
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 13, 16, 33, 64])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_native_code_rounds_as_pytorch(rule: FusedOptimizer, width: int) -> None:
    """To the bit, where both have the same numbers to round: sums of integers do not depend on their order."""
    generator = torch.Generator().manual_seed(width)
    weight = torch.randn(50, width, generator=generator).bfloat16()
    index, before = torch.randint(50, (120,), generator=generator), 0.25
    grad = torch.randint(-4, 5, (120, width), generator=generator).float()
    rule = dataclasses.replace(rule, clip_row_norm=0.0)
    if isinstance(rule, RowWiseAdagrad):
        # One divides the learning rate by the root, the other their product with the gradient: by a power of two here.
        rule, before = RowWiseAdagrad(lr=2.0**-6 + 2.0**-12, eps=0.0), 0.0
        index, grad = torch.randperm(50, generator=generator), grad[:50].sign() + (grad[:50] == 0)
    results = [updated(rule, weight, index, grad, 9, backend, before) for backend in ("reference", "native")]
    assert torch.equal(*(after.view(torch.int16) for after, _ in results))
    for states in zip(*(state for _, state in results)):
        assert torch.equal(*states)
    assert not torch.equal(results[0][0], weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_running_means_follow_what_rounding_took(rule: FusedOptimizer, backend: str) -> None:
    """mean − w after a step, from the rows as they were and as they are, in float64."""
    step, horizon, before, generator = 9, 4, 0.25, torch.Generator().manual_seed(0)
    weight = torch.randn(50, 13, generator=generator).bfloat16()
    index, grad = torch.randint(50, (30,), generator=generator), torch.randn(30, 13, generator=generator)
    after, state = updated(averaged(rule, horizon), weight, index, grad, step, backend, before)
    touched = torch.zeros(50, 1, dtype=torch.bool).index_fill_(0, index, True)
    # Since step 0.25, as the state says, up to the step before this one: a plain mean until step 4, then exponential.
    left = (1 + before) / (1 + horizon) * (horizon / (horizon + 1)) ** (step - 1 - horizon)
    moved = weight.double() - after.double()
    behind = torch.where(touched, horizon / (horizon + 1) * (left * before + moved), before)
    torch.testing.assert_close(state[-2].double(), behind, rtol=1e-5, atol=1e-6)
    assert torch.equal(state[-1], torch.where(touched, float(step), before))
    assert (moved != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 6, 16])
def test_what_is_not_finite_stays_in_its_row(width: int, backend: str) -> None:
    weight, grad = torch.ones(6, width).bfloat16(), torch.ones(6, width)
    grad[1], grad[2], grad[3], grad[4] = math.nan, math.inf, -math.inf, 3.4e38
    found, _ = updated(SGD(lr=1.0), weight, torch.arange(6), grad, 1, backend)
    assert found[1].isnan().all() and (found[2] == -math.inf).all() and (found[3] == math.inf).all()
    assert found[4].isfinite().all() or (found[4] == -math.inf).any()
    assert (found[[0, 5]] == 0).all()


def test_a_step_of_its_own_rounds_otherwise() -> None:
    weight, index, grad = torch.ones(64, 8).bfloat16(), torch.arange(64), torch.ones(64, 8)
    first, again, later = (updated(SGD(lr=2.0**-10), weight, index, grad, step, "reference")[0] for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, later)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_that_were_cast_are_rounded_to_nearest(backend: str) -> None:
    """Their gradients are in bfloat16 too: nothing says that they are trained in fp32."""
    tables = EmbeddingTables(plan([TableConfig("t", 8, 4)], "full", optimizer=SGD(lr=2.0**-10))).bfloat16()
    tables.store.slab("t").fill_(1.0)
    with ops.using(backend):
        for _ in range(20):
            tables(torch.arange(8).view(8, 1)).sum().backward()
    assert (tables.store.slab("t") == 1).all()
