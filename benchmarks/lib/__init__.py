"""What the scripts in this folder share, beyond what ``bon bench`` itself uses (``bon.bench``).

``scripts`` has their command line, ``models`` and ``opening`` make and load what is timed, ``lengths`` draws lengths of
real texts, ``scoring`` times the scoring stage, ``headroom`` says what pruning could save at best. On vLLM
``schedules`` compares bon with the same work written against vLLM itself (``plain``), ``offline`` is vLLM's own batch
engine, and ``resources`` looks at the cache and at starting.
"""
