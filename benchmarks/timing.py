"""Times in turn, so that a slower moment of the machine is everybody's."""

import contextlib
import ctypes
import time


def measure(subjects, kinds=("forward", "step"), rounds=7, seconds=12.0):
    """Milliseconds and memory of each subject, round by round.

    Args:
        subjects: a dict of objects with functions of the names `kinds`.
        kinds: names.
        rounds: int, how often each is timed, after two calls that are not.
        seconds: float, for the slowest call: if need be in fewer rounds, but
            three at least.

    Returns:
        name to kind to `{"ms": [...], "peak_mb": ...}`, with as many figures
        for all: those of one index come from one round.
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
        results[name][kind] = {"ms": [], "peak_mb": _peak_megabytes(call)}
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


def _peak_megabytes(call):
    """What a call needs at most beyond what is held before; `None` but on Linux."""
    before = None
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        ctypes.CDLL(None).malloc_trim(0)  # What is free counts as free.
        file.write("5")
        file.flush()
        before = _kilobytes("VmRSS")
    call()
    return None if before is None else round((_kilobytes("VmHWM") - before) / 1024)


def _kilobytes(entry):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(entry))
    return int(line.split()[1])
