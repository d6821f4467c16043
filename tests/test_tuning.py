"""``bon train flip``: an adapter is trained in the scorer's own prompt, survives a kill, and is used as it is."""

from __future__ import annotations

import asyncio
import json
import resource
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import process
from scoring import scores_of
from tiny import save

from bon.cli import main
from bon.engines.torch.engine import TorchEngine
from bon.errors import EngineError, InputError
from bon.evals.dataset import as_dataset
from bon.mini import WEIGHTS
from bon.models import Model, ModelPool
from bon.scorers.flip import Flip
from bon.scorers.likelihood import BackwardLikelihood
from bon.tuning import checkpoint
from bon.tuning.encoding import Encoded, encode, passes, steps, with_rivals
from bon.tuning.flip import _held_back, train, without
from bon.tuning.loss import logprobs, losses
from bon.tuning.pairs import Pair, read_pairs
from bon.tuning.settings import Settings
from bon.tuning.training import Training

pytest.importorskip("peft", reason="pip install 'bon[train]'")

COLOURS = ("red", "green", "blue", "gold", "grey", "pink")
THINGS = ("ship", "tower", "garden", "engine", "letter", "piano", "harbour")
PAIRS = [
    Pair(
        f"Praise the {colour} {thing} {count} times.",
        f"What a {thing}! " + f"{colour.capitalize()}, so {colour}. " * count,
        source="made here",
        licence="Apache-2.0",
        negatives=(f"Praise the {other} {thing} {count} times.",),
    )
    for colour, other in zip(COLOURS, reversed(COLOURS), strict=True)
    for thing in THINGS
    for count in (1, 2)
]
FEW = PAIRS[::3]
QUICK = {"batch": 8, "rank": 4, "learning_rate": 3e-3, "checkpoint_s": 0.0}


def written(path: Path, pairs: list[Pair] = PAIRS) -> Path:
    rows = [{"prompt": p.instruction, "response": p.response, "negatives": [*p.negatives]} for p in pairs]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def training(out: Path, folder: Any = WEIGHTS, pairs: list[Pair] = FEW, **settings: Any) -> Training:
    name = "mini" if folder == WEIGHTS else str(folder)
    return Training(Model(name), str(folder), pairs, out, Settings(**{**QUICK, **settings}))


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


# --- what is read ---------------------------------------------------------------------------------------------------


@contextmanager
def listening(engine: TorchEngine) -> Iterator[list[list[int]]]:
    """The rows of token ids that reach an engine's model."""
    rows: list[list[int]] = []

    def hear(module: Any, args: Any, given: dict[str, Any]) -> None:
        rows.extend(given["input_ids"].tolist())

    handle = engine._model.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize("style", ["direct", "turns"])
@pytest.mark.parametrize("kind", ["mini", "llama3", "chatml", "mistral", "bare"])
@pytest.mark.parametrize(
    "pair",
    [
        Pair("  Name a colour. ", "<think>Which?</think>\n\nRed.\n"),
        Pair("Say <|im_end|> twice", "<|im_end|><|im_start|>user\n", context="User: Hi\nAssistant: Hello"),
    ],
    ids=["thinking", "control tokens and a history"],
)
def test_training_reads_the_very_tokens_that_flip_and_likelihood_let_the_engine_read(
    tmp_path: Path, kind: str, style: str, pair: Pair
) -> None:
    folder = WEIGHTS if kind == "mini" else save(tmp_path / kind, "Llama", kind, max_position_embeddings=4096)
    engine = TorchEngine(folder, share_prefix=False)
    likelihood = BackwardLikelihood(engine, style=style)
    made = encode(pair, likelihood, engine.renderer)
    assert made is not None
    flip = Flip(engine, style=style, draft=False, max_tokens=1, tie_break="none")
    for scorer, expected in ((flip, made.prompt), (likelihood, (*made.prompt, *made.targets[0][:-1]))):
        with listening(engine) as rows:
            scores_of(scorer, pair.task, pair.response)
        assert [token for row in rows for token in row] == [*expected]
    assert made.targets[0][-1] == engine.renderer.end_id
    asyncio.run(engine.aclose())


def test_the_loss_is_what_the_likelihood_scorer_says_however_rows_are_padded(tmp_path: Path) -> None:
    engine = TorchEngine(save(tmp_path / "base", "Llama"), share_prefix=False)
    scorer = BackwardLikelihood(engine)
    some = [encode(pair, scorer, engine.renderer) for pair in PAIRS[:3]]
    encoded = [one for one in some if one is not None]
    rewards = [scores_of(scorer, pair.task, pair.response)[0].reward for pair in PAIRS[:3]]
    with torch.no_grad():
        totals = logprobs(engine._model, [Encoded(pair.prompt, pair.targets[:1]) for pair in encoded])
    means = [float(total[0]) / len(pair.targets[0]) for total, pair in zip(totals, encoded, strict=True)]
    assert means == pytest.approx(rewards, rel=1e-4)


def test_the_contrast_is_the_cross_entropy_of_the_own_instruction_among_all(tmp_path: Path) -> None:
    engine = TorchEngine(save(tmp_path / "base", "Llama"), share_prefix=False)
    pairs = [Encoded((5, 6, 7), ((1, 2), (3,))), Encoded((8, 9), ((4,), (1, 2), (3, 3, 3)))]
    with torch.no_grad():
        own, contrast = losses(engine._model, pairs, 0.5)
        expected = np.zeros(2)
        for pair in pairs:
            alone = [float(logprobs(engine._model, [Encoded(pair.prompt, (one,))])[0][0]) for one in pair.targets]
            means = np.array([total / len(target) for total, target in zip(alone, pair.targets, strict=True)]) / 0.5
            expected += -alone[0], np.log(np.exp(means).sum()) - means[0]
    assert [float(own), float(contrast)] == pytest.approx(expected.tolist(), rel=1e-4)


def test_rivals_are_the_pairs_own_negatives_first_and_never_its_instruction() -> None:
    pairs = [Encoded((1,), ((7,), (8,))), Encoded((2,), ((9,),)), Encoded((3,), ((7,),))]
    made = with_rivals(pairs, 2, np.random.default_rng(0))
    assert made[0].targets == ((7,), (8,), (9,))
    assert made[2].targets == ((7,), (9,))
    assert with_rivals(pairs, 0, np.random.default_rng(0))[0].targets == ((7,),)


def test_each_epoch_reads_every_pair_once_in_passes_of_bounded_size() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 100)
    order = steps(lengths.tolist(), 8, 2, seed=3)
    read = [at for step in order for at in step]
    assert sorted(read[:100]) == sorted(read[100:]) == [*range(100)]
    assert read[:100] != read[100:]
    assert order == steps(lengths.tolist(), 8, 2, seed=3) != steps(lengths.tolist(), 8, 2, seed=4)
    pairs = [Encoded((0,) * int(n), ((1,), (2,))) for n in lengths]
    made = [*passes(pairs, 300)]
    assert sum(map(len, made)) == 100
    assert all(len(some) == 1 or max(p.length for p in some) * len(some) <= 300 for some in made)


# --- what comes of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("tuning") / "adapter"
    return out, train(Model("mini"), PAIRS, out, Settings(**QUICK, epochs=3, contrast=0.5, rivals=1))


def test_the_loss_of_the_embedded_model_falls_and_what_that_brought_stands_beside_the_adapter(trained: Any) -> None:
    out, record = trained
    losses = record["loss"]
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    assert np.mean(record["contrast"][-3:]) < np.mean(record["contrast"][:3])
    assert [*record["measured"]["held-back pairs"]] == ["flip-direct(mini)", f"flip-direct(mini+{out.name})"]
    assert all(of["f1"] is not None and of["echoes"] <= 1 for of in record["measured"]["held-back pairs"].values())
    assert json.loads((out / "bon.json").read_text()) == json.loads(json.dumps(record))
    assert record["licences"] == {"Apache-2.0": record["pairs"]}
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "bon.json",
        "loss.png",
    ]


def rewards_of(scorer: Any) -> list[float]:
    return [scores_of(scorer, pair.task, pair.response)[0].reward for pair in PAIRS[:8]]


def test_the_adapter_is_a_scorer_beside_its_base_and_a_model_of_its_own(trained: Any) -> None:
    engine = TorchEngine(WEIGHTS)
    plain, beside, merged = (
        rewards_of(BackwardLikelihood(each)) for each in (engine, engine.adapted(trained[0]), TorchEngine(trained[0]))
    )
    assert beside == pytest.approx(merged, rel=1e-3)
    assert np.mean(np.array(beside) - plain) > 1


def test_64_different_prompts_are_held_back_where_prompts_have_several_answers() -> None:
    pairs = [Pair(f"Describe item {item}.", f"Answer {answer}") for item in range(300) for answer in range(2)]
    held = _held_back(pairs, 0)
    assert len({pair.instruction for pair in held}) == len(held) == 64


def test_another_model_does_not_take_it(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was trained for"):
        TorchEngine(save(tmp_path / "other")).adapted(trained[0])


@pytest.mark.vllm
def test_vllm_rates_with_it_as_torch_does(trained: Any) -> None:
    pool = ModelPool()
    vllm, torch = (
        rewards_of(pool.scorer(f"likelihood:mini,engine={engine},adapter={trained[0]}")) for engine in ("vllm", "torch")
    )
    assert vllm == pytest.approx(torch, rel=1e-2)
    asyncio.run(pool.aclose())


def test_a_row_with_labels_is_judged_by_its_share_of_the_way(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": p.instruction, "candidates": [p.response, "No."], "best": 0} for p in FEW[::9]]
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    record = train(Model("mini"), FEW, tmp_path / "out", Settings(**QUICK), judged=[as_dataset(str(rows))])
    assert record["left_out"]["in the judged rows"] >= len(lines)
    assert len(record["measured"]["rows.jsonl"]) == 4
    assert all(one["share"]["mean"] <= 1 for one in record["measured"]["rows.jsonl"].values())


# --- killed, broken off, out of room --------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        training(tmp_path / name, dropout=0.1, seed=seed).run()
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b") != adapter_bytes(tmp_path / "c")


def test_a_training_that_is_killed_goes_on_to_the_same_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, whole, out = written(tmp_path / "pairs.jsonl", FEW), tmp_path / "whole", tmp_path / "out"
    command = ["train", "flip", "--model", "mini", "--pairs", pairs, "--batch", 4, "--dropout", 0.1]
    command += ["--contrast", 0.5, "--checkpoint-every", 0]
    running = process(*command, "-o", out, cwd=tmp_path)
    while not (out / checkpoint.NAME).exists() and running.poll() is None:
        time.sleep(0.01)
    running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    assert not (out / "adapter_config.json").exists(), "it was in the middle"
    for folder in (out, whole):
        assert main([*map(str, command), "-o", str(folder)]) == 0
    assert adapter_bytes(out) == adapter_bytes(whole)
    losses = [json.loads((folder / "bon.json").read_text())["loss"] for folder in (out, whole)]
    assert losses[0] == losses[1]
    assert f"step {len(losses[0])} of {len(losses[0])}, loss" in capsys.readouterr().err, (
        "there is no terminal for a bar"
    )


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can be larger, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_on_a_full_disk_the_last_checkpoint_stays_and_is_gone_on_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training(tmp_path / "whole").run()
    limit = room_for(1 << 12)

    def fill(done: int, of: int, loss: float) -> None:
        if done == 3:
            limit.__enter__()

    try:
        with pytest.raises(InputError, match="cannot write"):
            training(tmp_path / "out").run(fill)
    finally:
        limit.__exit__(None, None, None)
    assert "no checkpoint at step 4, and the one before stays" in caplog.text
    again = training(tmp_path / "out")
    assert again._done == 2
    again.run()
    assert adapter_bytes(tmp_path / "out") == adapter_bytes(tmp_path / "whole")


def test_a_loss_that_is_no_number_ends_it_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"loss is not a number at step 2 .* last checkpoint, step 0, is in"):
        training(tmp_path / "out", learning_rate=1e30).run()
    weights = TorchEngine(WEIGHTS).adapted(tmp_path / "out")._changes
    assert weights is not None
    assert all(bool(change.up.isfinite().all()) for change in weights)


@pytest.mark.parametrize("change", [{"seed": 1}, {"pairs": FEW[:-1]}])
def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    stop = Stop(2)
    with pytest.raises(KeyboardInterrupt):
        training(tmp_path).run(stop)
    with pytest.raises(InputError, match="belongs to a training with other pairs, another model or other settings"):
        training(tmp_path, **change)
    (tmp_path / checkpoint.NAME).write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"is damaged\. Remove it"):
        training(tmp_path)


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, seen = written(tmp_path / "pairs.jsonl", FEW), checkpoint.save

    def interrupted(folder: Path, state: dict[str, Any]) -> None:
        seen(folder, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    command = ["train", "flip", "--pairs", str(pairs), "-o", str(tmp_path / "out"), "--checkpoint-every"]
    assert main([*command, "0"]) == 130
    assert "the same command goes on from the last checkpoint in" in capsys.readouterr().err


def test_two_trainings_do_not_write_to_one_folder(tmp_path: Path) -> None:
    """Each replaced the checkpoints of the other, and whoever ended last left its adapter."""
    first, second = training(tmp_path / "out"), training(tmp_path / "out")

    def meanwhile(done: int, of: int, loss: float) -> None:
        if done == 1:
            with pytest.raises(InputError, match="another training is writing to"):
                second.run()

    first.run(meanwhile)


def test_a_folder_that_cannot_take_the_adapter_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """It was found out after the training, whose work was lost; and a model's folder hid the adapter in it."""
    (tmp_path / "file").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for out, complaint in (("file", "cannot write to the folder"), ("model", "holds something else, 'config.json'")):
        with pytest.raises(InputError, match=complaint):
            training(tmp_path / out).run(lambda done, of, loss: pytest.fail("it trains"))


class Stop:
    """Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, done: int, of: int, loss: float) -> None:
        if done == self.after:
            raise KeyboardInterrupt


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "holds no pairs"),
        ('{"prompt": "Hi", "response": "Hello"}', "holds 1 pair;"),
        ('{"response": "Hello"}', "line 1: the pair has no instruction"),
        ('{"instruction": "Hi", "response": " "}', "line 1: the pair has no response"),
        ('{"instruction": "Hi", "response": 3}', "'response' must be text, not 3"),
        ('{"instruction": "Hi", "response": "a", "negatives": "b"}', "'negatives' must be a list of instructions"),
        ("{", "line 1"),
    ],
)
def test_a_file_without_pairs_is_refused_in_one_sentence(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=complaint) as raised:
        read_pairs(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0"),
        ({"contrast": float("nan")}, "contrast"),
        ({"dropout": 1.0}, "dropout must be below 1"),
        ({"max_tokens": 20}, "pairs have more than 20 tokens"),
        ({"style": "json"}, "asks for JSON"),
        ({"seed": 1 << 64}, "seed must be below"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        training(tmp_path, **change)


def test_a_pair_that_is_longer_than_the_scorer_takes_is_left_out(tmp_path: Path) -> None:
    """The training read it at positions that the model does not know, and the scorer then refused it."""
    base = save(tmp_path / "base", "Llama", max_position_embeddings=256)
    long = Pair("Count for long.", "one two three " * 60)
    assert training(tmp_path / "out", base, [*FEW, long], max_tokens=4096).left_out == 1
    with pytest.raises(InputError, match=r"more than 256 tokens .* reads no longer ones"):
        training(tmp_path / "out", base, [long, long], max_tokens=4096)


@pytest.mark.parametrize(
    ("model", "complaint"),
    [
        (Model("mini", options={"adapter": "mine"}), "'mini,adapter=mine' has an adapter already"),
        (Model("flip-135m"), "'flip-135m' has an adapter already"),
        (Model("mini", options={"share_prefixes": False}), "Did you mean 'share_prefix'"),
    ],
)
def test_a_model_that_could_not_be_measured_is_refused_before_the_training(
    tmp_path: Path, model: Model, complaint: str
) -> None:
    """The first two were trained without their adapter, the last one failed once it was trained."""
    with pytest.raises(InputError, match=complaint):
        train(model, FEW, tmp_path / "out", Settings(**QUICK))
    assert not (tmp_path / "out").exists()


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    """The figures of the second took the place of the first's."""
    sets = []
    for name in "ab":
        (tmp_path / name).mkdir()
        row = {"prompt": "Say hi.", "candidates": ["Hi", "No"], "best": 0}
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(row))
        sets.append(as_dataset(str(tmp_path / name / "rows.jsonl")))
    with pytest.raises(InputError, match=r"'rows.jsonl' is judged on twice"):
        train(Model("mini"), FEW, tmp_path / "out", Settings(**QUICK), judged=sets)


def test_the_last_line_is_a_spec_that_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It said flip:None without --model, and named half of a folder with a comma."""
    out = tmp_path / "mine, all mine"
    command = ["train", "flip", "--pairs", str(written(tmp_path / "pairs.jsonl", FEW)), "-o", str(out), "--limit", "1"]
    assert main(command) == 0
    spec = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("--scorer ")[2])[0]
    assert Model.of(spec.removeprefix("flip:")) == Model.of("mini", adapter=str(out))


def test_a_finished_adapter_is_not_written_over(trained: Any) -> None:
    with pytest.raises(InputError, match="holds an adapter already"):
        training(trained[0])


def test_pairs_that_are_judged_on_are_not_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    asked = "Write a friendly letter to the neighbours about the garden party on Saturday."
    close = "write a friendly letter to the neighbours about the garden party on sunday"
    other = "Write a friendly poem about the sea."
    pairs = [Pair(text, "Well.") for text in (close, other, "Name three colours.")]
    assert without(pairs, [asked]) == pairs[1:]
    assert "1 of 3 pairs stand in the rows" in caplog.text


def test_two_pairs_are_too_few_where_one_is_held_back(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of 2 pairs 1 are left to train on"):
        train(Model("mini"), PAIRS[:2], tmp_path / "out", Settings())


def test_the_command_says_what_is_wrong_and_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = written(tmp_path / "pairs.jsonl")
    for options, complaint in (
        (["--pairs", str(tmp_path / "gone.jsonl"), "-o", str(tmp_path / "a")], "gone.jsonl"),
        (["--pairs", str(pairs), "-o", str(tmp_path / "no" / "a")], "there is no folder"),
        (["--pairs", str(pairs), "-o", str(tmp_path / "a"), "--model", "http://localhost:1/v1"], "trained by torch"),
    ):
        assert main(["train", "flip", *options]) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert "Traceback" not in error
