"""An OpenAI-compatible server whose completions are the best of N.

Clients of OpenAI's API change their base URL and nothing else; the README has examples.

Probes: ``/ready`` says whether to route traffic here. As a sign to restart use ``/ready`` as well where the model is
inside this process (Kubernetes: a liveness probe that fails for a minute), and ``/health`` where the model is behind
HTTP, as a restart does not bring that back; see ``health.py``.

    app.py         the FastAPI application: routes and what they share
    settings.py    what can be set
    protocol.py    OpenAI's requests, plus the ``best_of_n`` extension
    responses.py   what is sent back, for the OpenAPI document
    bodies.py      the bytes of a request
    plan.py        a checked request -> what to run
    job.py         its work, from the queue to the result
    answers.py     a result -> OpenAI's response, whole or as chunks
    stream.py      server-sent events
    failures.py    every error in OpenAI's shape
    admission.py   how many run and how many wait
    health.py      whether the models answer
    connections.py what a connection may cost before it has brought a request
    edge.py        the outermost layer: hosts, keys, security headers, one log line per request
    metrics.py     Prometheus metrics; dashboard.json shows them in Grafana
    process.py     uvicorn, signals, drain
    playground/    one page that shows why a candidate won
"""

from bon.serve.app import create_app
from bon.serve.settings import Settings

__all__ = ["Settings", "create_app"]
