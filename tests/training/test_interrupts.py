"""Signals outside training: the job ends at once, with a message, and training takes them over."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from image_classification.config import ConfigError
from image_classification.distributed import Distributed
from image_classification.exit_codes import EXIT_SAVED
from image_classification.interrupts import StoppedAtOnce, StopSignals, stopping_at_once
from image_classification.job_config import JobConfig
from image_classification.job_outcome import run_job
from image_classification.joining import DistributedConfig

CONFIGS = JobConfig(distributed=DistributedConfig(device="cpu"))


@pytest.fixture(autouse=True)
def ctrl_c_is_on() -> Iterator[None]:
    """Where the tests themselves run in a shell's background it is off, and all that follows inherits that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def receiving(number: signal.Signals) -> Callable[..., None]:
    """A job that receives a signal."""

    def body(configs: JobConfig, distributed: Distributed) -> None:
        signal.raise_signal(number)

    return body


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, EXIT_SAVED), (signal.SIGUSR1, EXIT_SAVED), (signal.SIGINT, 130)]
)
def test_start_up_ends_with_a_word_and_the_codes_of_training(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    assert run_job(CONFIGS, receiving(number)) == code
    assert signal.getsignal(number) == before
    said = capsys.readouterr().err
    assert said.startswith(
        f"stopped by {number.name} outside training: nothing is lost, no checkpoint was needed"
    )
    assert "Traceback" not in said


class ErrorWithSignalError(ConfigError):
    """An error that receives a signal while it is told, as a rank does from a launcher that saw another one die."""

    def __str__(self) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "--lr -1: give a positive number"


def test_a_signal_does_not_change_an_outcome_that_is_decided(capsys: pytest.CaptureFixture[str]) -> None:
    def body(configs: JobConfig, distributed: Distributed) -> None:
        raise ErrorWithSignalError

    assert run_job(CONFIGS, body) == 2
    assert capsys.readouterr().err == "error: --lr -1: give a positive number\n"


def test_training_takes_the_signals_over_and_gives_them_back() -> None:
    with stopping_at_once():
        with StopSignals(Distributed()) as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == "SIGTERM"
            with pytest.raises(KeyboardInterrupt) as caught:
                signal.raise_signal(signal.SIGINT)
            assert caught.type is KeyboardInterrupt
        with pytest.raises(StoppedAtOnce):
            signal.raise_signal(signal.SIGTERM)


def test_ctrl_c_that_is_switched_off_stays_off() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping_at_once(), StopSignals(Distributed()):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_ends_as_if_there_were_no_handler() -> None:
    with stopping_at_once():
        child = os.fork()
        if not child:
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                os._exit(3)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
