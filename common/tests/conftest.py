"""What holds for all tests here."""

from __future__ import annotations

import signal


def pytest_sessionstart() -> None:
    """Take Ctrl-C as Python does: a shell that starts the tests in the background has it ignored, in children too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
