"""The batcher: what shares a batch, what an error reaches, and how it ends."""

from __future__ import annotations

import threading
import time

import pytest

from rlrr_kernels.serve.batcher import Batcher, ClosedError


def test_what_comes_while_a_batch_runs_is_the_next_batch_in_order():
    gate, batches = threading.Event(), []

    def run(items):
        batches.append(list(items))
        gate.wait(10)
        return [2 * item for item in items]

    observed = []
    batcher = Batcher(run, batch_size=4, latency=0.0, observe=lambda *told: observed.append(told))
    first = batcher.submit(0, 10)
    while not batches:
        time.sleep(0.001)
    futures = [batcher.submit(i, 10) for i in range(1, 7)]
    assert len(batcher) == 6
    gate.set()
    assert [future.result(10) for future in [first, *futures]] == [0, 2, 4, 6, 8, 10, 12]
    assert batcher.close(10)
    assert batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert [size for size, _, _ in observed] == [1, 4, 2]
    assert observed[1][1] > 0


def test_an_item_waits_for_others_no_longer_than_the_latency():
    batches = []
    batcher = Batcher(lambda items: batches.append(list(items)) or items, batch_size=3, latency=0.3)
    begin = time.monotonic()
    futures = [batcher.submit(i, 10) for i in range(3)]
    assert [future.result(10) for future in futures] == [0, 1, 2]
    assert time.monotonic() - begin < 0.3  # a full batch waits for nothing
    begin = time.monotonic()
    assert batcher.submit(3, 10).result(10) == 3
    assert 0.25 < time.monotonic() - begin < 5
    assert batches == [[0, 1, 2], [3]]
    batcher.close()


def test_an_error_reaches_only_the_item_that_raises_it():
    def run(items):
        if "bad" in items:
            raise ValueError(f"bad among {len(items)}")
        return [item.upper() for item in items]

    batcher = Batcher(run, batch_size=8, latency=0.05)
    futures = [batcher.submit(item, 10) for item in ("a", "bad", "b")]
    assert (futures[0].result(10), futures[2].result(10)) == ("A", "B")
    with pytest.raises(ValueError, match="bad among 1"):
        futures[1].result(10)
    batcher.close()


def test_late_and_cancelled_items_are_not_computed():
    gate, seen = threading.Event(), []

    def run(items):
        seen.extend(items)
        gate.wait(10)
        return items

    batcher = Batcher(run, batch_size=8, latency=0.0)
    running = batcher.submit("running", 10)
    while not seen:
        time.sleep(0.001)
    late, cancelled, other = batcher.submit("late", 0.01), batcher.submit("cancelled", 10), batcher.submit("other", 10)
    assert cancelled.cancel()
    assert len(batcher) == 2  # it holds its memory no longer
    time.sleep(0.05)
    gate.set()
    with pytest.raises(TimeoutError, match="waited longer"):
        late.result(10)
    assert (running.result(10), other.result(10)) == ("running", "other")
    assert seen == ["running", "other"]
    assert batcher.seconds_for(10) >= 1
    batcher.close()


def test_closing_computes_what_waits_and_takes_nothing_more():
    gate = threading.Event()
    batcher = Batcher(lambda items: [gate.wait(10)] * len(items), batch_size=1, latency=5.0)
    futures = [batcher.submit(i, 10) for i in range(3)]
    assert not batcher.close(0.01)
    with pytest.raises(ClosedError, match="stopping"):
        batcher.submit(3, 10)
    gate.set()
    assert batcher.close(10)
    assert [future.result(0) for future in futures] == [True] * 3


def test_threads_compute_side_by_side_and_say_how_long_all_have_been_busy():
    gates, begun = [threading.Event(), threading.Event()], []

    def run(items):
        begun.extend(items)
        gates[items[0]].wait(10)
        return items

    batcher = Batcher(run, batch_size=1, latency=0.0, threads=2)
    first = batcher.submit(0, 10)
    while not begun:
        time.sleep(0.001)
    time.sleep(0.05)
    assert batcher.busy_for() == 0  # the other one is free
    second = batcher.submit(1, 10)
    while len(begun) < 2:
        time.sleep(0.001)
    time.sleep(0.02)
    assert batcher.busy_for() > 0
    begin = time.monotonic()
    assert not batcher.close(0.05)
    assert time.monotonic() - begin < 1
    gates[1].set()
    assert second.result(10) == 1
    assert not first.done()
    gates[0].set()
    assert batcher.close(10)
    assert batcher.busy_for() == 0
