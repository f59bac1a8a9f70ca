"""Does self-play beat tuned SFT, and does it forget less? An exact study: ``python -m benchmarks.study``."""
