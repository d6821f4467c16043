"""How many threads a model on the CPU gets."""

import asyncio
from pathlib import Path

import pytest
import torch

from bon.engines.torch.engine import TorchEngine
from bon.engines.torch.threads import _times, threads_for
from bon.errors import InputError
from bon.mini import WEIGHTS


@pytest.mark.parametrize(
    ("cores", "quota", "busy", "threads"),
    [
        (8, None, 0.0, 8),
        (8, None, 0.4, 8),
        (8, None, 3.1, 5),  # cores that others keep busy are theirs
        (2, None, 1.0, 1),
        (2, None, 2.0, 1),  # never none
        (16, 4.0, 0.0, 4),  # a container's share
        (16, 2.5, 0.0, 2),
        (16, 0.5, 0.0, 1),
        (4, 8.0, 0.0, 4),
    ],
)
def test_a_model_gets_the_cores_that_are_its_own_and_free(cores, quota, busy, threads):
    assert threads_for(cores, quota, busy) == threads


def test_the_times_of_each_processor_are_read_and_not_their_sum(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 10 0 5 80 5 0 0 0 0 0\ncpu1 1 0 1 8 0 0 0 0 7 7\nintr 5\n")
    assert _times(stat) == {0: (85, 100), 1: (8, 10)}
    assert _times(Path(tmp_path / "none")) == {}


def test_the_option_sets_the_threads_of_the_models_own_thread():
    engine = TorchEngine(WEIGHTS, threads=2)
    before = torch.get_num_threads()
    assert engine._worker._thread.submit(torch.get_num_threads).result() == 2
    assert torch.get_num_threads() == before  # of everybody else
    asyncio.run(engine.aclose())


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "two"])
def test_threads_that_are_no_number_are_refused(threads):
    with pytest.raises(InputError, match="threads must be a whole number of at least 1"):
        TorchEngine(WEIGHTS, threads=threads)
