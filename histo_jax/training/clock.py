"""The time that a run has trained."""

import time


class TrainingClock:
    """Minutes of training, summed over resumes; without preparing, placing and compilation.

    Args:
        minutes: of the run up to here.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        self._seconds, self._since = 60 * minutes, time.monotonic()
        self._is_running = False

    def start(self) -> None:
        """Counts from here on; starting a running clock changes nothing."""
        if not self._is_running:
            self._since, self._is_running = time.monotonic(), True

    def pause(self) -> None:
        """Counts no longer; pausing a paused clock changes nothing."""
        self._seconds, self._is_running = 60 * self.minutes, False

    @property
    def minutes(self) -> float:
        """Minutes counted so far."""
        seconds = time.monotonic() - self._since if self._is_running else 0.0
        return (self._seconds + seconds) / 60
