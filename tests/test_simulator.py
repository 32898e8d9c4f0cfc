"""The simulator's steps: unbiased, as noisy as `residual` says, on time, and the optimizer's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.simulation import DEADLINE_S, FEATURES, SAMPLES, decoded_gradients, delays_for, partition_gradients, task
from test_aggregator import assert_mean_is
from test_schemes_codes import ALL, LATE
from test_schemes_error import payloads

from torch_qgc import schemes
from torch_qgc.ddp.sampler import CodedSampler, random_partitions
from torch_qgc.errors import PlanError
from torch_qgc.kernels import decode_sum, derive_key, encode
from torch_qgc.planner import Plan, make_plan
from torch_qgc.simulator import IDEAL, coding, noise_ratio, simulate
from torch_qgc.simulator.arrivals import Contribution


def exact_variance(plan: Plan, sent: np.ndarray) -> np.ndarray:
    """[K] what the codec's rounding of these payloads [K, width] really adds, in units of their energy."""
    ratios = []
    for worker, values in enumerate(sent):
        bits = int(plan.bits[worker])
        if bits == 0 or plan.shares[worker] == 0:
            ratios.append(0.0)
            continue
        encoded = encode(torch.tensor(values, dtype=torch.float32), bits, key=(1, 2), norm=plan.norm)
        ratios.append(encoded.variance / encoded.squared_norm)
    return np.array(ratios)


def assert_mean_within_four_errors(values: np.ndarray, expected: float) -> None:
    assert values.mean() == pytest.approx(expected, abs=4 * values.std(ddof=1) / np.sqrt(len(values)))


# ----------------------------------------------------------------------------------- against the equations
@pytest.mark.parametrize(
    ("name", "norm"),
    [("qgc", "max"), ("qgc", "l2"), ("osgc", "max"), ("is_sgd unbiased", "l2"), ("sgc heterogeneous", "max")],
)
def test_decoding_is_unbiased(name: str, norm: str) -> None:
    decoded, _ = decoded_gradients(ALL[name](LATE, seed=1, norm=norm), steps=150)
    assert_mean_is(decoded, partition_gradients(6).mean(axis=0))


@pytest.mark.parametrize(
    ("name", "norm"),
    [*((name, "max") for name in ALL), *((name, "l2") for name in ("qgc", "one_bit_sgc", "ye_abbe"))],
)
def test_the_error_of_a_step_is_the_residual(name: str, norm: str) -> None:
    plan = ALL[name](LATE, seed=1, norm=norm)
    gradients = partition_gradients(6)
    variance = exact_variance(plan, payloads(plan, gradients))
    _, trace = decoded_gradients(plan, steps=90)
    assert_mean_within_four_errors(trace.residual[0], schemes.residual(plan, gradients=gradients, variance=variance))
    # Given who arrived only rounding is left to chance, so this is the sharper test.
    known = schemes.residual(plan, masks=trace.arrivals[0], gradients=gradients, variance=variance)
    assert trace.residual[0].mean() == pytest.approx(known, rel=0.15)


def test_the_error_of_sliced_codes_is_the_sum_over_slices() -> None:
    scheme = schemes.block_coordinate(LATE)
    gradients = partition_gradients(6)
    _, trace = decoded_gradients(scheme, steps=200)
    cuts = np.round(np.cumsum(scheme.fractions)[:-1] * gradients.shape[1]).astype(int)
    error = 0.0
    for plan, part in zip(scheme.plans, np.split(gradients, cuts, axis=1)):
        variance = exact_variance(plan, payloads(plan, part))
        error += schemes.residual(plan, gradients=part, variance=variance) * np.sum(part.mean(axis=0) ** 2)
    assert_mean_within_four_errors(trace.residual[0], error / np.sum(gradients.mean(axis=0) ** 2))


@pytest.mark.parametrize("acknowledged", [False, True])
def test_error_feedback_settles_where_its_moments_say(acknowledged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 300
    scheme = schemes.error_feedback(schemes.is_sgd(LATE, bits_per_coordinate=3), acknowledged=acknowledged)
    worker_of = {derive_key(0, step, k): k for step in range(steps) for k in range(6)}
    lost, energy = np.zeros(6), np.zeros(6)

    def watched(values: torch.Tensor, bits: int, **options: Any) -> Any:
        encoded = encode(values, bits, **options)
        lost[worker_of[options["key"]]] += encoded.variance
        energy[worker_of[options["key"]]] += encoded.squared_norm
        return encoded

    monkeypatch.setattr(coding, "encode", watched)
    _, trace = decoded_gradients(scheme, steps=steps)
    expected = schemes.residual(scheme, gradients=partition_gradients(6), variance=lost / energy)
    settled = trace.residual[0, 60:].reshape(24, 10).mean(axis=1)  # memories correlate neighbouring steps
    assert_mean_within_four_errors(settled, expected)


def test_nothing_is_lost_when_all_are_waited_for() -> None:
    model, loss, dataset = task()
    trace = simulate(model, loss, dataset, IDEAL, delays=delays_for(LATE), deadline_s=DEADLINE_S, steps=30, lr=0.01)
    assert trace.arrivals.all()
    assert np.all(trace.residual < 1e-12)
    plain = torch.nn.Linear(FEATURES, 1)
    plain.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    for step in range(30):
        value = loss(plain, dataset.tensors)
        assert trace.loss[0, step] == pytest.approx(value.item(), rel=1e-5)  # partitions are added in another order
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def test_partitions_of_unequal_sizes_count_by_their_sizes() -> None:
    """Data that cannot move: what is waited for is the gradient of all samples, not of all partitions alike."""
    model, loss, dataset = task()
    blocks = [list(range(30)), list(range(30, 50)), list(range(50, 60))]
    plan = make_plan([0.1] * 3, placement=np.eye(3, dtype=bool), partition_sizes=[30, 20, 10])
    traces = simulate(
        model,
        loss,
        dataset,
        {"plan": plan, "ideal": IDEAL},
        partitions=blocks,
        delays=np.ones((1, 3)),
        steps=3,
        lr=0.01,
    )
    for trace in traces.values():
        assert trace.loss[0, 0] == pytest.approx(loss(model, dataset.tensors).item(), rel=1e-5)
    assert np.all(traces["ideal"].residual < 1e-12)


# ------------------------------------------------------------------------------------------ the virtual clock
def test_workers_are_late_as_often_as_the_delay_model_says() -> None:
    _, trace = decoded_gradients(schemes.is_sgd(LATE), steps=300)
    late = np.array(LATE)
    spread = 4 * np.sqrt(late * (1 - late) / 300)
    np.testing.assert_array_less(np.abs(trace.arrivals[0].mean(axis=0) - (1 - late)), spread)


def test_a_step_ends_with_the_last_arrival_or_at_the_deadline() -> None:
    delays = np.array([[0.5, 1.5, 0.2], [0.5, 3.0, 0.2], [0.1, 0.1, 0.1]])
    plan = make_plan([0.1] * 3)
    _, trace = decoded_gradients(plan, steps=4, delays=delays)
    np.testing.assert_allclose(trace.virtual_time_s[0], [1.5, 3.5, 3.6, 5.1])
    assert trace.arrivals[0].tolist() == [[True] * 3, [True, False, True], [True] * 3, [True] * 3]
    each = 8 * (4 + 64 * 4)  # one block of 4 bits, also of who is late
    assert trace.total_bits[0].tolist() == [3 * each, 6 * each, 9 * each, 12 * each]


def test_schemes_of_a_run_see_the_same_delays() -> None:
    model, loss, dataset = task()
    named = {"a": schemes.is_sgd(LATE), "b": schemes.sgc(LATE), "ideal": IDEAL}
    traces = simulate(
        model, loss, dataset, named, delays=delays_for(LATE), deadline_s=DEADLINE_S, steps=20, lr=0.01, runs=2
    )
    np.testing.assert_array_equal(traces["a"].arrivals, traces["b"].arrivals)
    assert np.all(np.diff(traces["ideal"].virtual_time_s - traces["a"].virtual_time_s) > -1e-9)


# ----------------------------------------------------------------------------------------------- batches
def test_batches_are_those_of_the_coded_sampler() -> None:
    """With one worker that is never late the decoded gradient is that of the sampler's batch."""
    model, loss, dataset = task()
    plan = make_plan([0.0], bits_per_coordinate=32, num_partitions=3)
    decoded, _ = decoded_gradients(plan, steps=4, batch_size=20, delays=np.ones((1, 1)), seed=7)
    blocks = random_partitions(SAMPLES, 3, 7)
    sampler = CodedSampler(plan.partition_probabilities(0), blocks, batch_size=20, batches=3, seed=7, worker=0)
    batches = list(sampler)
    sampler.set_epoch(1)
    for step, indices in enumerate([*batches, next(iter(sampler))]):
        found = torch.autograd.grad(loss(model, dataset[indices]), list(model.parameters())[::-1])
        expected = torch.cat([g.reshape(-1) for g in found]).numpy()
        np.testing.assert_allclose(decoded[step], expected, rtol=1e-5, atol=1e-5)


def test_batches_are_unbiased_and_measured_against_the_true_gradient() -> None:
    decoded, trace = decoded_gradients(schemes.qgc(LATE), steps=300, batch_size=2, exact_every=50)
    true = partition_gradients(6).mean(axis=0)
    assert_mean_is(decoded, true)
    measured = np.flatnonzero(np.isfinite(trace.residual[0]))
    assert measured.tolist() == list(range(0, 300, 50))
    errors = np.sum((decoded[measured] - true) ** 2, axis=1) / np.sum(true**2)
    np.testing.assert_allclose(trace.residual[0, measured], errors, rtol=1e-3)


def test_codes_that_subtract_take_batches_per_partition() -> None:
    cyclic = schemes.cyclic(LATE, stragglers=2, bits_per_coordinate=32)
    with pytest.raises(PlanError, match=r"weights: expected entries >= 0.*sampling='partition'"):
        decoded_gradients(cyclic, steps=2, batch_size=2)
    decoded, trace = decoded_gradients(
        cyclic, steps=150, batch_size=3, sampling="partition", delays=np.full((1, 6), 0.5)
    )
    assert np.all(trace.residual < 1e-6)  # all are in: exactly the mean of the batches' gradients
    assert_mean_is(decoded, partition_gradients(6).mean(axis=0))


def test_the_noise_ratio_is_the_variance_of_batches() -> None:
    model, loss, dataset = task()
    measured = noise_ratio(model, loss, dataset, batch_size=5, batches=800)
    singles = []
    for i in range(SAMPLES):
        found = torch.autograd.grad(loss(model, [t[i : i + 1] for t in dataset.tensors]), list(model.parameters()))
        singles.append(torch.cat([g.reshape(-1) for g in found]))
    rows = torch.stack(singles).double()
    mean = rows.mean(dim=0)
    # A batch of b out of n without replacement: variance (1/b) (n - b) / (n - 1) of one sample's.
    spread = (rows - mean).square().sum(dim=1).mean() / 5 * (SAMPLES - 5) / (SAMPLES - 1)
    assert measured == pytest.approx(float(spread / mean.square().sum()), rel=0.1)


def test_micro_batches_and_collate_change_nothing() -> None:
    model, loss, dataset = task()
    common: dict[str, Any] = dict(delays=delays_for(LATE), deadline_s=DEADLINE_S, steps=5, lr=0.01)
    whole = simulate(model, loss, dataset, make_plan(LATE), **common)
    listed = [dataset[i] for i in range(len(dataset))]
    cut = simulate(model, loss, listed, make_plan(LATE), micro_batch=3, **common)
    np.testing.assert_allclose(cut.loss, whole.loss, rtol=1e-5)


def test_frozen_unused_and_half_precision_parameters_and_buffers_are_taken() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Sequential(
                torch.nn.Linear(FEATURES, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.2)
            )
            self.head = torch.nn.Linear(4, 1).to(torch.bfloat16)
            self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
            self.unused = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.frozen(self.body(x)).to(torch.bfloat16)).float()

    _, loss, dataset = task()
    torch.manual_seed(0)
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace = simulate(
        model, loss, dataset, schemes.is_sgd(LATE), delays=delays_for(LATE), deadline_s=DEADLINE_S, steps=30, lr=0.02
    )
    assert trace.loss[0, -1] < 0.8 * trace.loss[0, 0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])  # the user's model is not touched


# -------------------------------------------------------------------------------------------- optimizers
def test_adam_squares_the_second_track() -> None:
    """Two steps by hand, from the gradients that each track decodes to."""
    plan = make_plan(LATE, second_track="ridge")
    shrink = 1.0 / (1.0 + plan.residual_bound)
    first, _ = decoded_gradients(plan, steps=1, seed=3)
    model, loss, dataset = task()
    kept: list[torch.Tensor] = []

    def evaluate(m: torch.nn.Module) -> dict[str, float]:
        kept.append(torch.cat([p.detach().reshape(-1) for p in reversed(list(m.parameters()))]))
        return {}

    simulate(
        model,
        loss,
        dataset,
        plan,
        delays=delays_for(LATE),
        deadline_s=DEADLINE_S,
        steps=1,
        optimizer="adam",
        lr=0.1,
        evaluate=evaluate,
        seed=3,
    )
    # After one step m / (1 - b1) = g1 and sqrt(v / (1 - b2)) = |g2| = shrink |g1|.
    expected = -0.1 * first[0] / (shrink * np.abs(first[0]) + 1e-8)
    np.testing.assert_allclose(kept[1].double().numpy(), expected, rtol=1e-4)


def test_a_second_track_of_its_own_is_decoded_with_its_coefficients() -> None:
    """No job trains with lmmse, whose second track is no multiple of the first; the simulator does."""
    plan = make_plan(LATE[:3], second_track="lmmse")
    codec = coding.SchemeCodec(plan, 700, seed=0)
    rows = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    payloads = {(k, 5): codec.encode(k, 5, rows[k], delivered=True) for k in range(3)}
    tracks = [torch.zeros(700), torch.zeros(700)]
    codec.decode([Contribution(k, 5, 1) for k in (0, 2)], payloads, None, tracks, step=5)
    arrived = np.array([1, 0, 1])
    second = plan.second_coefficients(arrived)
    assert second is not None
    for track, coefficients in zip(tracks, (plan.coefficients(arrived), second)):
        sent = [payloads[k, 5][0] for k in (0, 2)]
        expected = torch.zeros(700)
        decode_sum(sent, coefficients[[0, 2]].tolist(), expected, accumulate=False)
        assert torch.equal(track, expected)
    assert not torch.allclose(tracks[1] / tracks[0], tracks[1][0] / tracks[0][0])


def test_a_schedule_and_clipping_reach_the_update() -> None:
    model, loss, dataset = task()
    moves: list[torch.Tensor] = []

    def evaluate(m: torch.nn.Module) -> dict[str, float]:
        moves.append(torch.cat([p.detach().reshape(-1) for p in m.parameters()]))
        return {"norm": float(moves[-1].norm())}

    trace = simulate(
        model,
        loss,
        dataset,
        IDEAL,
        delays=delays_for(LATE),
        steps=3,
        lr=lambda step: 0.1 / (step + 1),
        max_grad_norm=0.5,
        evaluate=evaluate,
        evaluate_every=1,
    )
    lengths = [float((b - a).norm()) for a, b in zip(moves, moves[1:])]
    np.testing.assert_allclose(lengths, [0.05, 0.025, 0.05 / 3], rtol=1e-4)  # the gradient is far longer than 0.5
    assert trace.evaluation_steps.tolist() == [0, 1, 2, 3]
    assert trace.evaluations["norm"].shape == (1, 4)
