"""Messages that are well formed and mean harm: nothing escapes, nothing grows, and the job of the others goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections import Counter
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.oracle import Oracle
from helpers.simulated import make_spec, peer_of, simple_plan
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from torch_qgc.aggregator import lobby
from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.errors import ProtocolError
from torch_qgc.job.events import Event
from torch_qgc.kernels import derive_key, encode, payload_bytes
from torch_qgc.logs import logger
from torch_qgc.planner import Plan, make_plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import JobSpec
from torch_qgc.protocol.pieces import LEAST_PIECE_BYTES
from torch_qgc.protocol.transport import Peer

K, STEPS = 3, 4
PLAN = make_plan([0.1, 0.2, 0.3], bits_per_coordinate=4)
SPEC = make_spec(
    PLAN, numel=700, chunk_numel=512, deadline_s=1.0, late="fold", max_staleness=2, log_steps=8, replan_every=50
)
BITS = int(PLAN.bits[2])
HOSTILE, NOT_IN = peer_of(2), [peer_of(1, b"another"), peer_of(7)]  # these are not in

# --- what can be said -------------------------------------------------------------------------------------

edges = st.sampled_from([0, 1, 2, 3, 4, 7, 511, 512, 2**31 - 1, 2**53 - 1])
floats = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 1e308])
small = st.integers(0, 5) | edges
spans_s = floats | st.floats(0, 1e9) | st.sampled_from([0.0, 5e-324, 1e9])
texts = st.text(max_size=20) | st.sampled_from(["%s %d", "\U0001f600" * 8192, "x" * 8192])


def rest_of(chunk: int) -> st.SearchStrategy[list[bytes]]:
    """Payload frames of a push: of the right size with anything in it, or too few, too many, too long, too short."""
    numel = SPEC.chunk_span(chunk % SPEC.chunks)[1]
    size = payload_bytes(numel, BITS)
    right = st.integers(0, 99).map(lambda seed: [np.random.default_rng(seed).bytes(size)])
    return right | st.lists(st.binary(max_size=40), max_size=3)


@st.composite
def pushes(draw: st.DrawFn) -> list[bytes]:
    chunk = draw(st.integers(0, 1) | edges)
    bits = draw(st.just(BITS) | st.integers(0, 40))
    header = messages.Push(draw(st.integers(0, 1) | edges), chunk, bits, draw(floats), draw(floats), draw(spans_s))
    return [messages.encode_message(header), *draw(rest_of(chunk))]


specs = st.builds(
    lambda changes: msgspec.structs.replace(SPEC, **changes),
    st.fixed_dictionaries(
        {},
        optional={
            "workers": st.integers(0, 9000),
            "numel": edges | st.just(2**52),
            "chunk_numel": edges | st.sampled_from([1024, 1 << 26]),
            "layout_digest": texts,
            "plan_digest": texts,
            "first_step": edges,
            "seed": st.integers(-(2**63), 2**64 - 1),
            "aggregators": edges,
            "downlink_bits": st.integers(0, 40),
            "verify_every": edges,
            "replan_every": edges,
            "control_variates": st.booleans(),
            "most_batch": floats,
            "log_steps": edges,
            "log_bytes": edges | st.just(2**52),
            "join_timeout_s": floats,
        },
    ),
)


@st.composite
def plans(draw: st.DrawFn) -> bytes:
    """The plan of the job as JSON, with a field or two that somebody has changed."""
    values = json.loads(PLAN.to_json())
    anything = st.recursive(
        st.none() | st.booleans() | st.integers(-3, 10) | st.just(2**70) | floats | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=6,
    )
    for name in draw(st.sets(st.sampled_from(sorted(values)), max_size=2)):
        value = values[name]
        if isinstance(value, list) and value and draw(st.booleans()):
            value[draw(st.integers(0, len(value) - 1))] = draw(anything)
        elif isinstance(value, dict) and draw(st.booleans()):
            value[draw(st.sampled_from(sorted(value)))] = draw(anything | st.lists(st.integers(-1, 5), max_size=5))
        elif draw(st.booleans()):
            values[name] = draw(anything)
        else:
            del values[name]
    return json.dumps(values).encode()


OTHERS = [make_plan([0.1, 0.2], bits_per_coordinate=4), make_plan([0.5, 0.2, 0.3], bits_per_coordinate=6)]


@st.composite
def replans(draw: st.DrawFn) -> list[bytes]:
    """Tell of a new plan: this job's or another's, changed or not, from any step on."""
    plan = plans() | st.sampled_from([PLAN, *OTHERS]).map(lambda made: made.to_json().encode())
    header = messages.Replan(draw(st.integers(1, 3) | edges), draw(small), draw(st.none() | spans_s))
    return [messages.encode_message(header), *draw(st.lists(plan, max_size=2) | plan.map(lambda one: [one]))]


@st.composite
def begins(draw: st.DrawFn, plan: st.SearchStrategy[int]) -> list[bytes]:
    warm = draw(st.floats(1e-12, 1.0) | floats)
    batch = draw(st.floats(0, 1e6) | floats)
    return without_rest(messages.Begin(draw(small), draw(st.booleans()), batch, draw(spans_s), warm, draw(plan)))


@st.composite
def hellos(draw: st.DrawFn, plan: st.SearchStrategy[bytes]) -> list[bytes]:
    spec, worker = draw(specs), draw(st.integers(0, 3) | edges)
    hello = messages.Hello(
        version=draw(st.sampled_from([messages.PROTOCOL_VERSION] * 3 + [99])),
        worker=worker,
        step=draw(edges),
        spec=spec,
    )
    return [messages.encode_message(hello), *draw(st.lists(plan, max_size=1 if worker else 2))]


def without_rest(header: messages.FromWorker) -> list[bytes]:
    return [messages.encode_message(header)]


def delivery(step: int, staleness: int, chunk: int, seed: int) -> list[bytes]:
    """A push as it should be, of random bytes, for the step that is open or one that was."""
    size = payload_bytes(SPEC.chunk_span(chunk)[1], BITS)
    header = messages.Push(max(step - staleness, 0), chunk, BITS, 0.0, 0.0)
    return [messages.encode_message(header), np.random.default_rng(seed).bytes(size)]


@st.composite
def gathers(draw: st.DrawFn) -> list[bytes]:
    """A piece of content for all, of a size that it may have, or of another."""
    piece, pieces = (
        draw(st.integers(0, 2) | edges.filter(lambda n: n < 65_535)),
        draw(st.sampled_from([1, 2, 3, 65_535])),
    )
    size = draw(st.sampled_from([1, 100, LEAST_PIECE_BYTES, LEAST_PIECE_BYTES + 1]))
    header = messages.Gather(draw(st.integers(0, 1) | edges), piece, pieces)
    return [messages.encode_message(header), *([b"x" * size] * draw(st.sampled_from([1, 1, 1, 0, 2])))]


takes = st.builds(messages.Take, small, small, small.filter(lambda n: n < 65_535)).map(without_rest)
parts = st.dictionaries(st.text(max_size=128), st.text(max_size=256), max_size=4)
harmless = st.one_of(
    pushes(),
    pushes(),
    hellos(plans() | st.just(b"{}")),
    begins(st.just(0)),
    replans(),
    gathers(),
    takes,
    st.builds(messages.Fetch, small, st.integers(0, 1) | edges).map(without_rest),
    st.builds(messages.Hash, st.integers(5, 9) | edges, parts).map(without_rest),
)
deliveries = st.builds(lambda *args: lambda step: delivery(step, *args), st.integers(0, 3), st.integers(0, 1), edges)
endings = st.one_of(
    begins(edges),
    st.builds(messages.Bye, small).map(without_rest),
    st.builds(messages.Mark, st.integers(0, 3), small, st.integers(0, 2)).map(without_rest),
    st.builds(messages.Fault, small, texts).map(without_rest),
    st.builds(messages.Hash, st.integers(0, 4), parts).map(without_rest),
)

# --- the others, and what they get ------------------------------------------------------------------------


class Honest:
    """Two workers that talk to an aggregator by hand, and everything it has sent them."""

    def __init__(self) -> None:
        self.pushed: Any = None
        self.payloads: dict[tuple[int, int, int], Any] = {}
        self.oracle = Oracle(PLAN, SPEC, lambda *key: self.payloads[key])
        self.aggregator = Aggregator(trace=self._trace)
        self.got: dict[Peer, list[Any]] = {peer_of(k): [] for k in range(2)}
        self.now = 0.0
        self.sent: dict[Peer, int] = {}  # messages to others since the last look

    def _trace(self, event: Event) -> None:
        if event.name == "arrive":
            assert event.worker is not None
            assert event.step is not None
            assert event.chunk is not None
            self.payloads[event.worker, event.step, event.chunk] = self.pushed
        if self.aggregator.job is None or self.aggregator.job.spec == SPEC:
            self.oracle(event)

    def say(self, peer: Peer, frames: list[Any]) -> None:
        self.pushed = frames[-1]
        self.aggregator.receive(peer, frames, self.now)
        self.look()

    def look(self) -> None:
        self.aggregator.tick(self.now)
        for peer, frames in self.aggregator.drain():
            message = messages.decode_from_aggregator(memoryview(frames[0]))
            if peer in self.got:
                self.got[peer].append((message, [bytes(frame) for frame in frames[1:]]))
            self.sent[peer] = self.sent.get(peer, 0) + 1
        assert not self.aggregator.drain()

    def join(self) -> None:
        for worker in range(2):
            hello = messages.Hello(version=messages.PROTOCOL_VERSION, worker=worker, step=0, spec=SPEC)
            self.say(peer_of(worker), [messages.encode_message(hello), *([PLAN.to_json().encode()] * (worker == 0))])

    def step(self, step: int) -> None:
        """Both begin and push; the deadline passes."""
        for worker in range(2):
            self.say(peer_of(worker), without_rest(messages.Begin(step)))
        for worker in range(2):
            for chunk in range(SPEC.chunks):
                offset, numel = SPEC.chunk_span(chunk)
                values = torch.arange(numel, dtype=torch.float32).sin() + worker
                bits, key = int(PLAN.bits[worker]), derive_key(0, step, worker)
                encoded = encode(values, bits, key=key, offset=offset)
                header = messages.encode_message(messages.Push(step, chunk, bits, 0.0, 0.0))
                self.say(peer_of(worker), [header, bytes(encoded.to_buffer())])
        self.now += 1.5
        self.look()

    def results(self, worker: int) -> list[Any]:
        return [entry for entry in self.got[peer_of(worker)] if isinstance(entry[0], messages.Result)]


def alone() -> list[Any]:
    """What worker 0 gets when nobody does harm: worker 2 has joined, and says nothing."""
    honest = Honest()
    honest.join()
    honest.say(HOSTILE, hello_of_worker_2())
    for step in range(STEPS):
        honest.step(step)
    return honest.results(0)


def hello_of_worker_2() -> list[bytes]:
    hello = messages.Hello(version=messages.PROTOCOL_VERSION, worker=2, step=0, spec=SPEC)
    return [messages.encode_message(hello)]


def assert_bounded(aggregator: Aggregator) -> None:
    job = aggregator.job
    if job is None:
        return
    assert not job.outbox
    assert len(job.log._frames) <= job.log.capacity
    assert len(job.rounds.began_at_s) <= 1
    assert len(job._agreement._stated) <= 64
    assert len(job._agreement._loops) <= 64
    assert len(job._gathering._open) <= job.spec.workers
    assert len(job._gathering._kept) <= 64
    assert len(job.courses.changes) == 0  # what is told of plans changes none: aggregator 0 makes them
    assert len(job._temperatures) <= 2
    assert job._planning is not None
    assert len(job._planning._stopwatch._running) <= job.spec.workers
    for open_round in job.rounds._open.values():
        assert len(open_round.payloads) <= job.spec.workers * (1 + job.spec.rule.max_staleness)


def was_decoded(frames: list[bytes]) -> bool:
    try:
        messages.decode_from_worker(frames[0])
    except ProtocolError:
        return False
    return True


# --- laws -------------------------------------------------------------------------------------------------


def test_connections_that_are_not_in_change_no_byte_of_what_the_members_get() -> None:
    expected = alone()
    seen: Counter[str] = Counter()

    @given(st.lists(st.tuples(st.sampled_from(NOT_IN), harmless | endings), min_size=1, max_size=STEPS * 3))
    @settings(max_examples=80, deadline=None)
    def attack(attacks: list[tuple[Peer, list[bytes]]]) -> None:
        honest = Honest()
        honest.join()
        honest.say(HOSTILE, hello_of_worker_2())
        for step in range(STEPS):
            for peer, frames in attacks[step::STEPS]:
                count(seen, frames)
                honest.sent.clear()
                honest.say(peer, frames)
                assert sum(honest.sent.get(p, 0) for p in NOT_IN) <= 1  # one word, one answer
                assert_bounded(honest.aggregator)
            honest.step(step)
        for peer in NOT_IN:
            honest.aggregator.lost(peer, honest.now)
        assert honest.results(0) == expected
        assert honest.results(1) == expected
        assert honest.aggregator.failed is None

    attack()
    assert seen["past the decoder"] > seen["stopped by the decoder"], seen


def test_a_member_that_means_harm_can_only_send_its_own_gradient() -> None:
    """Rounds close as ever, the results are the sums of what was taken, and memory stays within its bounds."""
    seen: Counter[str] = Counter()

    @given(st.lists(harmless | deliveries, min_size=1, max_size=STEPS * 4), st.floats(0, 0.4))
    @settings(max_examples=80, deadline=None)
    def attack(attacks: list[Any], passed_s: float) -> None:
        honest = Honest()
        honest.join()
        honest.say(HOSTILE, hello_of_worker_2())
        for step in range(STEPS):
            for said in attacks[step::STEPS]:
                frames = said(step) if callable(said) else said
                count(seen, frames)
                honest.sent.clear()
                honest.say(HOSTILE, frames)
                assert honest.sent.get(HOSTILE, 0) <= 1 + SPEC.chunks
                assert_bounded(honest.aggregator)
                honest.now += passed_s / len(attacks)
            honest.step(step)
        assert honest.aggregator.failed is None
        first, second = honest.results(0), honest.results(1)
        assert first == second
        assert sorted((m.step, m.chunk) for m, _ in first) == [(s, c) for s in range(STEPS) for c in range(SPEC.chunks)]
        for message, (payload,) in first:
            counts = honest.oracle.counts[message.step, message.chunk]
            assert list(message.contributions) == counts
            assert counts[:2] == [1, 1]
            seen["with its payload" if counts[2] else "untouched"] += 1
            assert_is(np.frombuffer(payload, dtype=np.float32), honest.oracle.expected[message.step, message.chunk])

    attack()
    assert seen["past the decoder"] > seen["stopped by the decoder"], seen
    assert min(seen["with its payload"], seen["untouched"]) > 10, seen


def test_before_the_job_nothing_escapes_and_the_lobby_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lobby, "MOST_WAITING", 3)
    seen: Counter[str] = Counter()
    peers = [peer_of(n % 4, b"connection %d" % n) for n in range(6)]

    @given(st.lists(st.tuples(st.sampled_from(peers), hellos(plans()) | harmless | endings), min_size=1, max_size=12))
    @settings(max_examples=100, deadline=None)
    def attack(attacks: list[tuple[Peer, list[bytes]]]) -> None:
        honest = Honest()
        for peer, frames in attacks:
            count(seen, frames)
            honest.say(peer, frames)
            honest.now += 0.3
            assert len(honest.aggregator._lobby._waiting) <= 3
            assert_bounded(honest.aggregator)
        for peer in peers:
            honest.aggregator.lost(peer, honest.now)
        honest.look()
        if honest.aggregator.failed is not None:  # before or in the job: whoever has a worker's key may say so
            seen["failed"] += 1
        elif honest.aggregator.job is None:  # nobody has announced a job that can be
            honest.join()
            honest.step(0)
            assert len(honest.results(0)) == SPEC.chunks
            seen["jobs after it"] += 1

    attack()
    assert seen["past the decoder"] > seen["stopped by the decoder"], seen
    assert min(seen["jobs after it"], seen["failed"]) > 10, seen


def test_endings_that_a_member_may_announce_reach_all_and_nothing_escapes_after_them() -> None:
    @given(st.lists(harmless | endings, min_size=1, max_size=10))
    @settings(max_examples=100, deadline=None)
    def attack(attacks: list[list[bytes]]) -> None:
        honest = Honest()
        honest.join()
        honest.say(HOSTILE, hello_of_worker_2())
        for frames in attacks:
            honest.say(HOSTILE, frames)
            assert_bounded(honest.aggregator)
        failed = [any(isinstance(m, messages.Failed) for m, _ in honest.got[peer_of(k)]) for k in range(2)]
        assert failed == [honest.aggregator.failed is not None] * 2

    attack()


def assert_is(got: np.ndarray, expected: np.ndarray) -> None:
    """Up to the rounding of three fp32 sums, where random bytes are numbers that fp32 can hold."""
    with np.errstate(all="ignore"):
        sound = np.abs(expected) < 1e30
    if sound.any():
        np.testing.assert_allclose(got[sound], expected[sound], rtol=1e-5, atol=1e-5 * np.abs(expected[sound]).max())


def count(seen: Counter[str], frames: list[bytes]) -> None:
    where = "past the decoder" if was_decoded(frames) else "stopped by the decoder"
    seen[where] += 1
    event(where)


@given(plan=plans())
@example(plan=b'{"format":3}')
@example(plan=b"[" * 100_000)
@example(plan=PLAN.to_json().replace('"unbiased"', '"\\ud800"').encode())  # a text that UTF-8 cannot say
@settings(max_examples=100, deadline=None)
def test_any_plan_is_answered(plan: bytes) -> None:
    aggregator = Aggregator()
    try:
        digest = Plan.from_json(plan).digest()
    except ValueError:
        digest = SPEC.plan_digest
    spec = msgspec.structs.replace(SPEC, plan_digest=digest)
    hello = messages.Hello(version=messages.PROTOCOL_VERSION, worker=0, step=0, spec=spec)
    aggregator.receive(peer_of(0), [messages.encode_message(hello), plan], 0.0)
    ((_, frames),) = aggregator.drain()
    answer = messages.decode_from_aggregator(frames[0])
    event(type(answer).__name__)
    assert isinstance(answer, messages.Welcome | messages.Refusal)


@pytest.mark.parametrize("text", ["x" * 20_000, "\U0001f600" * 20_000, "a\udc80b"])
def test_any_text_of_an_error_fits_into_a_message(text: str) -> None:
    """Four bytes a character, or half a surrogate, as file names have them: the fault must be heard all the same."""
    said = messages.as_text(text)
    assert said[:1] == text[:1]
    fault = messages.encode_message(messages.Fault(0, said))
    assert messages.decode_from_worker(fault) == messages.Fault(0, said)
    failed = messages.encode_message(messages.Failed(said))
    assert messages.decode_from_aggregator(failed) == messages.Failed(said)


# --- examples that once went wrong --------------------------------------------------------------------------


def announce(spec: JobSpec, plan: Plan, index: int = 0) -> tuple[Aggregator, messages.FromAggregator]:
    aggregator = Aggregator(index, spec.aggregators)
    hello = messages.Hello(version=messages.PROTOCOL_VERSION, worker=0, step=0, spec=spec)
    aggregator.receive(peer_of(0), [messages.encode_message(hello), plan.to_json().encode()], 0.0)
    ((_, frames),) = aggregator.drain()
    return aggregator, messages.decode_from_aggregator(frames[0])


def with_rule(spec: JobSpec, **changes: Any) -> JobSpec:
    """Change a rule as another program could: without the check that ClosingRule makes."""
    rule = msgspec.structs.replace(spec.rule)
    for name, value in changes.items():
        msgspec.structs.force_setattr(rule, name, value)
    return msgspec.structs.replace(spec, rule=rule)


@pytest.mark.parametrize("deadline_s", [0.0, math.nan, math.inf, -1.0])
def test_a_deadline_that_is_none_is_refused(deadline_s: float) -> None:
    plan = simple_plan(2)
    _, answer = announce(with_rule(make_spec(plan), deadline_s=deadline_s), plan)
    assert isinstance(answer, messages.Rejected)
    assert "deadline_s" in answer.text


@pytest.mark.parametrize(
    "changes",
    [
        {"numel": 2**52, "chunk_numel": 1, "log_bytes": 2**52},
        {"numel": 2**31 - 1},
        {"numel": 2**31 - 1, "log_bytes": 2**52},
        {"numel": 2**33},
        {"chunk_numel": 1},
        {"numel": 10**7, "chunk_numel": 1},
        {"numel": 10**7, "chunk_numel": 1, "log_bytes": 2**52},
        {"downlink_bits": 20},
        {"join_timeout_s": math.inf},
        {"seed": -1},
        {"log_steps": 0},
        {"numel": 1_530_000, "chunk_numel": 1 << 20, "aggregators": 4},
    ],
)
def test_a_job_that_cannot_be_is_refused_before_anything_is_built(changes: dict[str, Any]) -> None:
    plan = simple_plan(2)
    aggregator, answer = announce(make_spec(plan, **changes), plan)
    assert isinstance(answer, messages.Refusal | messages.Rejected)
    assert "expected" in answer.text.lower()
    assert aggregator.job is None


def test_two_tracks_that_are_no_multiples_are_refused() -> None:
    plan = dataclasses.replace(simple_plan(2), second_track="lmmse")
    aggregator, answer = announce(make_spec(plan), plan)
    assert isinstance(answer, messages.Refusal)
    assert aggregator.job is None


@pytest.mark.parametrize("step", [1, 2**53 - 1])
def test_a_worker_that_claims_results_of_steps_that_have_not_closed_is_refused(step: int) -> None:
    """It would be awaited, and could never send: without a deadline the job would stand still."""
    honest = Honest()
    honest.join()
    hello = messages.Hello(version=messages.PROTOCOL_VERSION, worker=2, step=step, spec=SPEC)
    honest.aggregator.receive(HOSTILE, [messages.encode_message(hello)], 0.0)
    ((_, frames),) = honest.aggregator.drain()
    answer = messages.decode_from_aggregator(frames[0])
    assert isinstance(answer, messages.Refusal)
    assert "has not closed yet" in answer.text
    honest.say(HOSTILE, hello_of_worker_2())
    assert honest.aggregator._lobby.peer_of(2) == HOSTILE


# --- a million --------------------------------------------------------------------------------------------

NUMBERS = [0, 1, 2, 3, 4, 7, 255, 256, 2**31 - 1, 2**31, 2**53 - 1, 2**53, 2**63 - 1, -1, 0.0, 0.5, 1e9, 1e300, -1e-9]
NUMBERS += [math.inf, -math.inf, math.nan]
OTHER_TYPES = [None, True, False, "", "x" * 200, "lost", [], [0], {}, {"a": "b"}, b"", b"\x00" * 8]


def real_messages() -> list[list[Any]]:
    """One of each message that a worker sends, as it should be: a map, and the frames after it."""
    payload = delivery(0, 0, 0, 0)[1]
    said: list[tuple[messages.FromWorker, list[bytes]]] = [
        (messages.decode_from_worker(hello_of_worker_2()[0]), []),
        (messages.Begin(0), []),
        (messages.Push(0, 0, BITS, 0.0, 0.0), [payload]),
        (messages.Push(0, 1, BITS, 0.0, 0.0), [delivery(0, 0, 1, 0)[1]]),
        (messages.Fetch(0, 0), []),
        (messages.Hash(1, {"parameters": "same"}), []),
        (messages.Mark(0, 1, 0), []),
        (messages.Gather(0, 0, 1), [b"content"]),
        (messages.Take(0, 0, 0), []),
        (messages.Replan(1, 5, 0.5), [OTHERS[1].to_json().encode()]),
        (messages.Fault(0, "broken", "name"), []),
        (messages.Bye(0), []),
    ]
    return [[msgspec.msgpack.decode(messages.encode_message(header)), *rest] for header, rest in said]


def mutated(real: list[Any], step: int, rng: random.Random) -> list[bytes]:
    """A real message of the step that is open, of which some fields, and sometimes the frames, are others."""
    header, *rest = copy.deepcopy(real)
    places = [header]  # maps in maps: the specification in a Hello, the rule in that
    for value in header.values():
        if isinstance(value, dict) and rng.random() < 0.8:
            places.append(value)
            places += [inner for inner in value.values() if isinstance(inner, dict)]
    if "step" in header:
        header["step"] = max(step - rng.choice([0, 0, 0, 1, 2]), 0)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        place = rng.choice(places)
        name = rng.choice(sorted(place))
        if name != "type" or rng.random() < 0.05:
            place[name] = rng.choice(NUMBERS if rng.random() < 0.7 else OTHER_TYPES)
    if rng.random() < 0.1:
        rest = rng.choice([[], [*rest, b"x"], [b""], [frame[:-1] for frame in rest], [rng.randbytes(64)]])
    encoded = msgspec.msgpack.encode(header)
    if rng.random() < 0.02:
        at = rng.randrange(len(encoded))
        encoded = encoded[:at] + rng.randbytes(1) + encoded[at + 1 :]
    return [encoded, *rest]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_million_mutations_of_real_messages_let_nothing_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a member, from another process with a member's key, and from one that is none of the job's workers.

    The others' results are the sums of what was taken, and memory stays within its bounds, until somebody announces an
    end; then the next job begins.
    """
    monkeypatch.setattr(logger, "disabled", True)
    rng, real, left, jobs = random.Random(7), real_messages(), 1_000_000, 0
    seen: Counter[str] = Counter()
    while left > 0:
        honest = Honest()
        honest.join()
        honest.say(HOSTILE, hello_of_worker_2())
        jobs += 1
        for step in range(50):
            for _ in range(20):
                frames = mutated(rng.choice(real), step, rng)
                peer = rng.choice([HOSTILE, HOSTILE, *NOT_IN])
                seen["past the decoder" if was_decoded(frames) else "stopped by the decoder"] += 1
                honest.say(peer, frames)
                left -= 1
            assert_bounded(honest.aggregator)
            if honest.aggregator.failed is not None or honest.aggregator.job is None:
                break
            honest.step(step)
            for message, (payload,) in honest.results(0)[-SPEC.chunks :]:
                assert_is(np.frombuffer(payload, dtype=np.float32), honest.oracle.expected[message.step, message.chunk])
        assert honest.results(0) == honest.results(1)
    assert jobs > 1_000
    assert min(seen["past the decoder"], seen["stopped by the decoder"]) > 100_000, seen
