"""``bon.integrations.losses``: the identities that the papers claim, and TRL's own figure for DPO (marker ``trl``)."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from bon.integrations.losses import dpo, gdro, selm

torch.set_num_threads(1)


def ratios(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dpo_is_log_2_where_nothing_was_learnt_and_falls_with_the_margin() -> None:
    even, ahead, behind = dpo(torch.tensor([0.0, 3.0, -3.0]), torch.zeros(3), beta=1.0).tolist()
    assert even == pytest.approx(math.log(2))
    assert ahead < even < behind
    assert behind - ahead == pytest.approx(3.0)


def test_selm_without_exploration_is_dpo() -> None:
    chosen, rejected, own = ratios(3, 5)
    assert torch.equal(selm(chosen, rejected, own, alpha=0.0, beta=0.3), dpo(chosen, rejected, beta=0.3))


def test_selm_pushes_away_from_what_the_policy_wrote() -> None:
    all_three = ratios(3, 5).requires_grad_()
    selm(*all_three, alpha=0.5, beta=0.2).sum().backward()
    assert all_three.grad is not None
    assert torch.allclose(all_three.grad[2], torch.full((5,), 0.1, dtype=torch.float64))


def test_gdro_of_two_candidates_with_tau_towards_0_is_dpo() -> None:
    pairs = ratios(5, 2)
    rewards = torch.tensor([[1.0, 0.2], [0.9, 0.8], [0.5, 0.4], [1.0, 0.0], [0.3, 0.25]], dtype=torch.float64)
    assert torch.allclose(gdro(pairs, rewards, beta=0.3, tau=1e-6), dpo(*pairs.T, beta=0.3))
    assert not torch.allclose(gdro(pairs, rewards, beta=0.3, tau=1.0), dpo(*pairs.T, beta=0.3))


def test_gdro_with_tau_towards_0_is_the_likelihood_of_the_ranking() -> None:
    scores, rewards = 0.5 * ratios(4), torch.tensor([0.1, 0.9, 0.4, 0.7], dtype=torch.float64)
    chance = dict.fromkeys(permutations(range(4)), 1.0)  # Plackett and Luce, drawn place by place
    for order in chance:
        for place in range(4):
            left = [*order[place:]]
            chance[order] *= float(scores[left].exp()[0] / scores[left].exp().sum())
    assert sum(chance.values()) == pytest.approx(1.0)
    loss = gdro(ratios(4), rewards, beta=0.5, tau=1e-6)
    assert float(loss) == pytest.approx(-math.log(chance[1, 3, 2, 0]))


def test_gdro_does_not_care_in_which_order_candidates_come_nor_about_what_all_share() -> None:
    group, rewards = ratios(6), ratios(6, seed=1)
    mixed = torch.tensor([3, 1, 5, 0, 4, 2])
    assert torch.allclose(gdro(group, rewards), gdro(group[mixed], rewards[mixed]))
    assert torch.allclose(gdro(group, rewards), gdro(group + 7, rewards - 2))


def test_candidates_of_equal_reward_are_drawn_together_by_gdro() -> None:
    group = torch.tensor([2.0, -2.0], dtype=torch.float64, requires_grad=True)
    gdro(group, torch.tensor([0.5, 0.5], dtype=torch.float64), beta=1.0).backward()
    assert group.grad is not None
    assert group.grad[0] > 0 > group.grad[1]  # a step against it brings them together


def test_gamma_raises_the_likelihood_of_the_best_candidate() -> None:
    group, rewards = ratios(3, 4), ratios(3, 4, seed=1)
    best = group.gather(-1, rewards.argmax(-1, keepdim=True)).squeeze(-1)
    assert torch.allclose(gdro(group, rewards, gamma=0.3), gdro(group, rewards) - 0.3 * best)


@pytest.mark.trl
@pytest.mark.filterwarnings("ignore")
def test_dpo_is_what_trls_trainer_computes(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from bon.engines.base import Prompt
    from bon.engines.loading import load
    from bon.engines.text.render import Renderer
    from bon.mini import WEIGHTS
    from bon.task import Task
    from bon.tuning.encoding import Encoded
    from bon.tuning.loss import logprobs

    base, tokenizer = load(WEIGHTS)
    policy, _ = load(WEIGHTS)
    with torch.no_grad():
        for index, weight in enumerate(policy.parameters()):
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
    asked, good, bad = "Write a reminder for Anna to water the plants.", "Hello Anna, water the plants.", "Dear Tom."
    renderer = Renderer(tokenizer)
    prompt = renderer.render(Prompt.of(Task.of(asked).asked))
    newline = renderer.encode("\n")  # which the chat template puts behind the end of a turn, and TRL learns as well
    targets = tuple((*renderer.encode(text), tokenizer.eos_token_id, *newline) for text in (good, bad))
    with torch.no_grad():
        now, then = (logprobs(model, [Encoded(prompt, targets)])[0] for model in (policy, base))
    ours = dpo(*(now - then), beta=0.1)
    row = {
        "prompt": [{"role": "user", "content": asked}],
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }
    how = trl.DPOConfig(
        output_dir=str(tmp_path), beta=0.1, max_steps=1, learning_rate=0.0, per_device_train_batch_size=1, bf16=False,
        use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        policy, ref_model=base, args=how, train_dataset=Dataset.from_list([row]), processing_class=tokenizer
    )
    trainer.train()
    theirs = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert float(theirs) == pytest.approx(float(ours), rel=1e-4)
    assert float(ours) != pytest.approx(-float(logsigmoid(torch.tensor(0.0))), rel=1e-2)
