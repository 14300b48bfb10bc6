"""An engine behind a thread, over a device whose tokens can be computed by hand."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.loop import Loop
from tests.fake_engine import VOCAB, FakeExecutor, continuation, fake_engine, fake_executor
from tests.tiny import config, greedy, new_engine, prompt_of, tiny_model

SOON = 20.0  # seconds within which whatever ends has ended


@pytest.fixture(autouse=True)
def no_thread_is_left():
  before = threading.enumerate()  # of other files, whose replicas have died
  yield
  assert not [thread for thread in threading.enumerate() if thread.name == "engine" and thread not in before]


def held(executor: FakeExecutor) -> threading.Event:
  """Results come only while the event that is returned is set."""
  free, execute = threading.Event(), executor.execute

  def waiting(plan):
    assert free.wait(SOON)
    return execute(plan)

  executor.execute = waiting
  return free


def causes(error: BaseException | None) -> list[BaseException]:
  return [error, *causes(error.__cause__)] if error else []


def test_tokens_come_one_by_one_and_the_request_at_the_end():
  engine, _ = fake_engine()
  with Loop(engine) as loop:
    stream = loop.submit([3, 4, 5], max_new_tokens=7, request_id="mine")
    assert list(stream) == continuation([3, 4, 5], 7) and list(stream) == []
    request = stream.result(SOON)
    assert (request.id, request.finish_reason, stream.ended) == ("mine", "length", True)
    assert request.output_tokens == continuation([3, 4, 5], 7) == stream.result().output_tokens


def test_threads_submit_and_cancel_at_random():
  """Every output is right, or the beginning of the right one where it was cancelled, and nothing is left behind."""
  engine, _ = fake_engine()

  def client(loop: Loop, seed: int) -> int:
    rng, finished = random.Random(seed), 0
    for _ in range(12):
      prompt = [rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 40))]
      stream = loop.submit(prompt, max_new_tokens=rng.randint(1, 20))
      expected = continuation(prompt, stream._options["max_new_tokens"])
      read = [next(stream) for _ in range(rng.randint(0, len(expected)))] if rng.random() < 0.5 else []
      if rng.random() < 0.4:
        loop.cancel(stream)
      request = stream.result(SOON)
      assert read + list(stream) == request.output_tokens == expected[: len(request.output_tokens)]
      if request.finish_reason == "cancelled":
        assert len(request.output_tokens) < len(expected)
      else:
        finished += 1
        assert request.output_tokens == expected
    return finished

  with Loop(engine) as loop:
    with ThreadPoolExecutor(8) as pool:
      finished = sum(pool.map(client, [loop] * 8, range(8)))
    assert not loop.live
  assert 40 < finished <= 96
  assert not engine.has_work and engine._scheduler.pool_blocks_in_use == 0


def test_what_cannot_run_ends_its_own_stream_alone():
  with Loop(fake_engine()[0]) as loop:
    good = loop.submit([1, 2], max_new_tokens=9)
    bad = [loop.submit([]), loop.submit([VOCAB]), loop.submit([1], max_new_tokens=99), loop.submit([1], wrong=1)]
    for stream, message in zip(bad, ["empty", "vocabulary", "would fit", "wrong"], strict=True):
      with pytest.raises((ValueError, TypeError), match=message):
        stream.result(SOON)
      with pytest.raises((ValueError, TypeError), match=message):
        list(stream)
    assert list(good) == continuation([1, 2], 9)
    assert list(loop.submit([4], max_new_tokens=3)) == continuation([4], 3) and not loop.failed


def test_a_request_that_ends_with_an_error_ends_its_own_stream_alone():
  engine, executor = fake_engine()
  executor.not_finite.add("bad")
  with Loop(engine) as loop:
    bad, good = loop.submit([1], max_new_tokens=3, request_id="bad"), loop.submit([2], max_new_tokens=5)
    with pytest.raises(RuntimeError, match="the request has failed: .*not finite"):
      bad.result(SOON)
    assert list(good) == continuation([2], 5) and not loop.failed


def test_a_device_that_fails_once():
  """What it held ends with the error; what waits for a lane, and what comes, is served."""
  engine, executor = fake_engine(R=1)
  free, execute = threading.Event(), executor.execute

  def failing(plan):
    assert free.wait(SOON)
    executor.execute = execute
    raise OSError("device gone")

  executor.execute = failing
  with Loop(engine) as loop:
    lost, *others = [loop.submit([i], max_new_tokens=9) for i in range(4)]
    free.set()
    with pytest.raises(RuntimeError, match="has failed: .*device gone"):
      lost.result(SOON)
    assert [list(stream) for stream in others] == [continuation([i], 9) for i in (1, 2, 3)]
    assert list(loop.submit([8], max_new_tokens=3)) == continuation([8], 3) and not loop.failed


@pytest.mark.parametrize("where", ["submit", "execute"])
@pytest.mark.parametrize("error", [OSError("device gone"), SystemExit("from far below")])
def test_an_engine_that_fails_ends_all_streams(where, error):
  engine, executor = fake_engine(R=2)
  works, calls = getattr(executor, where), []

  def failing(plan):
    calls.append(plan)
    if len(calls) > 3:
      raise error
    return works(plan)

  def broken():
    raise error

  setattr(executor, where, failing)
  executor.reset = broken  # for good
  loop = Loop(engine)
  streams = [loop.submit([i], max_new_tokens=30) for i in range(5)]  # some wait for a lane, and are told too
  outcomes = []

  def read():
    with pytest.raises(RuntimeError) as raised:
      list(streams[0])
    outcomes.append(raised.value)

  reader = threading.Thread(target=read, daemon=True)
  reader.start()
  for stream in streams:
    with pytest.raises(RuntimeError, match="has failed: .*(device gone|from far below)") as raised:
      stream.result(SOON)
    assert error in causes(raised.value)
    with pytest.raises(RuntimeError, match="has failed"):
      list(stream)
  reader.join(SOON)
  assert not reader.is_alive() and error in causes(outcomes[0])
  loop._thread.join(SOON)
  assert loop.failed and not loop.live
  for call in (lambda: loop.submit([1]), loop.drain):
    with pytest.raises(RuntimeError, match="the engine has failed"):
      call()
  loop.cancel(streams[0])
  loop.close()


def test_an_engine_that_was_broken_before_takes_nothing():
  engine, _ = fake_engine()
  engine._failure = OSError("device gone")
  loop = Loop(engine)
  loop._thread.join(SOON)
  with pytest.raises(RuntimeError, match="device gone"):
    loop.submit([1])
  loop.close()


def test_drain_finishes_what_lives_and_takes_no_more():
  engine, executor = fake_engine()
  free = held(executor)
  with Loop(engine) as loop:
    streams = [loop.submit([i], max_new_tokens=12) for i in range(9)]
    with pytest.raises(TimeoutError, match="9 requests have not ended after 0.05 s"):
      loop.drain(0.05)
    with pytest.raises(RuntimeError, match="draining or closed"):
      loop.submit([1])
    free.set()
    loop.drain(SOON)
    assert all(stream.ended for stream in streams)
    assert [stream.result(0).output_tokens for stream in streams] == [continuation([i], 12) for i in range(9)]


def test_close_cancels_what_lives():
  engine, executor = fake_engine(R=2)
  free = held(executor)
  loop = Loop(engine)
  streams = [loop.submit([i], max_new_tokens=40) for i in range(6)]
  closing = threading.Thread(target=loop.close)
  closing.start()
  while not loop._closing:
    time.sleep(0.001)
  with pytest.raises(RuntimeError, match="draining or closed"):
    loop.submit([1])
  free.set()
  closing.join(SOON)
  for i, stream in enumerate(streams):
    request = stream.result(SOON)
    assert list(stream) == request.output_tokens == continuation([i], len(request.output_tokens))
    assert request.finish_reason == "cancelled"
  assert not engine.has_work and not engine.failed
  loop.close()
  with pytest.raises(RuntimeError, match="draining or closed"):
    loop.submit([1])
  assert engine.add_request([5], 3) in engine.run()  # somebody else's now


def test_an_exception_in_the_block_cancels():
  engine, executor = fake_engine()
  free = held(executor)
  with pytest.raises(ZeroDivisionError), Loop(engine) as loop:
    stream = loop.submit([1], max_new_tokens=40)
    threading.Timer(0.05, free.set).start()
    raise ZeroDivisionError
  assert stream.result(0).finish_reason == "cancelled"


def test_a_slow_consumer_stops_nobody():
  with Loop(fake_engine()[0]) as loop:
    unread = loop.submit([7], max_new_tokens=30)
    for i in range(20):
      assert list(loop.submit([i], max_new_tokens=10)) == continuation([i], 10)
    assert list(unread) == continuation([7], 30)


def test_a_result_that_is_late():
  engine, executor = fake_engine()
  free = held(executor)
  with Loop(engine) as loop:
    stream = loop.submit([1, 2], max_new_tokens=2)
    with pytest.raises(TimeoutError, match=r"not ended after 0\.01 s"):
      stream.result(0.01)
    free.set()
    assert stream.result(SOON).output_tokens == continuation([1, 2], 2)


def test_a_name_may_be_used_again_at_once():
  """A stream that was cancelled twice does not take the next of its name with it."""
  engine, executor = fake_engine()
  free = held(executor)
  with Loop(engine) as loop:
    first = loop.submit([1], max_new_tokens=40, request_id="a")
    loop.cancel(first), loop.cancel(first)
    second = loop.submit([2], max_new_tokens=9, request_id="a")
    loop.cancel(first)
    free.set()
    assert first.result(SOON).finish_reason == "cancelled"
    assert list(second) == continuation([2], 9)
    loop.cancel(second)  # has ended: stays as it is
    assert second.result(0).finish_reason == "length"


def test_a_request_arrives_when_it_is_submitted():
  """Not when the thread gets to it."""
  executor = fake_executor()
  free = held(executor)
  with Loop(Engine(executor)) as loop:
    loop.submit([1], max_new_tokens=3)
    time.sleep(0.05)  # the thread waits for the device by now
    before = time.monotonic()
    late = loop.submit([2], max_new_tokens=3)
    after = time.monotonic()
    time.sleep(0.05)
    free.set()
    request = late.result(SOON)
  assert before <= request.arrival_time <= after < request.scheduled_time


def test_an_idle_loop_costs_nothing():
  """In the least of some moments: threads of other tests may still end."""
  engine, _ = fake_engine()
  with Loop(engine) as loop:
    loop.submit([1], max_new_tokens=3).result(SOON)
    took = []
    for _ in range(5):
      before = time.process_time()
      time.sleep(0.1)
      took.append(time.process_time() - before)
    assert min(took) < 0.03


@pytest.mark.slow
def test_the_devices_are_used_from_the_thread():
  """JAX keeps some of its settings for each thread."""
  model = tiny_model("gqa2")
  prompts = [prompt_of(n, i) for i, n in enumerate((9, 30, 17))]
  with Loop(new_engine(config(), model)) as loop:
    streams = [loop.submit(prompt, max_new_tokens=6, ignore_eos=True) for prompt in prompts]
    assert [list(stream) for stream in streams] == [greedy("gqa2", tuple(prompt), 6) for prompt in prompts]


@pytest.mark.parametrize("at_end", [False, True])
def test_a_sink_that_raises_ends_its_own_stream_alone(at_end):
  """With a token the request ends by it; at the end nothing is left to end."""

  def sink(stream, token):
    if at_end == (token is None):
      raise OSError("nobody takes it")

  with Loop(fake_engine()[0]) as loop:
    bad, good = loop.submit([1], max_new_tokens=3, sink=sink), loop.submit([2], max_new_tokens=30)
    if at_end:
      assert bad.result(SOON).output_tokens == continuation([1], 3)
    else:
      with pytest.raises(RuntimeError, match="the request has failed: .*nobody takes it"):
        bad.result(SOON)
    assert list(good) == continuation([2], 30) and not loop.failed
    assert list(loop.submit([4], max_new_tokens=3)) == continuation([4], 3)


def test_calls_are_told_that_the_engine_has_failed():
  """The one that broke it, and those that wait: whoever waits for them would do so for ever, or be cancelled."""
  engine, _ = fake_engine()
  go = threading.Event()

  def breaks():
    assert go.wait(SOON)
    raise SystemExit("from far below")

  loop = Loop(engine)
  calls, failed = [loop.call(breaks), loop.call(lambda: 5)], list[bool]()
  for call in calls:
    call.add_done_callback(lambda _: failed.append(loop.failed))
  go.set()
  for call in calls:
    with pytest.raises(RuntimeError, match="the engine has failed: .*from far below"):
      call.result(SOON)
  assert failed == [True, True], "when they were told"
  with pytest.raises(RuntimeError, match="the engine has failed"):
    loop.call(lambda: 5)
  loop.close()


def test_a_call_is_told_if_what_comes_before_it_breaks_the_engine():
  engine, _ = fake_engine()
  begun, go = threading.Event(), threading.Event()

  def breaks(*_):
    raise OSError("device gone")

  loop = Loop(engine)
  stream = loop.submit([1], max_new_tokens=40)
  loop.call(lambda: (begun.set(), go.wait(SOON)))
  assert begun.wait(SOON)
  engine.cancel = breaks
  loop.cancel(stream)
  late = loop.call(lambda: 5)
  go.set()
  with pytest.raises(RuntimeError, match="the engine has failed: .*device gone"):
    late.result(SOON)
  loop.close()


def test_calls_that_wait_are_told_that_the_loop_is_closed():
  begun, go = threading.Event(), threading.Event()
  loop = Loop(fake_engine()[0])
  first, *others = [loop.call(lambda: (begun.set(), go.wait(SOON))), *(loop.call(lambda: 5) for _ in range(3))]
  assert begun.wait(SOON)
  closing = threading.Thread(target=loop.close)
  closing.start()
  while not loop._closing:
    time.sleep(0.001)
  go.set()
  closing.join(SOON)
  assert first.result(SOON)
  with pytest.raises(RuntimeError, match="this loop is closed"):
    others[-1].result(SOON)
