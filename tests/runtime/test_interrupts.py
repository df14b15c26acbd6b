# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C that Python drops is raised once more; what else asks a run to leave is heard."""

from __future__ import annotations

import contextlib
import os
import signal

import jax
import pytest

from digseg_jax.errors import Preempted
from digseg_jax.io.storage import explained
from digseg_jax.runtime import preemption
from digseg_jax.runtime.interrupts import check_interrupts, remember_interrupts
from digseg_jax.runtime.preemption import (
    ALIKE,
    PreemptionWatch,
    forget_late_request,
    leave_if_asked,
)


@pytest.fixture(autouse=True)
def watched():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    remember_interrupts()
    yield
    remember_interrupts()  # without the mark
    for number, handler in before.items():
        signal.signal(number, handler)


class Dropped:
    """An object whose destructor is interrupted: Python prints the exception and goes on."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two instructions
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_dropped_comes_at_the_next_check():
    check_interrupts()
    Dropped()
    with pytest.raises(KeyboardInterrupt):
        check_interrupts()


def test_an_interrupt_elsewhere_is_raised_at_once():
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass


def test_sigterm_before_the_first_step_is_a_preemption():
    with pytest.raises(Preempted):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted, match="what was saved is there"):
        check_interrupts()


@pytest.mark.parametrize("place", ["a file of the run", "gs://bucket/run"])
def test_sigterm_while_a_file_is_read_is_not_taken_for_a_fault_of_the_file(place):
    with pytest.raises(Preempted), explained(place, "cannot be read"):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass


def test_between_two_images_of_an_evaluation_a_dropped_sigterm_is_heard():
    leave_if_asked()
    with contextlib.suppress(Preempted):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted):
        leave_if_asked()


def test_what_schedulers_and_terminals_send_is_like_sigterm():
    for number in ALIKE:
        before = signal.signal(number, signal.SIG_DFL)  # this run itself may be under nohup
        try:
            with PreemptionWatch() as watch:
                assert not watch.reached()
                os.kill(os.getpid(), number)
                assert watch.reached()
            assert signal.getsignal(number) == signal.SIG_DFL
        finally:
            signal.signal(number, before)
            forget_late_request()


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with PreemptionWatch() as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not watch.reached()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_is_asked_during_the_last_step_leaves_before_an_evaluation():
    with PreemptionWatch() as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.reached()  # the loop ends by itself: its weights are exported
        leave_if_asked()
    with pytest.raises(Preempted):
        leave_if_asked()

    # That is told once: another job may follow in the same Python session. The job after a training
    # without an evaluation is not meant at all.
    leave_if_asked()
    with PreemptionWatch() as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.reached()
    forget_late_request()
    leave_if_asked()

    # A loop that was left by an exception has told it already.
    with contextlib.suppress(Preempted), PreemptionWatch() as watch:
        os.kill(os.getpid(), signal.SIGTERM)
        raise Preempted("step 3 is saved")
    leave_if_asked()


def test_several_processes_number_the_points_where_they_can_leave_without_a_gap(monkeypatch):
    """JAX takes the point after the last one: a number left out would be waited for in vain."""
    numbers: list[int] = []
    monkeypatch.setattr(preemption, "_number", 0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    asked = preemption.multihost_utils
    monkeypatch.setattr(asked, "reached_preemption_sync_point", lambda n: numbers.append(n) or n == 6)
    leave_if_asked()
    with PreemptionWatch() as watch:
        assert not watch.reached() and not watch.reached()
        leave_if_asked()  # an evaluation within the training: the step decides
        assert not watch.reached()
    leave_if_asked()
    with pytest.raises(Preempted):
        leave_if_asked()
    assert numbers == [1, 2, 3, 4, 5, 6]
