"""Timing loops that must not run in Python. Used by ``pmem bench``; refuse debug builds there."""

def medium_ns(
    call: str,
    length: int,
    iterations: int,
    *,
    library: str | None = None,
    working_set: int = 1 << 26,
) -> float:
    """Median-of-batches nanoseconds of one call over populated memory, walking a working set.

    ``call``: ``copy_persist`` (copy and make durable, cache-line granularity), ``persist`` (dirty
    one byte a line, then write back and fence). With ``library`` (a path or soname of libpmem) the
    loop calls ``pmem_memcpy_persist`` / ``pmem_persist`` of that library instead of ours."""
