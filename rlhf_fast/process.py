"""What a command settles about its process before its work."""

import os
from collections.abc import MutableMapping


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets OpenMP's idle threads sleep after some microseconds, unless the user chose otherwise.

    libgomp reads this when torch loads. By default idle threads spin for milliseconds, which makes
    a job several times slower as soon as another one uses the same cores; sleeping at once
    (`OMP_WAIT_POLICY=PASSIVE`) pays for a wake-up thousands of times in a training step.
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", "1000")


def quiet_libraries() -> None:
    """Progress bars and notices of the libraries would break up a command's own output."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
