"""Benchmarks: what bon costs and what it saves, measured in pairs on one machine in one run.

`harness` times things and reports them, `models`, `opening` and `lengths` make what is timed, `latency`, `pruning` and
`sharing` are the measurements, `command` runs them on a user's own models (``bon bench``). On vLLM `schedules`
compares bon with the same work written against vLLM itself (`plain`), `offline` is vLLM's own batch engine, and
`resources` looks at the cache and at starting. The scripts in ``benchmarks/`` choose sizes. Importing this package
loads no torch.
"""

from bon.bench.harness import Pairs, Report, Spread, conditions, interleave, table

__all__ = ["Pairs", "Report", "Spread", "conditions", "interleave", "table"]
