"""TRL's own trainers take a step on what ``bon export`` writes, with the embedded model."""

import warnings

import pytest
from command import write_rows

from bon.cli import main
from bon.mini import WEIGHTS

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore")]  # the warnings of these libraries are theirs

PROMPTS = ["Write an invitation for Norah to a bonfire at the castle.", "Remind Anna to water the plants on Monday."]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    prompts = write_rows(path.with_name("prompts.jsonl"), [{"id": text, "prompt": text} for text in PROMPTS])
    assert main(["run", str(prompts), "-n", "8", "--seed", "1", "--no-prune", "--all", "-o", str(path)]) == 0
    return path


@pytest.fixture
def loaded(run, tmp_path, monkeypatch):
    """What an export writes, as datasets loads it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load(kind, *options, to):
        assert main(["export", kind, str(run), *options, "-o", str(tmp_path / to)]) == 0
        form = "parquet" if to.endswith(".parquet") else "json"
        return datasets.load_dataset(form, data_files=str(tmp_path / to), split="train")

    return load


def one_step(trainer, config, rows, folder, **options):
    """Take a step; return the trainer, its log, and how far the weights have moved."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype="float32")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    settings = config(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=len(rows),
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **options,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(WEIGHTS)
    made = trainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.train()
    moved = sum(float((value - before[name]).abs().sum()) for name, value in model.named_parameters())
    return made, made.state.log_history[0], moved


@pytest.mark.parametrize("to", ["pairs.jsonl", "pairs.parquet"])
def test_a_step_of_dpo_is_taken_on_exported_pairs(loaded, tmp_path, to):
    trl = pytest.importorskip("trl")
    rows = loaded("pairs", "--reference-response", "--drop-ties", to=to)
    assert len(rows) == len(PROMPTS)
    made, log, moved = one_step(trl.DPOTrainer, trl.DPOConfig, rows, tmp_path / "out")
    assert log["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference are still the same"
    assert moved > 0
    [tokens, *_] = [row for row in made.train_dataset if row["chosen"][0]["content"] == rows[0]["chosen"][0]["content"]]
    decode = made.processing_class.decode
    assert decode(tokens["prompt_ids"]).count(PROMPTS[0]) + decode(tokens["prompt_ids"]).count(PROMPTS[1]) == 1
    assert rows[0]["chosen"][0]["content"] in decode(tokens["chosen_ids"])
    assert rows[0]["rejected"][0]["content"] in decode(tokens["rejected_ids"])


def test_a_step_of_supervised_fine_tuning_is_taken_on_exported_winners(loaded, tmp_path):
    trl = pytest.importorskip("trl")
    rows = loaded("sft", to="winners.parquet")
    made, log, moved = one_step(trl.SFTTrainer, trl.SFTConfig, rows, tmp_path / "out")
    assert 0 < log["loss"] < 5
    assert moved > 0
    learnt = [[label != -100 for label in row["labels"]] for row in made.train_dataset]
    assert all(0 < sum(each) < len(each) and each == sorted(each) for each in learnt), "only the answer is learnt"
