"""Signals that wait for the end of what must not be torn apart (unit)."""

import signal
import threading

import pytest

from knowedit.io.signals import held_back


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_acts_at_the_end_of_the_block(number):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = []
        with pytest.raises(KeyboardInterrupt), held_back():
            signal.raise_signal(number)
            done.append(1)
        assert done == [1]
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_error_of_the_block_is_raised_where_nothing_came():
    with pytest.raises(ValueError, match="own"), held_back():
        raise ValueError("own")


def test_another_thread_changes_no_handler():
    seen = []

    def work():
        with held_back():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
