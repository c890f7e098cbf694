"""On-media formats as data: labels, BTT, PFN and DAX info blocks. Pure functions over bytes.

What this does not do: I/O of any kind.
"""

__all__: list[str] = []
