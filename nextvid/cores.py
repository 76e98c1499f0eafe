"""How many cores this process may use: less than the machine has in a container or under `taskset`."""

import os


def available_cores() -> int:
    """At least one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS
