import threading

from tf_h5_callback.saving import turn as module
from tf_h5_callback.saving.turn import Turn


def in_thread(action):
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_one_thread_at_a_time_and_others_do_not_wait():
    turn, inside, leave, done = Turn(), threading.Event(), threading.Event(), []

    def first():
        done.append("first")
        inside.set()
        assert leave.wait(300)

    thread = in_thread(lambda: turn.do(first))
    assert inside.wait(300)
    turn.do(lambda: done.append("second"))
    assert done == ["first"]
    leave.set()
    thread.join()
    turn.do(lambda: done.append("third"))
    assert done == ["first", "third"]


def test_who_waits_comes_next(monkeypatch):
    turn, inside, leave, done = Turn(), threading.Event(), threading.Event(), []

    def first():
        inside.set()
        assert leave.wait(300)
        done.append("first")

    thread = in_thread(lambda: turn.do(first))
    assert inside.wait(300)
    asked = threading.Event()
    monkeypatch.setattr(module.time, "sleep", lambda seconds: asked.set())
    waiting = in_thread(lambda: turn.do(lambda: done.append("second"), wait=True))
    assert asked.wait(300)
    leave.set()
    thread.join()
    waiting.join()
    assert done == ["first", "second"]


def test_an_error_ends_the_turn():
    turn, done = Turn(), []
    try:
        turn.do(lambda: 1 / 0)
    except ZeroDivisionError:
        done.append(1)
    thread = in_thread(lambda: turn.do(lambda: done.append(2)))
    thread.join()
    assert done == [1, 2]


def test_a_turn_that_was_never_given_back_is_its_holders_or_ends_with_it(monkeypatch):
    turn, done = Turn(), []
    monkeypatch.setattr(turn, "_give_back", lambda: None)
    turn.do(lambda: done.append(1))
    turn.do(lambda: done.append(2))
    thread = in_thread(lambda: turn.do(lambda: done.append("not its turn")))
    thread.join()
    assert done == [1, 2]
    other = Turn()
    monkeypatch.setattr(other, "_give_back", lambda: None)
    thread = in_thread(lambda: other.do(lambda: done.append(3)))
    thread.join()
    other.do(lambda: done.append(4))
    assert done == [1, 2, 3, 4]
