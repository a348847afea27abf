"""The penalties weigh the same for any accumulation count: transformers' Trainer takes the same step."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from tests.helpers.tolerances import relative_rms_error


def router_update(tmp_path, accumulation: int, z_loss_coef: float) -> torch.Tensor:
    """What one SGD step on 8 sequences does to all routers, in `accumulation` micro-batches."""
    torch.manual_seed(0)
    config = CptMoeConfig.from_preset(
        "pb-granular-tiny",
        vocab_size=64,
        num_hidden_layers=2,
        router_aux_loss_coef=0.0,  # not linear in the batch: only its scale is the same, not its value
        router_z_loss_coef=z_loss_coef,
        output_router_logits=True,
    )
    model = CptMoeForCausalLM(config)
    before = torch.stack([layer.mlp.gate.weight.detach().clone() for layer in model.model.layers])
    tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1)).tolist()
    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
    )
    trainer.train()
    return torch.stack([layer.mlp.gate.weight.detach() for layer in model.model.layers]) - before


def test_one_step_is_the_same_for_any_accumulation(tmp_path) -> None:
    whole = router_update(tmp_path, 1, 0.1)
    without_penalty = router_update(tmp_path, 1, 0.0)
    assert relative_rms_error(whole, without_penalty) > 0.5, "the penalty must be visible for this test to see it"
    for accumulation in (2, 4):
        error = relative_rms_error(router_update(tmp_path, accumulation, 0.1), whole)
        assert error == pytest.approx(0.0, abs=2e-5)
