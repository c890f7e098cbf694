"""Policy: what the owner wants of each region, and the steps that bring it about.

    observed machine ─┐
                      ├─▶ plan (pure) ─▶ apply, one journalled step after the other ─▶ undo
    policy file ──────┘

:mod:`pmemkit.policy.model` has the records, ``schema`` reads the file, ``plan`` plans, ``apply``
carries out over the :class:`~pmemkit.policy.model.Actions` of one bus, ``journal`` remembers.
"""

__all__: list[str] = []
