"""Rows over many machines, on real clusters of Ray's on this one: the same rows, whatever dies on the way."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from command import process, rows_of, write_rows

from bon import BestOfN
from bon.cli import main
from bon.config import Config
from bon.errors import InputError
from bon.mini.tasks import sample_instructions

pytest.importorskip("ray", reason="pip install -e '.[ray]'")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning"),
]

MINE = ["--policy", "mine:policy", "--scorer", "mine:reward", "-n", "2"]
CODE = """
import os, signal, time
from pathlib import Path

def policy(prompt, n):
    number = int(prompt.split()[-1])
    time.sleep(0.01)
    if number == 70 and Path("kill").exists():
        Path("kill").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 71 and Path("poison").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7 and Path("refuse").exists():
        raise ValueError("not seven")
    return [f"{prompt} {i}" for i in range(n)]

def reward(prompt, responses):
    return [float(response[-1]) for response in responses]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with 400 prompts, and a policy and a reward of the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    ask(400)
    return tmp_path


def ask(count):
    write_rows(Path("in.jsonl"), [{"id": number, "prompt": f"Say {number}"} for number in range(count)])


@pytest.fixture(scope="module")
def cluster():
    """A node with room for two workers."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield made
    made.shutdown()


def shards(folder):
    return [row for path in sorted(Path(folder).iterdir()) for row in rows_of(path)]


def expected(numbers=range(400)):
    return [(number, f"Say {number} 1", 1.0) for number in numbers]


def found(folder):
    return [(row["id"], row["text"], row["reward"]) for row in shards(folder)]


def without_times(rows):
    for row in rows:
        for timed in (row, *row["candidates"], *row["scores"]):
            for name in ("timing", "started", "finished"):
                timed.pop(name, None)
    return rows


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def stopped(running):
    """What a command said that is to end by itself."""
    out, err = running.communicate(timeout=240)
    return running.returncode, out.decode(), err.decode()


# --- The same rows ---------------------------------------------------------------------------------------------------


def test_the_rows_are_those_of_one_machine_and_stand_in_the_order_of_the_input(cluster, tmp_path, capsys):
    rows = [{"prompt": prompt, "tag": [place]} for place, prompt in enumerate(sample_instructions(150, 3))]
    source = write_rows(tmp_path / "in.jsonl", rows)
    options = ["-n", "4", "--seed", "5"]
    assert main(["run", str(source), "-o", str(tmp_path / "one.jsonl"), *options]) == 0
    ray = ["--ray", cluster.address, "--workers", "2"]
    assert main(["run", str(source), "-o", str(tmp_path / "out"), *ray, *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "150 rows done; mean reward" in captured.err
    assert shards(tmp_path / "out") == sorted(rows_of(tmp_path / "one.jsonl"), key=lambda row: row["line"])


def test_all_writes_every_candidate_and_reward_as_on_one_machine(cluster, folder):
    options = ["--all", "--limit", "70", *MINE]
    assert main(["run", "in.jsonl", "-o", "one.jsonl", *options]) == 0
    assert main(["run", "in.jsonl", "-o", "out", "--ray", cluster.address, *options]) == 0
    one = sorted(without_times(rows_of(folder / "one.jsonl")), key=lambda row: row["id"])
    assert without_times(shards("out")) == one
    assert len(one[0]["candidates"]) == 2


def test_folders_of_json_lines_and_parquet_are_read_and_each_file_has_its_shards(cluster, folder):
    import pyarrow
    from pyarrow import parquet

    (folder / "in").mkdir()
    os.rename("in.jsonl", "in/b.jsonl")
    table = pyarrow.table({"id": [1000, 1001], "prompt": ["Say 1000", "Say 1001"]})
    parquet.write_table(table, folder / "in" / "a.parquet")
    (folder / "in" / "README.md").write_text("no rows")
    command = ["run", "in", "-o", "out", "--ray", cluster.address, *MINE]
    assert main([*command, "--limit", "100"]) == 0
    assert found("out") == expected([1000, 1001, *range(98)])
    assert main([*command, "--resume"]) == 0
    assert found("out") == expected([1000, 1001, *range(400)])


def test_a_dataset_of_rays_becomes_one_with_the_best_of_each_row(cluster, folder):
    import ray

    from bon.data import ray as over_ray

    (folder / "refuse").touch()
    rows = [{"id": number, "prompt": f"Say {number}", "more": {"a": [number]}, "line": "mine"} for number in range(9)]
    ray.init(cluster.address, log_to_driver=False)
    try:
        config = Config(policy="mine:policy", scorer="mine:reward", n=2)
        for spec in (config, config.to_dict()):
            done = over_ray.run(ray.data.from_items([*rows, {"id": 9, "prompt": None}]), spec)
            made = {row["id"]: row for row in done.take_all()}
            assert [made[number]["text"] for number in range(7)] == [f"Say {number} 1" for number in range(7)]
            assert (made[3]["more"], made[3]["line"], "run" in made[3]) == ({"a": [3]}, "mine", False)
            assert (made[7]["text"], made[7]["status"]) == (None, "error")
            assert "not seven" in made[7]["reason"]
            assert "neither 'prompt' nor 'messages'" in made[9]["reason"]
        with pytest.raises(InputError, match="a dataset of Ray's is needed, not list"):
            over_ray.run(rows, config)
        with pytest.raises(InputError, match="is an object of its own, and has no spec"):
            over_ray.run(ray.data.from_items(rows), BestOfN(lambda prompt, n: ["a"] * n, lambda prompt, answers: [1.0]))
    finally:
        ray.shutdown()


def test_more_workers_than_there_is_room_for_start_when_there_is(cluster, folder, capsys):
    assert main(["run", "in.jsonl", "-o", "out", "--ray", cluster.address, "--workers", "3", *MINE]) == 0
    assert "the cluster has room for 2 of 3 workers; others start when it has more" in capsys.readouterr().err
    assert found("out") == expected()


def test_each_worker_has_its_own_connections_to_a_server(cluster, folder):
    pytest.importorskip("aiohttp", reason="pip install -e '.[http]'")
    from fake_openai import FakeServer

    with FakeServer() as server:
        policy = ["--policy", f"{server.url},model=fake", "--scorer", "longest", "-n", "2"]
        assert main(["run", "in.jsonl", "-o", "out", "--ray", cluster.address, "--workers", "2", *policy]) == 0
    assert [row["id"] for row in shards("out")] == list(range(400))
    assert all(row["text"] for row in shards("out"))


# --- What dies -------------------------------------------------------------------------------------------------------


def test_a_killed_driver_loses_no_block_that_was_finished_and_resuming_does_the_others_only(cluster, folder):
    ask(1500)
    command = ["run", "in.jsonl", "-o", "out", "--ray", cluster.address, *MINE]
    running = process(*command, cwd=folder)
    wait_for(lambda: len(list(Path("out").glob("*.jsonl"))) >= 1)
    running.kill()
    running.communicate()
    kept = {path: path.read_bytes() for path in Path("out").glob("*.jsonl")}
    assert 0 < len(kept) < 12
    code, _, err = stopped(process(*command, "--resume", "--workers", 2, cwd=folder))
    assert code == 0
    assert f"{len(kept) * 128} done before" in err
    assert found("out") == expected(range(1500))
    assert all(path.read_bytes() == data for path, data in kept.items())


def test_a_killed_worker_costs_no_row_and_doubles_none(cluster, folder):
    (folder / "kill").touch()
    command = ["run", "in.jsonl", "-o", "out", "--ray", cluster.address, "--workers", 2, *MINE]
    code, out, err = stopped(process(*command, cwd=folder))
    assert code == 0, err
    assert out == ""
    assert not (folder / "kill").exists()
    assert found("out") == expected()


def test_a_killed_node_costs_no_row_and_doubles_none(folder):
    from ray.cluster_utils import Cluster

    ask(1500)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = made.add_node(num_cpus=1)
        command = ["run", "in.jsonl", "-o", "out", "--ray", made.address, "--workers", 2, *MINE]
        running = process(*command, cwd=folder)
        wait_for(lambda: len(list(Path("out").glob("*.jsonl"))) >= 2)
        made.remove_node(node, allow_graceful=False)
        code, _, err = stopped(running)
    finally:
        made.shutdown()
    assert code == 0, err
    assert found("out") == expected(range(1500))


def test_a_prompt_that_kills_every_worker_is_given_up_and_the_other_blocks_are_done(cluster, folder):
    (folder / "poison").touch()
    command = ["run", "in.jsonl", "-o", "out", "--ray", cluster.address, *MINE]
    code, _, err = stopped(process(*command, cwd=folder))
    assert code == 1
    lost = {row["id"] for row in shards("out") if row["text"] is None}
    assert 71 in lost
    assert len(shards("out")) == 400
    assert "5 workers died, one after another, while they did the rows of in.jsonl.000000001-000000128.jsonl" in err
    (folder / "poison").unlink()
    assert stopped(process(*command, "--resume", cwd=folder))[0] == 0
    assert found("out") == expected()


def test_control_c_keeps_what_is_finished_and_says_how_to_go_on(folder):
    ask(1500)
    running = process("run", "in.jsonl", "-o", "out", "--ray", "local", *MINE, cwd=folder, start_new_session=True)
    wait_for(lambda: len(list(Path("out").glob("*.jsonl"))) >= 1)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal sends it
    code, _, err = stopped(running)
    assert code == 130
    assert "The same command with --resume goes on from there." in err
    assert 0 < len(shards("out")) < 1500


# --- What it will take -----------------------------------------------------------------------------------------------


def test_the_plan_is_measured_in_as_many_workers_as_there_are_to_be(cluster, folder, capsys):
    command = ["plan", "in.jsonl", "--ray", cluster.address, *MINE, "--block", "20", "--json"]
    assert main([*command, "--workers", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prompts"], report["workers"], len(report["costs"])) == (400, 2, 2)
    assert [cost["prompts"] for cost in report["costs"]] == [100, 100]
    assert report["seconds"] > 0.999 * 400 / report["prompts_per_second"]
    assert main([*command, "--workers", "5"]) == 0
    assert len(json.loads(capsys.readouterr().out)["costs"]) == 2  # what there is room for
    assert main([*command, "--policy", "/no/such/model"]) == 2
    assert "cannot be set up: " in capsys.readouterr().err


def test_the_benchmark_of_predictions_runs_to_its_last_line(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import many_machines

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    many_machines.main(
        ["--quick", "--workers", "1", "--prompts", "40", "-n", "2", "--out", str(tmp_path / "many.json")]
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((tmp_path / "many.json").read_text())
    assert report["ratios"].keys() == {"seconds_1"}
    assert [row["workers"] for row in report["rows"]] == [1]


# --- What is wrong ---------------------------------------------------------------------------------------------------


def test_rows_that_fail_are_rows_of_their_own_and_are_tried_again_by_resume(cluster, folder, capsys):
    (folder / "refuse").touch()
    command = ["run", "in.jsonl", "-o", "out", "--ray", cluster.address, *MINE, "--limit", "150"]
    assert main(command) == 2
    assert "in.jsonl:8: the function 'mine:policy' raised ValueError: not seven" in capsys.readouterr().err
    assert [row["id"] for row in shards("out")] == list(range(150))
    [failed] = [row for row in shards("out") if row["status"] == "error"]
    assert (failed["id"], failed["text"], failed["reward"]) == (7, None, None)
    (folder / "refuse").unlink()
    assert main([*command, "--resume"]) == 0
    assert "1 row done; 149 done before" in capsys.readouterr().err
    assert found("out") == expected(range(150))


def test_shards_of_other_settings_are_refused(cluster, folder, capsys):
    command = ["run", "in.jsonl", "-o", "out", "--ray", cluster.address, *MINE, "--limit", "3"]
    assert main(command) == 0
    assert main([*command, "--resume", "--selector", "top-k:2"]) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert found("out") == expected(range(3))


def test_a_worker_that_cannot_be_set_up_says_why_and_once(cluster, folder, capsys):
    command = ["run", "in.jsonl", "-o", "out", "--ray", cluster.address, "--workers", "2", "--scorer", "longest"]
    assert main([*command, "--policy", "/no/such/model"]) == 2
    captured = capsys.readouterr()
    [said] = [line for line in captured.err.splitlines() if line.startswith("bon: error")]
    assert said.startswith(f"bon: error: a worker on {socket.gethostname()} cannot be set up:")
    assert "/no/such/model" in said
    assert "Traceback" not in captured.err
    assert not Path("out").exists()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (f"127.0.0.1:{free_port()}", "no Ray cluster answers at '127.0.0.1:"),
        ("nowhere", "'nowhere' is no address of a Ray cluster. Write HOST:PORT, auto, or local."),
    ],
)
def test_an_address_where_no_cluster_answers_is_named_with_what_to_type(folder, capsys, address, said):
    assert main(["run", "in.jsonl", "-o", "out", "--ray", address, *MINE]) == 2
    captured = capsys.readouterr().err
    assert said in captured
    assert captured.count("\n") == 1


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_a_server_that_is_no_cluster_is_told_from_one(folder, capsys, answer, monkeypatch):
    monkeypatch.setattr("bon.data.ray._ANSWERS_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            there, _ = server.accept()
            with there:
                there.sendall(answer)
                there.recv(1000)
                time.sleep(1)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert main(["run", "in.jsonl", "-o", "out", "--ray", address, *MINE]) == 2
        thread.join()
    assert f"no Ray cluster answers at '{address}': " in capsys.readouterr().err


def test_workers_that_no_machine_has_room_for_are_refused(cluster, folder, capsys):
    command = ["run", "in.jsonl", "-o", "out", "--ray", cluster.address, *MINE]
    assert main([*command, "--worker-gpus", "1"]) == 2
    assert "no machine of the cluster has more than 0. Give --worker-gpus less." in capsys.readouterr().err
    assert main([*command, "--worker-cpus", "64"]) == 2
    assert "no machine of the cluster has more than 2. Give --worker-cpus less." in capsys.readouterr().err
