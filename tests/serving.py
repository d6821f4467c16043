"""A real uvicorn on loopback, on a thread of the test process, so that tests can look at the engines' counters."""

import json
import threading
import time
from contextlib import contextmanager

import pytest

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from bon.serve import Settings, create_app  # noqa: E402
from bon.serve.process import bind, build  # noqa: E402


class Served:
    def __init__(self, url, app):
        self.url, self.app = url, app
        self.server = app.state.server
        self.http = httpx.Client(base_url=url, timeout=30, trust_env=False)
        self.clients = [self.http]

    def openai(self, api_key="none"):
        client = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=api_key,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )
        self.clients.append(client)
        return client

    def async_openai(self):
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", http_client=http)

    def chat(self, content="Write about a fox", **fields):
        return self.http.post(
            "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], **fields}
        )

    def events(self, content="Write about a fox", **fields):
        """The chunks of a streamed answer."""
        body = {"messages": [{"role": "user", "content": content}], "stream": True, **fields}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            lines = list(response.iter_lines())
        assert lines[-2] == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    def metric(self, name, **labels):
        return self.server.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def served(bon, **settings):
    app = create_app(bon, Settings(port=0, **settings))
    server = build(app)
    listening = bind("127.0.0.1", 0)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive(), 10)
    it = Served(f"http://127.0.0.1:{port}", app)
    try:
        yield it
    finally:
        for client in it.clients:
            client.close()
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not stop"


def until(holds, seconds=5.0):
    """Wait until something holds."""
    give_up = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.01)
