"""More requests than there is room for, clients that leave, models that die, and SIGTERM."""

import contextlib
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import httpx, openai, served, until

import bon.serve.bodies
import bon.serve.health
from bon import BestOfN
from bon.engines.scripted import ScriptedEngine
from bon.errors import EngineError
from bon.serve import Settings
from bon.serve.admission import Admission
from bon.serve.failures import ApiError
from bon.serve.logs import JsonFormatter, Repeats

OK = [{"role": "user", "content": "a fox"}]


def slow(words=200, concurrent=True):
    """An engine that takes seconds for an answer, and less for its scores."""
    return ScriptedEngine(["word " * words], step_seconds=0.01, concurrent=concurrent)


def in_background(call, *args, **kwargs):
    outcomes = []

    def run():
        try:
            outcomes.append(call(*args, **kwargs))
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcomes


def test_beyond_the_queue_a_client_is_told_when_to_come_back():
    policy = slow(60)
    with served(BestOfN(policy, ScriptedEngine(), n=1), max_running=1, max_waiting=1) as site:
        admission = site.server.admission
        running = in_background(site.chat)
        until(lambda: admission.running == 1)
        waiting = in_background(site.chat)
        until(lambda: admission.waiting == 1)
        assert site.metric("bon_waiting_requests") == 1
        refused = site.chat()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert site.chat(stream=True).status_code == 429, "a stream is refused before it opens"
        for thread, outcomes in (running, waiting):
            thread.join(10)
            assert outcomes[0].status_code == 200
        assert outcomes[0].json()["best_of_n"]["timing"]["queue_s"] > 0.1
        assert admission.running == admission.waiting == 0


def test_the_official_client_waits_and_succeeds_when_it_is_told_to_come_back():
    with served(BestOfN(slow(30), ScriptedEngine(), n=1), max_running=1, max_waiting=0) as site:
        running, _ = in_background(site.chat)
        until(lambda: site.server.admission.running == 1)
        client = site.openai().with_options(max_retries=3)
        answer = client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "a fox"}])
        assert answer.choices[0].message.content
        running.join(10)


def test_requests_wait_in_the_order_in_which_they_came():
    ran = []
    policy = ScriptedEngine(lambda text, draw: ran.append(text) or text, step_seconds=0.05)
    with served(BestOfN(policy, ScriptedEngine(), n=1), max_running=1) as site:
        threads = []
        for i in range(6):
            threads.append(in_background(site.chat, f"request number {i}")[0])
            until(lambda i=i: len(ran) + site.server.admission.waiting > i)
        for thread in threads:
            thread.join(10)
        assert ran == [f"request number {i}" for i in range(6)]


def test_engines_that_want_one_batch_at_a_time_get_one_request_at_a_time():
    with served(BestOfN(ScriptedEngine(concurrent=False), "flip", n=1)) as site:
        assert site.server.admission.max_running == 1
    with served(BestOfN(ScriptedEngine(), "flip", n=1)) as site:
        assert site.server.admission.max_running == 64
    with served(BestOfN(n=1)) as site:  # the embedded model samples for several together
        assert site.server.admission.max_running == 8


def test_a_place_is_given_back_exactly_once_however_a_request_ends():
    async def story():
        admission = Admission(1, 2)
        first, second, third = (admission.ticket() for _ in range(3))
        await first.turn()
        assert [t.position for t in (first, second, third)] == [0, 1, 2]
        with pytest.raises(ApiError, match="busy"):
            admission.ticket()
        second.leave()  # gave up while it waited
        assert third.position == 1
        first.leave()
        first.leave()
        assert (admission.running, admission.waiting) == (1, 0)
        third.leave()  # left before it noticed that it was its turn
        assert (admission.running, admission.waiting) == (0, 0)

    import asyncio

    asyncio.run(story())


def abandon(site, body, after):
    """Send a request and close the connection once something holds."""
    data = json.dumps({"messages": [{"role": "user", "content": "a fox"}], **body}).encode()
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        until(after)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_all_its_work_with_it(stream, caplog):
    """Seen in the engine's own counters: what vLLM users ask for in vllm issue 6975."""
    caplog.set_level("INFO", "bon.serve")
    policy = slow(10_000)
    with served(BestOfN(policy, ScriptedEngine(), n=8), max_running=1) as site:
        abandon(site, {"stream": stream}, lambda: policy.running == 8)
        until(lambda: policy.running == 0)
        until(lambda: site.server.admission.running == 0)
        decoded = policy.decoded
        time.sleep(0.1)
        assert policy.decoded == decoded, "nothing is decoded for nobody"
        until(lambda: site.metric("bon_runs_total", outcome="client_gone") == 1)
        until(lambda: any(getattr(r, "fields", {}).get("client_gone") for r in caplog.records))
    assert not [r for r in caplog.records if r.levelname == "ERROR"], "a client that leaves is no failure"


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(site):
    host, port = site.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def test_a_client_that_gives_up_its_upload_is_no_failure(caplog):
    caplog.set_level("INFO", "bon.serve")
    with served(BestOfN(ScriptedEngine(), "flip", n=1)) as site:
        with connect(site) as connection:
            connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
            time.sleep(0.1)
        until(lambda: [r for r in caplog.records if r.fields["event"] == "request"])
    [record] = [r for r in caplog.records if r.fields["event"] in ("request", "error")]
    assert (record.fields["status"], record.fields["code"], record.exc_info) == (499, "client_gone", None)


def test_what_clients_send_together_has_a_limit(monkeypatch):
    monkeypatch.setattr(bon.serve.bodies, "MOST_BODIES", 2)
    with served(BestOfN(ScriptedEngine(), "flip", n=1), max_body_bytes=1000) as site, contextlib.ExitStack() as open_:
        for _ in range(3):
            half = open_.enter_context(connect(site))
            half.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + b"x" * 660)
        until(lambda: site.server.bodies.held == 1980)
        refused = site.chat("word " * 10)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        open_.close()
        until(lambda: site.server.bodies.held == 0)
        assert site.chat("word " * 10).status_code == 200


def test_half_sent_heads_are_given_up_and_do_not_keep_others_out():
    """1,100 of them took every file descriptor: nobody was answered, and asyncio logged 97 MB a minute."""
    with served(BestOfN(ScriptedEngine(), "flip", n=1), max_connections=8, head_timeout_s=0.5) as site:
        halves = [connect(site) for _ in range(20)]
        for half in halves:
            half.sendall(HEAD)
        assert site.chat().status_code == 200
        for half in halves:
            with half, contextlib.suppress(ConnectionResetError):
                assert half.recv(1) == b""
        assert site.chat().status_code == 200, "a connection between two requests has time"


def test_requests_under_way_are_not_closed_for_others():
    with served(BestOfN(slow(40), ScriptedEngine(), n=1), max_connections=2) as site:
        running, outcomes = in_background(site.chat)
        until(lambda: site.server.admission.running == 1)
        for _ in range(6):
            with connect(site) as half:
                half.sendall(HEAD)
        running.join(10)
        assert outcomes[0].status_code == 200


def test_a_client_that_does_not_read_its_answer_loses_it():
    """A stream to it filled its buffers, and waited for ever."""
    policy = ScriptedEngine(lambda text, draw: f"{draw} {'x' * 2_000_000}")
    with served(BestOfN(policy, lambda prompt, responses: [0.0] * len(responses), n=4), stall_timeout_s=0.3) as site:
        body = json.dumps({"messages": OK, "stream": True, "best_of_n": {"return_candidates": True}}).encode()
        with connect(site) as connection:
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            until(lambda: site.metric("bon_http_requests_total", path="/v1/chat/completions", status="200") == 1, 10)
            read = bytearray()
            with contextlib.suppress(ConnectionResetError):
                while more := connection.recv(1 << 20):
                    read += more
        assert b"[DONE]" not in read
    assert site.server.admission.running == 0


def test_a_client_that_leaves_the_queue_never_runs():
    policy = slow(100)
    with served(BestOfN(policy, ScriptedEngine(), n=1), max_running=1) as site:
        running, _ = in_background(site.chat)
        until(lambda: site.server.admission.running == 1)
        abandon(site, {}, lambda: site.server.admission.waiting == 1)
        until(lambda: site.server.admission.waiting == 0)
        running.join(10)
        assert policy.calls == 1


def test_a_client_that_leaves_while_candidates_are_scored_stops_the_scorer():
    scorer = slow(10_000)
    with served(BestOfN(ScriptedEngine(), scorer, n=4, prune=False)) as site:
        abandon(site, {}, lambda: scorer.running > 0)
        until(lambda: scorer.running == 0)


class Mortal(ScriptedEngine):
    """Dies and comes back."""

    dead = False

    def generate(self, *args, **kwargs):
        if self.dead:
            raise EngineError("CUDA error: device-side assert triggered.")
        return super().generate(*args, **kwargs)


def test_a_dead_engine_gives_503_and_turns_ready_red_until_it_works_again(monkeypatch):
    monkeypatch.setattr(bon.serve.health, "PROBE_EVERY_S", 0.05)
    policy = Mortal()
    with served(BestOfN(policy, ScriptedEngine(), n=2)) as site:
        assert site.http.get("/ready").json() == {"status": "ready"}
        policy.dead = True
        with pytest.raises(openai.InternalServerError, match="the log has the details") as died:
            site.openai().chat.completions.create(model="scripted", messages=[{"role": "user", "content": "x"}])
        assert (died.value.status_code, died.value.code) == (503, "engine_error")
        until(lambda: site.http.get("/ready").status_code == 503)
        assert "\nbon_ready 0.0" in site.http.get("/metrics").text
        assert site.http.get("/health").status_code == 200, "the process itself is well"
        assert site.metric("bon_runs_total", outcome="engine_error") == 1
        policy.dead = False
        until(lambda: site.http.get("/ready").status_code == 200)


def test_a_users_function_that_raises_does_not_keep_a_server_out_of_service(monkeypatch):
    monkeypatch.setattr(bon.serve.health, "PROBE_EVERY_S", 0.05)

    def fails(prompt, responses):
        raise ValueError

    policy = Mortal()
    with served(BestOfN(policy, fails, n=2)) as site:
        policy.dead = True
        assert site.chat().status_code == 503
        until(lambda: site.http.get("/ready").status_code == 503)
        policy.dead = False
        until(lambda: site.http.get("/ready").status_code == 200)
        assert site.chat().status_code == 500


def test_an_engine_that_dies_under_a_stream_says_so_inside_the_stream():
    policy = ScriptedEngine(step_seconds=0.02, fail_after=10)
    with served(BestOfN(policy, ScriptedEngine(), n=2)) as site:
        stream = site.openai().chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": "one two three four five six seven"}], stream=True
        )
        with pytest.raises(openai.APIError, match="a model of this server failed"):
            list(stream)
        until(lambda: policy.running == 0)
        until(lambda: site.http.get("/ready").status_code == 503)


def test_a_bug_in_a_users_function_is_one_requests_failure_and_shows_no_trace():
    """One request that a reward function could not handle made /ready fail for everybody."""

    def fails(prompt, responses=None):
        raise ValueError("secret detail")

    for models in ((fails, ScriptedEngine()), (ScriptedEngine(), fails)):
        with served(BestOfN(*models, n=1)) as site:
            failed = site.chat()
            assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")
            assert "secret" not in failed.text
            assert "Traceback" not in failed.text
            assert site.http.get("/ready").status_code == 200


def test_a_bug_in_the_server_gives_500_in_openais_shape_and_no_trace(caplog):
    class Broken(ScriptedEngine):
        def generate(self, *args, **kwargs):
            raise RuntimeError("internal secret")

    with served(BestOfN(Broken(), ScriptedEngine(), n=1)) as site:
        failed = site.chat()
        assert failed.status_code == 500
        assert failed.json()["error"]["type"] == "server_error"
        assert "secret" not in failed.text
        assert site.chat().status_code == 500, "it goes on serving"
        assert site.server.admission.running == 0
    assert any(record.exc_info for record in caplog.records), "the log has the details"


SERVER = """
import sys
from bon import BestOfN
from bon.engines.scripted import ScriptedEngine
from bon.serve import Settings
from bon.serve.process import serve
policy = ScriptedEngine(step_seconds=0.02)
serve(BestOfN(policy, ScriptedEngine(), n=2), Settings(port=0, drain_s=float(sys.argv[1])))
print("RUNNING AT THE END", policy.running, file=sys.stderr)
"""


class Process:
    """A server in a process of its own."""

    def __init__(self, *command, **environment):
        self.process = subprocess.Popen(
            [sys.executable, *command], stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        self.lines = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.url = None
        self.http = httpx.Client(timeout=30, trust_env=False, limits=httpx.Limits(max_connections=None))
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"http://[\d.]+:\d+", line):
                self.url = found.group()
                break
        self.reader.start()

    def ask(self, words, **fields):
        body = {"messages": [{"role": "user", "content": " ".join(words)}], **fields}
        return self.http.post(f"{self.url}/v1/chat/completions", json=body)

    @property
    def running(self):
        text = self.http.get(f"{self.url}/metrics").text
        return int(float(re.search(r"^bon_running_requests (.*)$", text, re.M).group(1)))

    def ended(self):
        self.reader.join(5)
        return "".join(self.lines)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self.reader.join(5)
        self.process.stderr.close()
        self.http.close()


def test_sigterm_under_load_finishes_what_runs_and_refuses_what_is_new():
    with Process("-c", SERVER, "20") as server, ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(server.ask, [f"token{i}"] * 100, stream=i % 2 == 1) for i in range(40)]
        until(lambda: server.running == 40, 10)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.http.get(f"{server.url}/ready").status_code == 503)
        refused = server.ask(["new"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"]
        for i, answer in enumerate(asked):
            response = answer.result(20)
            assert response.status_code == 200
            assert f"token{i} " in response.text, "no answer is lost or crossed"
            assert "data: [DONE]" in response.text or i % 2 == 0
        assert server.process.wait(10) in (0, -signal.SIGTERM)
        assert "drain_cut_off" not in server.ended()


def test_a_drain_that_takes_too_long_is_cut_off():
    with Process("-c", SERVER, "0.3") as server, ThreadPoolExecutor(2) as pool:
        asked = pool.submit(server.ask, ["word"] * 5000)
        until(lambda: server.running == 1, 10)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(15) in (0, -signal.SIGTERM)
        told = asked.result(5)
        assert (told.status_code, told.json()["error"]["code"]) == (503, "draining")
        assert "RUNNING AT THE END 0" in server.ended()


def test_a_second_signal_ends_what_runs_with_an_answer():
    """A second Ctrl-C gave 500s."""
    with Process("-c", SERVER, "20") as server, ThreadPoolExecutor(2) as pool:
        asked = pool.submit(server.ask, ["word"] * 5000)
        until(lambda: server.running == 1, 10)
        server.process.send_signal(signal.SIGINT)
        until(lambda: server.http.get(f"{server.url}/ready").status_code == 503)
        server.process.send_signal(signal.SIGINT)
        told = asked.result(10)
        assert (told.status_code, told.json()["error"]["code"]) == (503, "draining")
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.ended()


def test_a_busy_port_is_noticed_before_any_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with Process("-m", "bon", "serve", "no/such-model", "--port", port) as server:
            assert server.process.wait(30) == 2
            said = server.ended()
    assert f"port {port}" in said
    assert "--port 0 takes any free one" in said
    assert "no/such-model" not in said


def test_a_server_that_others_reach_without_a_key_warns():
    for options, warned in (((), True), (("--api-key", "k"), False)):
        with Process("-m", "bon", "serve", "scripted", "--host", "0.0.0.0", "--port", "0", *options) as server:
            assert ("no API key is set" in "".join(server.lines)) is warned


def test_the_same_complaint_is_written_so_many_times_a_minute():
    """Each request to a dead model wrote its traceback."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(Repeats())
    handler.setFormatter(JsonFormatter())
    log = logging.Logger("test")
    log.addHandler(handler)
    for i in range(1000):
        log.error("run failed")
        log.info("request %d", i)
    lines = stream.getvalue().splitlines()
    assert len([line for line in lines if "run failed" in line]) == 20
    assert "no more of these for a minute" in lines[38]
    assert len([line for line in lines if "request" in line]) == 1000, "each request has its line"


def test_the_command_serves_with_keys_from_the_environment_and_never_logs_them():
    command = ("-m", "bon", "serve", "scripted", "--port", "0", "-n", "2", "--api-key", "sk-2")
    with Process(*command, BON_API_KEY="sk-0,sk-1") as server:
        assert server.ask(["hello"]).status_code == 401
        for key in ("sk-0", "sk-1", "sk-2"):
            server.http.headers["authorization"] = f"Bearer {key}"
            answer = server.ask(["hello"])
            assert answer.status_code == 200
            assert answer.json()["best_of_n"]["n"] == 2
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert "sk-" not in server.ended()


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"max_n": 0}, {"max_running": 0}, {"deadline_s": 0}, {"api_keys": ("",)}, {"max_waiting": -1}):
        with pytest.raises(bon.errors.InputError):
            Settings(**wrong)
