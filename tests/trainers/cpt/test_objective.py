"""The router penalty counts once per optimizer batch and never in evaluation, in models of ours and of transformers.

All blocks are alike, so the penalty of a micro-batch is that of the whole batch and any way of splitting must agree.
"""

import pytest
import torch
from datasets import Dataset

from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from hf_moe_cpt.trainers.cpt.objective import penalty_share
from tests.helpers.cpt_runs import config, logged
from tests.helpers.tiny_models import tiny_model


HEAVY = {"router_aux_loss_coef": 1.0, "output_router_logits": True}
ALIKE = Dataset.from_dict({"input_ids": [list(range(1, 17))] * 8})


def _run(folder, kind: str, batch: int, accumulation: int) -> CPTTrainer:
    args = config(
        folder,
        replay_ratio=0.0,
        max_steps=3,
        per_device_train_batch_size=batch,
        packing="concat",
        gradient_accumulation_steps=accumulation,
        eval_on_start=False,
    )
    return CPTTrainer(tiny_model(kind, **HEAVY), args, ALIKE, eval_dataset=ALIKE)


@pytest.mark.parametrize("kind", ["mixtral", "cpt_moe"])
def test_penalty_weighs_the_same_for_any_accumulation(tmp_path, kind):
    curves = {}
    for batch, accumulation in ((4, 1), (1, 4)):
        run = _run(tmp_path / f"{batch}", kind, batch, accumulation)
        run.train()
        curves[batch] = [logged(run.state.log_history, key) for key in ("loss", "grad_norm")]
    assert curves[1][0] == pytest.approx(curves[4][0], rel=1e-5)
    assert curves[1][1] == pytest.approx(curves[4][1], rel=1e-4)


@pytest.mark.parametrize("kind", ["mixtral", "cpt_moe"])
def test_evaluation_is_the_language_model_loss_alone(tmp_path, kind):
    run = _run(tmp_path, kind, 4, 1)
    ids = torch.tensor([ALIKE[0]["input_ids"]])
    with torch.no_grad():
        logits = run.model.eval()(ids).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert run.evaluate()["eval_new_loss"] == pytest.approx(want, rel=1e-5)


def test_shares_of_micro_batches_sum_to_one():
    labels = torch.randint(0, 9, (6, 8)).masked_fill(torch.rand(6, 8) < 0.3, -100)
    total = labels[:, 1:].ne(-100).sum()
    shares = [penalty_share(part, total) for part in labels.split((1, 2, 3))]
    assert sum(shares) == pytest.approx(1.0)
    assert penalty_share(labels, None) == 1.0
