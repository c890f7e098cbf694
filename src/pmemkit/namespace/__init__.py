"""The verbs on namespaces: create, destroy, reconfigure, check and repair; labels and info blocks.

They work on image files without a kernel's nvdimm stack, and leave on media what one would.
"""

__all__: list[str] = []
