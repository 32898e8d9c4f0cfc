"""Results on their way to workers whose queues may be full: each comes once, in order, and nothing is kept for it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from torch_qgc.aggregator.feed import Feed
from torch_qgc.job.log import ResultLog

K, STEPS, CHUNKS = 3, 12, 2


@given(st.data())
def test_every_worker_gets_every_result_once_and_in_order_however_often_its_queue_is_full(data: Any) -> None:
    log = ResultLog(STEPS)
    feed = Feed(log)
    for worker in range(K):
        feed.start(worker, 0)
    got: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def send(full: set[int]) -> dict[int, int]:
        unsent: dict[int, list[tuple[int, int]]] = defaultdict(list)
        taken = feed.take()
        for worker, (key,) in taken:
            (unsent if worker in full else got)[worker].append(key)
        for worker, keys in unsent.items():
            feed.unsent(worker, keys)
        assert feed.owes == bool(unsent)
        return {worker: len(keys) for worker, keys in unsent.items()}

    rounds = [(step, chunk) for step in range(STEPS) for chunk in range(CHUNKS)]
    for key in rounds:
        log.put(*key, [memoryview(b"")])
        log._frames[key[0]][key[1]] = [key]  # what is sent says which result it is
        feed.publish(*key)
        full = data.draw(st.sets(st.integers(0, K - 1)))
        send(full)
        assert set(send(full).values()) <= {1}  # one try each, once it is known
    while feed.owes or any(feed._owed.values()):
        send(set())
    assert all(got[worker] == rounds for worker in range(K))


def test_a_new_connection_begins_with_what_the_worker_lacks_and_what_was_forgotten_is_not_sent() -> None:
    log = ResultLog(3)
    feed = Feed(log)
    for step in range(5):
        log.put(step, 0, [memoryview(b"%d" % step)])
    feed.start(1, 3)
    assert [bytes(frames[0]) for _, frames in feed.take()] == [b"3", b"4"]
    feed.publish(4, 0)
    feed.unsent(1, [(0, 0)])  # is no longer in the log
    assert feed.take() == []
    assert [bytes(frames[0]) for _, frames in feed.take()] == [b"4"]
    feed.stop(1)
    feed.publish(4, 0)
    assert feed.take() == []
