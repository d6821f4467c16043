"""What best-of-N costs and what it saves, measured in pairs on one machine in one run: ``bon bench``.

``harness`` times things and reports them; ``latency``, ``pruning`` and ``forward`` are the measurements; ``command``
runs them on the user's own models. The scripts in ``benchmarks/`` build on the same parts. Importing this package loads
no torch.
"""

from bon.bench.harness import Pairs, Report, Spread, conditions, interleave, table

__all__ = ["Pairs", "Report", "Spread", "conditions", "interleave", "table"]
