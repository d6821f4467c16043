"""Benchmarks: what bon costs and what it saves, measured in pairs on one machine in one run.

`harness` times things and reports them, `models` makes what is timed, `latency`, `pruning` and `sharing` are the
measurements, `command` runs them on a user's own models (``bon bench``). The scripts in ``benchmarks/`` choose sizes
and add the comparisons with other code. Importing this package loads no torch.
"""

from bon.bench.harness import Pairs, Report, Spread, conditions, interleave, table

__all__ = ["Pairs", "Report", "Spread", "conditions", "interleave", "table"]
