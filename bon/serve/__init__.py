"""An OpenAI-compatible server whose completions are the best of N.

app.py         the FastAPI application: routes and what they share
settings.py    what can be set
protocol.py    OpenAI's request and response schema, plus the ``best_of_n`` extension
plan.py        a checked request -> what to run
answers.py     a result -> OpenAI's response, whole or as a stream of chunks
failures.py    every error in OpenAI's shape
admission.py   how many run, how many wait, and draining
health.py      whether the engines are alive
edge.py        the outermost layer: keys, hosts, security headers, one log line per request
metrics.py     Prometheus metrics
process.py     uvicorn, signals, drain
playground/    one page that shows why a candidate won
"""

from bon.serve.app import create_app
from bon.serve.settings import Settings

__all__ = ["Settings", "create_app"]
