"""Both ends of a job under a virtual clock: whatever is late, lost, doubled or overtaken, all apply the same bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from helpers.match import Match, Member
from helpers.replayed import Replay
from helpers.simulated import make_spec, peer_of, push_all, take
from helpers.virtual import World, session_for
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.errors import JobFailed, Refused
from torch_qgc.planner import make_plan
from torch_qgc.protocol import messages
from torch_qgc.protocol.contract import JobSpec

PLAN = make_plan([0.1, 0.3, 0.6], bits_per_coordinate=4, noise_ratio=1.0)  # unequal shares, unequal bits
K, NUMEL = 3, 512 + 300


def job_spec(**changes: Any) -> JobSpec:
    return make_spec(PLAN, **{"numel": NUMEL, "chunk_numel": 512, **changes})


def match_of(spec: JobSpec, **options: Any) -> Match:
    return Match(PLAN, spec, **options)


# --- any delays, latencies, rules, and what a network does ------------------------------------------------


@dataclass(frozen=True)
class Weather:
    """What a network does: chances, per message of the aggregator."""

    lost: float
    doubled: float
    latency_s: float


rules = st.fixed_dictionaries(
    {
        "deadline_s": st.sampled_from([None, 0.5, 1.0, 1.0]),
        "late": st.sampled_from(["fold", "drop"]),
        "warmup_steps": st.integers(0, 2),
        "quorum": st.integers(1, K),
        "max_staleness": st.integers(0, 3),
        "log_steps": st.integers(4, 12),
    }
)
weathers = st.builds(
    Weather, st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.3]), st.sampled_from([0.0, 0.1, 0.7])
)


def test_every_worker_applies_the_same_bytes_which_are_the_sums_of_what_was_sent() -> None:
    seen: Counter[str] = Counter()

    @given(rules, weathers, st.integers(0, 2**31), st.sampled_from([0, 3000, 1 << 20]), st.sampled_from([None, 0, 2]))
    @settings(max_examples=60, deadline=None)
    def play(rule: dict[str, Any], weather: Weather, seed: int, inbox_bytes: int, dies: int | None) -> None:
        rng, steps = np.random.default_rng(seed), 10
        dies_at = int(rng.integers(rule["warmup_steps"], steps))

        def down(frames: Sequence[Any]) -> list[float]:
            name = type(messages.decode_from_aggregator(frames[0])).__name__
            copies = 1 + (rng.random() < weather.doubled)
            if name in ("Result", "Started") and rng.random() < weather.lost:
                seen["lost"] += 1
                copies = 0
            return [float(rng.uniform(0, weather.latency_s)) for _ in range(copies)]

        def latency_s() -> float:
            return float(rng.uniform(0, weather.latency_s))

        match = match_of(job_spec(**rule), inbox_bytes=inbox_bytes, latency_s=latency_s, down=down)

        def work(member: Member) -> None:
            worker = member.worker
            match.world.sleep(float(rng.choice([0.0, 0.0, 1.7])))  # joined, but comes late
            while member.step < steps:
                if member.connection.closed(member.step):
                    seen["replayed"] += 1
                    match.take(member)
                    continue
                late = rng.random() < [0.05, 0.2, 0.5][worker]
                delay_s = float(rng.uniform(0, 0.4) + late * rng.exponential(2.0))
                if worker == dies and member.step == dies_at:
                    match.begin(member)
                    match.push(member, 0)  # and not chunk 1
                    match.world.net.disconnect(peer_of(worker))
                    return
                match.compute(member, delay_s)
            member.connection.close()

        for member in match.members:
            match.script(member, work)
        match.run()
        match.check(gone=[] if dies is None else [dies])
        seen["folded"] += match.world.aggregator.stats["folded"]
        seen["dropped"] += match.world.aggregator.stats["dropped"]
        seen["died"] += match.world.aggregator.stats["lost_workers"]
        replay = Replay(PLAN, match.spec.rule, chunks=range(match.spec.chunks), log_steps=match.spec.log_steps)
        assert len(replay(match.oracle.events)) == steps * match.spec.chunks
        times_s = [event.time_s for event in match.oracle.events]
        assert times_s == sorted(times_s)

    play()
    assert all(seen[name] > 0 for name in ("lost", "replayed", "folded", "dropped", "died")), seen


# --- one race each ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency_s", [0.0, 0.2])
@pytest.mark.parametrize("begins_s", [0.99, 1.0, 1.01])
def test_a_result_that_closes_the_step_just_when_a_late_worker_begins_it(begins_s: float, latency_s: float) -> None:
    """It computes for nothing, or for the next step if late payloads are folded; it is one step behind nobody."""
    match = match_of(job_spec(deadline_s=1.0), latency_s=latency_s)

    def prompt(member: Member) -> None:
        for _ in range(4):
            match.compute(member, 0.2)

    def late(member: Member) -> None:
        match.world.sleep(begins_s)
        while member.step < 4:
            if member.connection.closed(member.step):
                match.take(member)
            else:
                match.compute(member, 0.1)

    for member in match.members:
        match.script(member, late if member.worker == 2 else prompt)
    match.run()
    match.check()
    assert match.members[0].counts[0][0] == [1, 1, 0]
    assert match.members[0].counts[-1][0] == [1, 1, 1]


@pytest.mark.parametrize(("late", "then"), [("fold", [1, 1, 2]), ("drop", [1, 1, 1])])
def test_a_push_that_crosses_the_closing_on_its_way_is_folded_or_dropped(late: str, then: list[int]) -> None:
    match = match_of(job_spec(deadline_s=1.0, late=late, awaits="alive"), latency_s=0.2)

    def work(member: Member) -> None:
        match.compute(member, 1.1 if member.worker == 2 else 0.1)  # sent before the result comes, too late there
        match.compute(member, 0.1)

    for member in match.members:
        match.script(member, work)
    match.run()
    match.check()
    assert match.members[2].counts == [{0: [1, 1, 0], 1: [1, 1, 0]}, {0: then, 1: then}]
    assert match.members[2].computed == [0, 1]


def test_chunks_of_a_payload_may_fall_on_either_side_of_a_closing() -> None:
    match = match_of(job_spec(deadline_s=1.0, late="fold"))

    def work(member: Member) -> None:
        match.begin(member)
        match.push(member, 0)
        match.world.sleep(1.1 if member.worker == 2 else 0.0)
        match.push(member, 1)
        match.take(member)
        match.compute(member, 0.2 if member.worker == 2 else 0.8)

    for member in match.members:
        match.script(member, work)
    match.run()
    match.check()
    assert match.members[0].counts == [{0: [1, 1, 1], 1: [1, 1, 0]}, {0: [1, 1, 1], 1: [1, 1, 2]}]


def test_a_worker_that_joins_while_a_round_is_under_way_is_in_it() -> None:
    match = match_of(job_spec(deadline_s=1.0))

    def late(member: Member) -> None:
        match.world.sleep(0.5)
        member.connection.join(math.inf)
        assert not member.connection.closed(0)
        match.compute(member, 0.2)

    for member in match.members[:2]:
        match.script(member, lambda m: match.compute(m, 0.1))
    match.world.start(lambda: late(match.members[2]))
    match.run()
    match.check()
    assert match.members[0].counts[0][0] == [1, 1, 1]


def test_a_worker_that_never_joins_is_given_up_after_the_join_timeout_and_all_are_told() -> None:
    match = match_of(job_spec(deadline_s=None, join_timeout_s=5.0))
    for member in match.members[:2]:
        match.script(member, lambda m: match.compute(m, 0.1))
    match.run()
    match.check(gone=[2])
    assert 5.0 < match.world.now() < 7.0
    assert [member.connection.session.gone for member in match.members[:2]] == [{2: "lost"}, {2: "lost"}]
    assert match.world.aggregator.stats["lost_workers"] == 1


def test_a_worker_lost_between_begin_and_push_is_waited_for_no_longer() -> None:
    match = match_of(job_spec(deadline_s=None))

    def vanish(member: Member) -> None:
        match.begin(member)
        match.push(member, 0)
        match.world.sleep(1.0)
        match.world.net.disconnect(peer_of(2))

    for member in match.members:
        match.script(member, vanish if member.worker == 2 else lambda m: match.compute(m, 0.1))
    match.run()
    match.check(gone=[2])
    assert match.members[0].counts[0] == {0: [1, 1, 1], 1: [1, 1, 0]}  # what it had sent stays


@pytest.mark.parametrize("ahead", [True, False], ids=["others are ahead", "others go on"])
def test_a_worker_that_leaves_before_the_others_ends_the_job_by_name(ahead: bool) -> None:
    match = match_of(job_spec(deadline_s=1.0), latency_s=0.1)
    told: list[str] = []

    def go_on(member: Member) -> None:
        while True:
            match.compute(member, 0.1 if ahead else 2.0)

    def work(member: Member) -> None:
        match.compute(member, 0.1)
        if member.worker == 2:
            match.world.sleep(5.0 if ahead else 0.0)
            member.connection.close()
            return
        with pytest.raises(JobFailed, match=r"worker 2 has left its loop at step 1, but .* step \d") as error:
            go_on(member)
        told.append(str(error.value))

    for member in match.members:
        match.script(member, work)
    match.world.run()
    assert len(told) == 2


def test_workers_that_leave_at_the_same_step_are_compared_before_they_go() -> None:
    match = match_of(job_spec(deadline_s=1.0), latency_s=0.1)

    def work(member: Member) -> None:
        match.compute(member, 0.1)
        match.world.sleep(float(member.worker))
        member.connection.send_hash(1, {"parameters": "same"})
        member.connection.say_goodbye(1, 60.0)
        assert member.connection.session.agreed_step == 1
        member.connection.close()

    for member in match.members:
        match.script(member, work)
    match.world.run()
    assert match.world.aggregator.failed is None


def test_what_was_lost_on_the_way_is_asked_for_until_it_is_there() -> None:
    lost = Counter[str]()

    def down(frames: Sequence[Any]) -> list[float]:
        name = type(messages.decode_from_aggregator(frames[0])).__name__
        lost[name] += 1
        return [] if name == "Result" and lost["Result"] % 5 else [0.0]

    match = match_of(job_spec(deadline_s=1.0), down=down)

    def work(member: Member) -> None:
        for _ in range(3):
            match.compute(member, 0.1)

    for member in match.members:
        match.script(member, work)
    match.run()
    match.check()


def test_a_step_can_be_awaited_without_taking_part_and_its_clock_is_known() -> None:
    match = match_of(job_spec(deadline_s=1.0, late="drop"), latency_s=0.1)
    waited = []

    def watch(member: Member) -> None:
        assert member.connection.elapsed_s(0) is None
        waited.append(member.connection.wait_closed(0, 0.5))
        waited.append(member.connection.elapsed_s(0))
        waited.append(member.connection.wait_closed(0, 5.0))
        match.take(member)
        assert member.connection.elapsed_s(0) is None

    for member in match.members:
        match.script(member, watch if member.worker == 2 else lambda m: match.compute(m, 0.2))
    match.run()
    match.check()
    assert waited[0] is False
    assert waited[1] == pytest.approx(0.5 - 0.2)  # told 0.1 s after it began, which was 0.1 s after it was said
    assert waited[2] is True


# --- the edges of a job -----------------------------------------------------------------------------------


def test_replicas_compare_their_parameters_and_the_odd_one_out_ends_the_job_by_name() -> None:
    match = match_of(job_spec(deadline_s=None))
    told = []

    def work(member: Member) -> None:
        for digest in ("same", "same", "odd one" if member.worker == 1 else "same"):
            member.connection.send_hash(member.step, {"parameters": digest})
            match.compute(member, 0.1)

    def run(member: Member) -> None:
        with pytest.raises(
            JobFailed, match=r"replicas differ before step 2 \(.*before step 1\): parameters: workers \[1\] odd one"
        ):
            work(member)
        told.append(member.worker)

    for member in match.members:
        match.script(member, run)
    match.world.run()
    assert sorted(told) == [0, 1, 2]


def test_a_hash_of_parameters_that_nobody_can_have_is_rejected() -> None:
    match = match_of(job_spec(deadline_s=None))

    def work(member: Member) -> None:
        member.connection.send_hash(1, {"parameters": "early"})
        match.compute(member, 0.1)

    for member in match.members:
        match.script(member, work)
    match.run()
    match.check()
    assert all("has not closed yet" in m.connection.session.rejections[0] for m in match.members)


def test_a_worker_that_comes_back_after_its_results_are_forgotten_is_refused_with_the_remedy() -> None:
    match = match_of(job_spec(deadline_s=1.0, log_steps=4))

    def vanish(member: Member) -> None:
        match.world.net.disconnect(peer_of(2))
        match.world.sleep(20.0)
        again = match.world.connect(peer_of(2, b"again"), session_for(match.spec, PLAN, 2))
        with pytest.raises(
            Refused, match=r"needs the results from step 0 on, the log starts at \d+: load a checkpoint"
        ):
            again.join(math.inf)

    def work(member: Member) -> None:
        while match.world.now() < 30.0:
            match.compute(member, 1.0)
        member.connection.close()

    for member in match.members:
        match.script(member, vanish if member.worker == 2 else work)
    match.run()


def test_who_gets_no_answer_is_told_what_to_look_at() -> None:
    world = World()
    connection = world.connect(peer_of(1), session_for(job_spec(), PLAN, 1))

    def work() -> None:
        with pytest.raises(
            JobFailed, match=r"no answer from the aggregator at virtual within 7 s.*has worker 0 joined"
        ):
            connection.join(7.0)

    world.start(work)
    world.run()
    assert world.now() == pytest.approx(7.0, abs=0.5)


def test_an_aggregator_that_says_nothing_is_given_up_but_a_suspended_worker_blames_nobody() -> None:
    session = session_for(job_spec(), PLAN, 1, silence_s=30.0)
    for time_s in (0.0, 1000.0, 2000.0):  # three seconds in which somebody could have listened
        session.tick(time_s)
    assert session.error is None
    session.receive(0, [messages.encode_message(messages.Ping())], 2000.0)
    for seconds in range(30):
        session.tick(2000.5 + seconds)
    assert session.error is None
    for seconds in range(30, 33):
        session.tick(2000.5 + seconds)
    assert isinstance(session.error, JobFailed)
    assert "nothing heard from the aggregator at virtual" in str(session.error)


def test_a_job_begins_where_its_checkpoint_was_taken() -> None:
    """From step 1,000 on, with a log of 8: who has not joined yet is not taken for somebody a thousand steps behind."""
    spec = job_spec(first_step=1000, deadline_s=1.0, log_steps=8)
    aggregator = Aggregator()
    world = World(aggregator)
    counts: list[list[int]] = []

    def work(worker: int) -> None:
        connection = world.connect(peer_of(worker), session_for(spec, PLAN, worker, first_step=1000))
        connection.join(math.inf)
        for step in range(1000, 1003):
            connection.begin(step)
            push_all(connection, PLAN, step, torch.ones(NUMEL))
            take(connection, lambda result: counts.append(result.counts.tolist()))

    for worker in range(2):  # and worker 2 does not come
        world.start(lambda worker=worker: work(worker))
    world.run(stop=lambda: world.now() > 100.0)
    assert counts == [[1, 1, 0]] * (2 * 3 * 2)
    early = session_for(spec, PLAN, 2, first_step=999)
    for _, frames in early.drain():
        aggregator.receive(peer_of(2, b"early"), frames(), world.now())
    ((_, answer),) = [(peer, frames) for peer, frames in aggregator.drain() if peer == peer_of(2, b"early")]
    assert isinstance(messages.decode_from_aggregator(answer[0]), messages.Refusal)
