"""A LambdaLR whose saved state is the step alone, so that a resumed run obeys the arguments it is resumed with.

torch's LambdaLR also saves base_lrs and restores them: a run resumed with another peak would keep the old one.
Source: ours.
"""

from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR


class StepLambdaLR(LambdaLR):
    """LambdaLR that saves `last_epoch` (updates made) only; overrides `state_dict` and `load_state_dict`."""

    def state_dict(self) -> dict[str, Any]:
        """The number of updates made, under torch's names."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step of a saved state (also of a plain LambdaLR) and set each group's rate for it at once."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict.get("_step_count", self.last_epoch + 1)
        rates = [base * rate(self.last_epoch) for base, rate in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, base, rate in zip(self.optimizer.param_groups, self.base_lrs, rates, strict=True):
            group["initial_lr"] = base
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates
