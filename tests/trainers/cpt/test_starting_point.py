"""Which checkpoints warm up again, and Adam moments that travel to the next run."""

import pytest
import torch

from hf_moe_cpt.trainers.cpt.starting_point import detect_starting_phase, load_moments, read_state, write_state


@pytest.mark.parametrize(
    "saved_in, continues_as",
    [("warmup", "constant"), ("cooldown", "constant"), ("constant", "constant"), ("anneal", "decayed")],
)
def test_the_checkpoint_says_whether_it_was_decayed(tmp_path, saved_in, continues_as):
    write_state(tmp_path, {"phase": saved_in})
    assert read_state(str(tmp_path)) == {"phase": saved_in}
    assert detect_starting_phase(str(tmp_path)) == continues_as


def test_without_a_checkpoint_it_is_scratch_and_a_silent_one_is_decayed(tmp_path):
    assert detect_starting_phase("") == detect_starting_phase(None) == "scratch"
    assert detect_starting_phase(str(tmp_path)) == "decayed"
    assert detect_starting_phase(str(tmp_path / "gone" / "since")) == "decayed"
    assert detect_starting_phase("somebody/a-model-not-in-the-cache") == "decayed"


def _optimizer(*shapes: tuple[int, ...], lr: float) -> torch.optim.AdamW:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def _step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_moments_travel_and_settings_do_not(tmp_path):
    old = _optimizer((2, 3), (4,), lr=1.0)
    _step(old)
    torch.save(old.state_dict(), tmp_path / "optimizer.pt")
    new = _optimizer((2, 3), (4,), lr=0.25)
    load_moments(new, tmp_path)
    assert [group["lr"] for group in new.param_groups] == [0.25, 0.25]
    for before, after in zip(old.state.values(), new.state.values(), strict=True):
        assert torch.equal(before["exp_avg"], after["exp_avg"])
        assert torch.equal(before["exp_avg_sq"], after["exp_avg_sq"])
        assert before["step"] == after["step"] == 1


def test_missing_or_foreign_moments_are_refused(tmp_path):
    new = _optimizer((2, 3), (4,), lr=0.25)
    with pytest.raises(ValueError, match="holds no optimizer.pt"):
        load_moments(new, tmp_path)
    other = _optimizer((5, 3), (4,), lr=1.0)
    _step(other)
    torch.save(other.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="belong to other parameters"):
        load_moments(new, tmp_path)
