"""Order of requests, and which ones share a forward pass."""

from __future__ import annotations

from ctrl_ray.rewards.queue import Request, RequestQueue


def ask(queue: RequestQueue, num_samples: int, arrived_s: float = 0.0, method: str = "evaluate") -> Request:
    request = Request(method=method, payload=None, num_samples=num_samples, arrived_s=arrived_s)
    queue.append(request)
    return request


def make_queue(*, shared: bool) -> RequestQueue:
    return RequestQueue(max_batch_size=10, max_batch_delay_s=0.5, shared=shared)


def test_without_sharing_every_request_goes_alone_at_once_in_order() -> None:
    queue = make_queue(shared=False)
    first, second = ask(queue, 2), ask(queue, 2)
    assert queue.take(0.0) == ([first], 0.0)
    assert queue.take(0.0) == ([second], 0.0)
    assert queue.take(0.0) == ([], 0.0)


def test_requests_wait_for_others_up_to_the_delay_of_the_oldest() -> None:
    queue = make_queue(shared=True)
    first = ask(queue, 3, arrived_s=1.0)
    assert queue.take(1.0) == ([], 0.5)
    second = ask(queue, 3, arrived_s=1.25)
    assert queue.take(1.25) == ([], 0.25)
    assert len(queue) == 2
    assert queue.take(1.5) == ([first, second], 0.0)
    assert len(queue) == 0


def test_a_full_batch_does_not_wait_and_takes_no_more_than_its_size() -> None:
    queue = make_queue(shared=True)
    requests = [ask(queue, 4) for _ in range(3)]
    assert queue.take(0.0) == (requests[:2], 0.0)  # 8 of 10 samples; 4 more do not fit
    assert queue.take(0.0) == ([], 0.5)
    more = ask(queue, 6)
    assert queue.take(0.0) == ([requests[2], more], 0.0)  # 10 exactly


def test_a_request_above_the_size_goes_alone_at_once() -> None:
    queue = make_queue(shared=True)
    large, small = ask(queue, 40), ask(queue, 1)
    assert queue.take(0.0) == ([large], 0.0)
    assert queue.take(0.6) == ([small], 0.0)


def test_what_must_not_share_goes_alone_and_does_not_hold_others_up() -> None:
    queue = make_queue(shared=True)
    first, decode, second = ask(queue, 5), ask(queue, 5, method="decode"), ask(queue, 5)
    assert queue.take(0.0) == ([first, second], 0.0)
    assert queue.take(0.0) == ([decode], 0.0)
    first.alone = second.alone = True
    queue.put_back(second)
    queue.put_back(first)
    assert queue.take(0.0) == ([first], 0.0)
    assert queue.take(0.0) == ([second], 0.0)
