"""On-media structures as the Rust compiler lays them out."""

def tables() -> dict[str, tuple[int, list[tuple[str, int, int]]]]:
    """For each structure, by the name of its class in :mod:`pmemkit.formats`: its size and its
    fields as ``(name, offset, width)``, in bytes."""
