"""The aggregator under a virtual clock: unbiased, bounded, and deaf to bad messages."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from helpers.simulated import Job, make_spec, peer_of, simple_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.aggregator.decoder import RoundDecoder
from torch_qgc.aggregator.lobby import TAKEN_S
from torch_qgc.job.courses import Courses
from torch_qgc.job.events import Event
from torch_qgc.job.rounds import Closing
from torch_qgc.kernels import derive_key, encode
from torch_qgc.kernels.buffers import Payload
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.transport import Peer

# Unequal in every respect: lateness, bits (chosen by the planner), and gradients.
PROBS = [0.05, 0.2, 0.35, 0.6]


def unequal_plan(**options: Any) -> Plan:
    return make_plan(PROBS, **{"bits_per_coordinate": 4, "noise_ratio": 1.0, **options})


def gradients(workers: int, numel: int = 512, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(workers, numel, generator=generator)


def assert_mean_is(runs: np.ndarray, expected: np.ndarray, slack: float = 0.0) -> None:
    """runs [R, n]: their mean is the expected one within 4 standard errors, along it and fixed random directions."""
    signs = np.random.default_rng(99).choice([-1.0, 1.0], size=(8, expected.size))
    directions = (
        np.concatenate([expected[None], signs])
        / np.linalg.norm(np.concatenate([expected[None], signs]), axis=1)[:, None]
    )
    for direction in directions:
        projected = runs @ direction
        error = projected.std(ddof=1) / np.sqrt(len(runs))
        assert abs(projected.mean() - expected @ direction) < 4 * error + slack * np.linalg.norm(expected)


def test_decoding_is_unbiased_when_workers_are_late() -> None:
    """Monte Carlo over rounds: independent arrivals with unequal p_k and b_k, coefficients from the plan's p."""
    plan = unequal_plan()
    assert len(set(plan.bits.tolist())) > 1
    g = gradients(4)
    rng = np.random.default_rng(0)
    runs = []
    for seed in range(2):
        spec = make_spec(plan, seed=seed)
        job = Job(plan, spec, g, lambda k, step: 2.0 if rng.random() < PROBS[k] else 0.5, abandon=True)
        job.run(800)
        runs.append(torch.stack(job.decoded).double().numpy())
    true = (torch.tensor(plan.shares) @ g.double()).numpy()
    assert_mean_is(np.concatenate(runs), true)


class Sleeper:
    """Delays: workers 0-2 are late in 3 % of their steps; worker 3 sleeps six steps long in half of those it starts."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, worker: int, step: int) -> float:
        usual = self.rng.uniform(0.5, 0.9)
        if worker == 3:
            return usual + 6.0 * (self.rng.random() < 0.5)
        return usual + 0.6 * (self.rng.random() < 0.03)


@pytest.mark.parametrize("late", ["drop", "fold"])
def test_the_time_average_is_unbiased_when_a_worker_misses_several_steps_at_a_time(late: str) -> None:
    plan = make_plan([0.03, 0.03, 0.03, 0.5], bits_per_coordinate=4, noise_ratio=1.0)
    g = gradients(4)
    means, rate = [], []
    for seed in range(2):
        job = Job(plan, make_spec(plan, late=late, seed=seed, max_staleness=64), g, Sleeper(seed))
        job.run(1200)
        learned = torch.stack(job.decoded[200:]).double()  # the prior p = .5 is unlearned by then
        means += [stretch.mean(0).numpy() for stretch in learned.chunk(4)]
        rate.append(np.mean(job.contributions, axis=0)[3])
    true = (torch.tensor(plan.shares) @ g.double()).numpy()
    # At the end of a stretch up to one gap of the sleeper (some 7 rounds of 250) has not been paid out yet.
    assert_mean_is(np.array(means), true, slack=8 / 250)
    assert np.mean(rate) < 0.5  # it did miss rounds, many more than 1 - p says
    if late == "fold":
        assert job.aggregator.stats["folded"] > 0
        assert job.aggregator.stats["dropped"] == 0


def test_control_variates_leave_the_time_average_unbiased_and_make_rounds_steadier() -> None:
    plan = make_plan([0.1] * 4, bits_per_coordinate=8, noise_ratio=1.0)
    g = gradients(4)
    true = (torch.tensor(plan.shares) @ g.double()).numpy()
    spread = {}
    for variates in (False, True):
        rng = np.random.default_rng(0)
        spec = make_spec(plan, late="fold", control_variates=variates, max_staleness=64)
        job = Job(
            plan, spec, g, lambda k, step, rng=rng: 0.5 + 4.0 * (rng.random() < 0.1)
        )  # anybody pauses now and then
        job.run(800)
        decoded = torch.stack(job.decoded[100:]).double().numpy()
        assert_mean_is(np.stack([part.mean(0) for part in np.array_split(decoded, 10)]), true, slack=8 / 70)
        spread[variates] = np.mean(np.sum((decoded - true) ** 2, axis=1))
    assert spread[True] < 0.3 * spread[False]


def test_the_largest_weight_of_annealed_is_spread_as_the_shares_of_the_dead_are() -> None:
    plan = make_plan([0.5] * 4, bits_per_coordinate=32, decoder="annealed")
    closing: Any = Closing(
        5,
        0,
        [(k, 5, Payload(np.ones(512, dtype=np.float32), 512, 32)) for k in range(3)],
        np.array([1, 1, 1, 0]),
        np.array([1.0, 0.5, 0.2, 1.0]) * 0.75,  # worker 3 is dead
        np.array([True, True, True, False]),
        False,
        0.0,
    )
    spec = make_spec(plan)
    for temperature in (1.0, 0.5, 1e-12):
        frames = RoundDecoder(spec, Courses(spec.rule, plan)).decode(closing, temperature).frames
        weight = sum(0.25 * min(1 / r, 1 / temperature) for r in (1.0, 0.5, 0.2)) / 0.75
        np.testing.assert_allclose(np.frombuffer(frames[1], dtype=np.float32), weight, rtol=1e-6)


def test_folding_keeps_what_a_late_worker_computed() -> None:
    plan = make_plan([0.03, 0.03, 0.03, 0.5], bits_per_coordinate=4)
    rates = {}
    for late in ("drop", "fold"):
        job = Job(plan, make_spec(plan, late=late), gradients(4), Sleeper(1))
        job.run(300)
        rates[late] = np.mean(job.contributions, axis=0)[3]
    assert rates["fold"] > 1.5 * rates["drop"]


def test_two_tracks_are_decoded_from_the_same_payloads() -> None:
    plan = unequal_plan(second_track="hajek")
    rng = np.random.default_rng(4)
    job = Job(plan, make_spec(plan), gradients(4), lambda k, step: 2.0 if rng.random() < PROBS[k] else 0.5)
    job.run(60)
    for counts, first, second in zip(job.contributions, job.decoded, job.second):
        if counts.sum() > 0 and not torch.equal(first, second):
            ratio = (first / second)[second != 0]
            assert ratio.std() < 1e-3 * ratio.abs().mean()  # Hajek rescales the whole round
    assert len(job.second) == 60


@pytest.mark.parametrize("bits", [4, 8])
def test_the_downlink_codec_is_unbiased(bits: int) -> None:
    plan = simple_plan(2, bits_per_coordinate=32)
    g = gradients(2)
    job = Job(plan, make_spec(plan, downlink_bits=bits, deadline_s=None), g, lambda k, step: 0.5)
    job.run(400)
    assert_mean_is(torch.stack(job.decoded).double().numpy(), (torch.tensor(plan.shares) @ g.double()).numpy())


def test_without_deadline_and_quantization_the_result_is_the_weighted_mean() -> None:
    plan = simple_plan(3, bits_per_coordinate=32)
    g = gradients(3, numel=1300)
    job = Job(plan, make_spec(plan, deadline_s=None, numel=1300), g, lambda k, step: 0.5 + k)
    job.run(5)
    for decoded in job.decoded:
        torch.testing.assert_close(decoded, g.mean(0), rtol=1e-6, atol=1e-6)  # three fp32 additions


@pytest.mark.parametrize(("awaits", "step_s"), [("alive", 1.0), ("begun", 0.3)])
def test_a_step_closes_at_the_deadline_or_sooner_and_not_at_the_straggler(awaits: str, step_s: float) -> None:
    plan = simple_plan(3)
    spec = make_spec(plan, deadline_s=1.0, awaits=awaits, late="fold", max_staleness=20)
    job = Job(plan, spec, gradients(3), lambda k, step: 5.0 if k == 2 else 0.3)
    job.run(60)
    # The straggler's last step may end 5 s after the others'; one step waits for it until the deadline.
    assert 60 * step_s <= job.net.now() <= 60 * step_s + 6.0  # waiting would have taken 300 s
    assert job.computed[2] <= job.net.now() / 5.0
    assert job.aggregator.stats["dropped"] == 0


def test_warm_up_and_quorum_extend_the_deadline() -> None:
    plan = simple_plan(4)
    spec = make_spec(plan, warmup_steps=3, quorum=3)
    job = Job(plan, spec, gradients(4), lambda k, step: 4.0 if k >= 2 else 0.3)
    job.run(10)
    assert [counts.tolist() for counts in job.contributions[:3]] == [[1, 1, 1, 1]] * 3
    assert all((counts > 0).sum() >= 3 for counts in job.contributions)
    assert job.aggregator.stats["extended"] > 0


def test_a_dead_worker_is_not_waited_for_and_its_share_is_spread() -> None:
    plan = simple_plan(3, bits_per_coordinate=32)
    g = gradients(3)
    spec = make_spec(plan, deadline_s=None)
    job = Job(plan, spec, g, lambda k, step: float("inf") if k == 2 and step == 3 else 0.5)
    job.net.at(10.0, lambda: job.net.disconnect(peer_of(2)))
    job.run(8, stop=lambda: min(job.steps[:2]) >= 8)
    torch.testing.assert_close(job.decoded[2], g.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(job.decoded[7], g[:2].mean(0), rtol=1e-6, atol=1e-6)
    assert job.aggregator.stats["lost_workers"] == 1
    assert job.net.now() < 20


def test_non_finite_gradients_travel_as_such() -> None:
    plan = simple_plan(2)
    g = gradients(2, numel=1024)
    g[1, 700] = float("inf")
    job = Job(plan, make_spec(plan, numel=1024, chunk_numel=1024), g, lambda k, step: 0.5)
    job.run(2)
    assert torch.isfinite(job.decoded[0][:512]).all()
    assert job.decoded[0][512:].isnan().all()


# --- memory ---------------------------------------------------------------------------------------------


class Held:
    """What a running job keeps, sampled at every step that closes: bytes and counts, whatever the process uses."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.payloads = 0  # that have arrived, are not dropped, and wait for their round to close
        self.most: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        if event.name == "arrive":
            self.payloads += event.detail["fate"] != "dropped"
        if event.name == "close":
            self.payloads -= int(event.detail["counts"].sum())
            self.sample()

    def sample(self) -> None:
        assert self.job is not None
        running, aggregator = self.job.aggregator.job, self.job.aggregator
        assert running is not None
        sessions = self.job.world.sessions.values()
        held = {
            "payloads": self.payloads,
            "rounds with a clock": len(running.rounds.began_at_s),
            "steps apart": running.rounds.newest - running.rounds.oldest,
            "log bytes": running.log.bytes,
            "messages to workers": len(aggregator._outbox) + len(running.outbox),
            "messages to the aggregator": max(session.unheard for session in sessions),
            "bytes ahead": max(session.inbox.held_bytes for session in sessions),
        }
        self.most = {name: max(number, self.most.get(name, 0)) for name, number in held.items()}


def payloads_in_memory() -> int:
    gc.collect()
    return sum(type(each) is Payload for each in gc.get_objects())


@pytest.mark.parametrize("late", ["drop", "fold"])
def test_what_a_job_keeps_is_bounded_however_long_it_runs(late: str) -> None:
    """300 steps with a late worker: the log, open rounds and inboxes hold their bounds, closed rounds are forgotten."""
    plan = simple_plan(2, bits_per_coordinate=2)
    numel, chunks, log_steps, ahead = 2048, 2, 16, 3
    spec = make_spec(plan, numel=numel, chunk_numel=numel // chunks, log_bytes=log_steps * 4 * numel, late=late)
    before, held = payloads_in_memory(), Held()
    delay = lambda k, step: 9.5 if k == 1 and step % 7 == 0 else 0.5  # noqa: E731
    held.job = job = Job(plan, spec, gradients(2, numel), delay, trace=held, inbox_bytes=ahead * 4 * numel)
    job.run(300)
    assert job.aggregator.job is not None
    assert job.aggregator.job.log.capacity == log_steps
    most = held.most
    assert most["log bytes"] <= spec.log_bytes + log_steps * chunks * 128  # headers, less than a step together
    assert most["log bytes"] >= spec.log_bytes  # it was full
    # One for the step at hand from each worker, and folded ones that the late worker had finished before.
    assert most["payloads"] <= chunks * (2 + 1)
    assert most["rounds with a clock"] <= 2
    assert most["steps apart"] <= 1
    assert most["bytes ahead"] <= ahead * 4 * numel
    assert most["bytes ahead"] > (ahead - 1) * 4 * numel  # the late worker's inbox was full
    assert most["messages to workers"] <= chunks * 2 * 2
    assert most["messages to the aggregator"] <= chunks + 1
    assert payloads_in_memory() - before <= chunks * 2


def test_a_worker_about_to_fall_off_the_log_is_waited_for() -> None:
    plan = simple_plan(2)
    job = Job(plan, make_spec(plan, log_steps=8), gradients(2), lambda k, step: 60.0 if k == 1 and step == 2 else 0.5)
    ahead = []

    def watch() -> None:
        ahead.append(job.steps[0] - 2)

    job.net.at(50.0, watch)
    job.run(30)
    assert 4 <= ahead[0] <= 8  # it stopped within the log, and both came to the end


# --- bad input ------------------------------------------------------------------------------------------


class Talk:
    """Say single messages to an aggregator and see its answers."""

    def __init__(self, plan: Plan, spec: JobSpec) -> None:
        self.aggregator, self.plan, self.spec = Aggregator(), plan, spec

    def say(self, peer: Peer, message: messages.FromWorker | bytes, *rest: Any) -> list[messages.FromAggregator]:
        header = message if isinstance(message, bytes) else messages.encode_message(message)
        self.aggregator.receive(peer, [header, *rest], now=0.0)
        return self.told(peer)

    def told(self, peer: Peer) -> list[messages.FromAggregator]:
        return [messages.decode_from_aggregator(f[0]) for p, f in self.aggregator.drain() if p == peer]

    def join(self, worker: int, peer: Peer | None = None, **changes: Any) -> list[messages.FromAggregator]:
        spec = make_spec(self.plan, **changes) if changes else self.spec
        hello = messages.Hello(version=messages.PROTOCOL_VERSION, worker=worker, step=0, spec=spec)
        return self.say(peer or peer_of(worker), hello, *([self.plan.to_json().encode()] if worker == 0 else []))

    def push(
        self, worker: int, step: int = 0, chunk: int = 0, bits: int = 4, cut: int = 0
    ) -> list[messages.FromAggregator]:
        encoded = encode(torch.randn(512), bits, key=derive_key(0, step, worker))
        payload = bytes(encoded.to_buffer())
        return self.say(peer_of(worker), messages.Push(step, chunk, bits, 0.0, 0.0), payload[: len(payload) - cut])


@pytest.fixture
def talk() -> Talk:
    plan = simple_plan(3)
    talk = Talk(plan, make_spec(plan))
    assert isinstance(talk.join(0)[0], messages.Welcome)
    assert isinstance(talk.join(1)[0], messages.Welcome)
    return talk


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"workers": 4}, "world size"),
        ({"layout_digest": "another"}, "same model"),
        ({"plan_digest": "another"}, "same plan"),
        ({"deadline_s": 2.0}, "same arguments"),
        ({"seed": 5}, "same seed"),
    ],
)
def test_a_worker_of_another_job_is_refused_by_name(talk: Talk, changes: dict[str, Any], named: str) -> None:
    (answer,) = talk.join(2, **changes)
    assert isinstance(answer, messages.Refusal)
    assert named in answer.text
    assert next(iter(changes)) in answer.text
    assert isinstance(talk.join(2)[0], messages.Welcome)  # the job goes on


def test_an_aggregator_that_is_told_what_the_job_is_hears_it_from_no_worker() -> None:
    plan = simple_plan(2)
    talk = Talk(plan, make_spec(plan))
    talk.aggregator = Aggregator(told=True)
    assert talk.join(1) == []
    assert talk.join(0, seed=5) == []  # a job of its own
    talk.aggregator.announce(talk.spec, plan, now=0.0)
    answers = {peer: messages.decode_from_aggregator(frames[0]) for peer, frames in talk.aggregator.drain()}
    assert isinstance(answers[peer_of(1)], messages.Welcome)
    assert isinstance(answers[peer_of(0)], messages.Refusal)
    assert isinstance(talk.join(0)[0], messages.Welcome)


def test_workers_may_come_before_worker_zero() -> None:
    plan = simple_plan(4)
    talk = Talk(plan, make_spec(plan))
    for worker in (3, 1, 2):
        assert talk.join(worker) == []
    hello = messages.Hello(version=messages.PROTOCOL_VERSION, worker=0, step=0, spec=talk.spec)
    talk.aggregator.receive(peer_of(0), [messages.encode_message(hello), plan.to_json().encode()], now=0.0)
    welcomed = {
        peer
        for peer, frames in talk.aggregator.drain()
        if isinstance(messages.decode_from_aggregator(frames[0]), messages.Welcome)
    }
    assert welcomed == {peer_of(k) for k in range(4)}


def test_a_second_process_with_a_workers_number_is_refused_after_a_while(talk: Talk) -> None:
    another = peer_of(1, b"another")
    assert talk.join(1, peer=another) == []  # the first one's end may not have been noticed yet
    talk.aggregator.tick(TAKEN_S - 1.0)
    assert talk.told(another) == []
    talk.aggregator.tick(TAKEN_S + 1.0)
    (answer,) = talk.told(another)
    assert isinstance(answer, messages.Refusal)
    assert "worker 1 is in this job from another process" in answer.text


def test_a_worker_that_was_started_again_comes_in_when_the_end_of_the_first_one_is_noticed(talk: Talk) -> None:
    another = peer_of(1, b"another")
    assert talk.join(1, peer=another) == []
    talk.aggregator.lost(peer_of(1), now=1.0)
    assert isinstance(talk.told(another)[0], messages.Welcome)
    assert talk.say(another, messages.Begin(0)) != [messages.Introduce()]


def test_a_worker_number_out_of_range_is_refused(talk: Talk) -> None:
    (answer,) = talk.join(3)
    assert isinstance(answer, messages.Refusal)
    assert "below 3, got 3" in answer.text


def test_another_protocol_version_is_refused(talk: Talk) -> None:
    hello = messages.Hello(version=99, worker=2, step=0, spec=talk.spec)
    (answer,) = talk.say(peer_of(2), hello)
    assert isinstance(answer, messages.Refusal)
    assert "same version of torch_qgc" in answer.text


def test_worker_zero_without_a_valid_plan_is_refused() -> None:
    plan = simple_plan(3)
    talk = Talk(plan, make_spec(plan))
    hello = messages.Hello(version=messages.PROTOCOL_VERSION, worker=0, step=0, spec=talk.spec)
    for rest in ([], [b"no json"], [b"{}"], [make_plan([0.1] * 4).to_json().encode()]):
        (answer,) = talk.say(peer_of(0), hello, *rest)
        assert isinstance(answer, messages.Refusal), rest
        assert "plan" in answer.text
    assert isinstance(talk.join(0)[0], messages.Welcome)


def test_a_log_too_small_for_the_model_is_refused_with_the_remedy() -> None:
    plan = simple_plan(3)
    (answer,) = Talk(plan, make_spec(plan, log_bytes=4096)).join(0)
    assert isinstance(answer, messages.Refusal)
    assert "log_bytes" in answer.text


def test_bad_payloads_are_rejected_and_counted(talk: Talk) -> None:
    cases = {
        "truncated": talk.push(0, cut=3),
        "bits": talk.push(0, bits=5),
        "cannot have begun": talk.push(0, step=1),
        "chunk": talk.push(0, chunk=1),
    }
    for word, answers in cases.items():
        (answer,) = answers
        assert isinstance(answer, messages.Rejected), word
        assert word in answer.text
        assert "expected" in answer.text or "cannot" in answer.text
    assert talk.push(0) == []
    assert talk.push(0) == []  # said again, as on a new connection: it is passed over
    assert talk.aggregator.stats["repeated"] == 1
    assert talk.aggregator.stats["bad_messages"] == 4


def test_beginning_a_step_of_the_future_is_rejected(talk: Talk) -> None:
    (answer,) = talk.say(peer_of(0), messages.Begin(7))
    assert isinstance(answer, messages.Rejected)


def test_a_new_connection_is_asked_to_introduce_itself(talk: Talk) -> None:
    (answer,) = talk.say(peer_of(1, b"another"), messages.Begin(0))
    assert isinstance(answer, messages.Introduce)


@given(data=st.binary(max_size=400), rest=st.lists(st.binary(max_size=100), max_size=3), member=st.booleans())
@settings(max_examples=300)
def test_garbage_never_crashes_the_aggregator(data: bytes, rest: list[bytes], member: bool) -> None:
    plan = simple_plan(2)
    talk = Talk(plan, make_spec(plan))
    talk.join(0)
    talk.join(1)
    talk.say(peer_of(0) if member else peer_of(1, b"another"), data, *rest)
    assert talk.aggregator.failed is None
    assert talk.push(0) == []  # the job goes on


# --- agreement ------------------------------------------------------------------------------------------


def test_replicas_that_differ_end_the_job_by_name(talk: Talk) -> None:
    talk.join(2)
    for worker, digest in enumerate(["aa", "aa", "bb"]):
        talk.aggregator.receive(
            peer_of(worker), [messages.encode_message(messages.Hash(0, {"parameters": digest}))], now=0.0
        )
    failures = [messages.decode_from_aggregator(frames[0]) for _, frames in talk.aggregator.drain()]
    assert len(failures) == 3
    assert all(isinstance(f, messages.Failed) and "[2]" in f.text and "step 0" in f.text for f in failures)


def test_a_fault_on_one_worker_reaches_all(talk: Talk) -> None:
    talk.join(2)
    talk.aggregator.receive(peer_of(1), [messages.encode_message(messages.Fault(4, "boom"))], now=0.0)
    told = {peer: messages.decode_from_aggregator(frames[0]) for peer, frames in talk.aggregator.drain()}
    assert set(told) == {peer_of(k) for k in range(3)}
    assert all("worker 1 failed at step 4: boom" in message.text for message in told.values())  # type: ignore[union-attr]
