"""Measures self-play training and generation against the tools people would use instead. ``make bench`` runs all of it.

Contenders live in processes and environments of their own (``worker``, ``rounds``), get the same token ids
(``workload``), and take turns. What was measured is ``docs/performance.json``; ``report`` makes the tables and pictures
of it. Nothing here is part of the installed package.
"""
