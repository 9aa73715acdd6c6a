"""Interleaved timing of functions, and their peak memory.

All functions are called in each round, so that noise of the machine affects all of
them.
"""

import contextlib
import ctypes
import time


def measure(subjects, kinds=("forward", "step"), rounds=7, seconds=12.0):
    """Measures the time and the peak memory of several functions.

    Args:
        subjects: dict of names to objects with the methods `kinds`.
        kinds: tuple of strings, the names of the methods to measure. Defaults to
            `("forward", "step")`.
        rounds: int, the number of timed calls, after two untimed ones. Defaults to 7.
        seconds: float, the time limit for all calls of the slowest function. The number
            of rounds is reduced to meet it, but not below 3. Defaults to 12.

    Returns:
        A nested dict of names and kinds to `{"ms": [...], "peak_mb": ...}`. All lists
        have the same length, and their values at an index are of the same round.
    """
    calls = {
        (name, kind): getattr(subject, kind)
        for name, subject in subjects.items()
        for kind in kinds
    }
    results = {name: {} for name in subjects}
    longest = 0.0
    for (name, kind), call in calls.items():
        call()
        start = time.perf_counter()
        results[name][kind] = {"ms": [], "peak_mb": peak_megabytes(call)}
        longest = max(longest, time.perf_counter() - start)
    rounds = max(3, min(rounds, int(seconds / longest)))
    for _ in range(rounds):
        for (name, kind), call in calls.items():
            results[name][kind]["ms"].append(round(1000 * _seconds(call), 2))
    return results


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_megabytes(call):
    """Returns the peak memory that a call adds to the process; `None` without Linux."""
    before = None
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        ctypes.CDLL(None).malloc_trim(0)  # Returns freed memory to the system.
        file.write("5")  # Resets the peak.
        file.flush()
        before = _kilobytes("VmRSS")
    call()
    return None if before is None else round((_kilobytes("VmHWM") - before) / 1024)


def _kilobytes(entry):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(entry))
    return int(line.split()[1])
