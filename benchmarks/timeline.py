"""What a profile says of one run of a program: launches, kernels, and the gaps between them."""

import collections
import pathlib
import tempfile

import jax

LAUNCHES = "cuLaunch", "cudaLaunch", "cuGraph", "cudaGraph"


def profile(run):
    """Profiles `run()`; returns the planes of the profile."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        found = pathlib.Path(directory).rglob("*.xplane.pb")
        return [
            plane
            for path in found
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        ]


def count_launches(planes):
    """The driver's launch calls, by their names."""
    return dict(
        collections.Counter(
            event.name
            for plane in planes
            for line in plane.lines
            for event in line.events
            if event.name.startswith(LAUNCHES)
        )
    )


def kernels(planes):
    """What ran on the first GPU: `(name, begin, end)` of each kernel, in nanoseconds, in order.

    Copies and the lines that XLA derives from the kernels (modules, operations) are left out.
    """
    gpus = sorted(plane.name for plane in planes if plane.name.startswith("/device:GPU:"))
    return sorted(
        (
            (event.name, event.start_ns, event.start_ns + event.duration_ns)
            for plane in planes
            if plane.name in gpus[:1]
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
            if not event.name.lower().startswith(("memcpy", "memset"))
        ),
        key=lambda kernel: kernel[1],
    )


def busy_and_gaps(found):
    """Microseconds in which any kernel ran, and of each gap in which none did.

    A kernel that starts before the one before it has ended (a programmatic dependent launch) leaves
    no gap, and the time in which both run counts once.
    """
    busy, gaps, until = 0.0, [], None
    for _, begin, end in found:
        if until is None or begin > until:
            if until is not None:
                gaps.append((begin - until) / 1e3)
            busy, until = busy + (end - begin) / 1e3, end
        elif end > until:
            busy, until = busy + (end - until) / 1e3, end
    return busy, gaps
