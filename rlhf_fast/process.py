"""What a command settles about its process before its work."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, MutableMapping


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets OpenMP's idle threads sleep after some microseconds, unless the user chose otherwise.

    libgomp reads this when torch loads. By default idle threads spin for milliseconds, which makes
    a job several times slower as soon as another one uses the same cores; sleeping at once
    (`OMP_WAIT_POLICY=PASSIVE`) pays for a wake-up thousands of times in a training step.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")


@contextlib.contextmanager
def stopped_as_by_ctrl_c() -> Iterator[None]:
    """What a scheduler or a closed terminal sends ends the block by KeyboardInterrupt.

    Otherwise the process would be gone at once, and weights on their way to a sampling engine would
    stay in the temporary folder. A signal that is ignored, as under nohup, or handled stays so.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with contextlib.ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():  # others may set no handler
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:
                    undo.callback(signal.signal, number, signal.signal(number, stop))
        yield


def quiet_libraries() -> None:
    """Progress bars and notices of the libraries would break up a command's own output."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
