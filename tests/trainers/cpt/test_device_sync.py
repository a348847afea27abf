"""On a GPU no step of a run waits for the device: counting loads, losses per source and guards included.

Models of transformers wait once in a forward pass, to look for packed documents; ours only where documents are packed.
"""

import pytest
import torch
from transformers import TrainerCallback

from tests.helpers.cpt_runs import logged, trainer


class ForbidSync(TrainerCallback):
    """Raises at any host synchronisation between the edges of the steps after `first`."""

    def __init__(self, first: int) -> None:
        self.first = first

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.first:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cpt_moe", "cpt_moe sinkhorn", "cpt_moe switch"])
def test_no_step_waits_for_the_device(tmp_path, kind):
    run = trainer(
        tmp_path / "run",
        kind,
        max_steps=8,
        logging_steps=8,
        gradient_accumulation_steps=2,
        packing="concat",
        use_cpu=False,
        bf16=True,
    )
    run.add_callback(ForbidSync(first=2))
    try:
        run.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(logged(run.state.log_history, "lm_loss/replay")) == 1
