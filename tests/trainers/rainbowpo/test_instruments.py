"""The meter's means and ranges, the watch for policies that run away, and a model put into evaluation for a while."""

import pytest
import torch
from torch import nn

from hf_moe_cpt.trainers.rainbowpo.objective import Pair, preference_terms
from hf_moe_cpt.trainers.rainbowpo.preference_meter import PreferenceMeter, pair_statistics
from hf_moe_cpt.trainers.rainbowpo.reference_head import in_evaluation
from hf_moe_cpt.trainers.rainbowpo.runaway_watch import WINDOW, RunawayWatch


def test_means_are_weighted_and_ranges_cover_everything():
    meter = PreferenceMeter()
    meter.add({"a": (torch.tensor(6.0), 3), "b": (torch.tensor(1.0), torch.tensor(4))})
    meter.add({"a": (torch.tensor(4.0), 1), "b": (torch.tensor(2.0), torch.tensor(2))})
    meter.add_range("phi", torch.tensor([1.0, 0.5]))
    meter.add_range("phi", torch.tensor([2.0, 0.7]))
    assert meter.pop() == {"a": 2.5, "b": 0.5, "phi/min": 0.5, "phi/max": 2.0}
    assert meter.pop() == {}


def _accuracy(differences: list[float], reference: bool = True) -> float:
    """Of chosen sequences that became likelier than in the reference by so many nats, all of -100 nats before."""
    before = torch.full((len(differences),), -100.0)
    logps, lengths = Pair(before + torch.tensor(differences), before), Pair(*[torch.full_like(before, 20.0)] * 2)
    ref_logps = Pair(before, before) if reference else None
    options = {"beta": 0.1, "mixing_alpha": 0.0, "mix_home_advantage": False, "length_normalization": False}
    options |= {"link": "logistic", "label_smoothing": 0.0, "sft_weight": 0.0}
    terms = preference_terms(logps, lengths, ref_logps, 0.0, 1.0, **options)
    total, number = pair_statistics(terms, logps, ref_logps, lengths, 0.1, False)["rewards/accuracies"]
    return total.item() / number


def test_a_pair_that_rounding_ranks_is_half_a_hit():
    assert _accuracy([0.0, 0.0]) == _accuracy([1e-5, 1e-5]) == _accuracy([-1e-5, 0.0]) == 0.5
    assert _accuracy([1e-2, 1.0]) == 1.0 and _accuracy([-1e-2, -1.0]) == 0.0 and _accuracy([0.0, 0.1]) == 0.75
    assert _accuracy([1e-2], reference=False) == 1.0 and _accuracy([1e-5], reference=False) == 0.5


def _log(chosen: float, preferred: float = 10.0) -> dict[str, float]:
    return {"logps_norm/chosen": chosen, "length/preferred": preferred, "length/chosen": 10.0}


def test_a_steady_run_is_left_in_peace():
    watch = RunawayWatch()
    assert [watch.look(_log(-1.0 - 0.01 * step)) for step in range(20)] == [[]] * 20
    assert watch.look({"loss": 1.0}) == []


@pytest.mark.parametrize(
    "log, message", [(_log(-2.5), "Lower the learning rate"), (_log(-1.0, 14.0), "raise beta")], ids=["fall", "length"]
)
def test_what_runs_away_is_said_once_with_a_remedy(log, message):
    watch = RunawayWatch()
    for _ in range(WINDOW):
        assert watch.look(_log(-1.0)) == []
    said = [warning for _ in range(WINDOW + 2) for warning in watch.look(log)]
    assert len(said) == 1 and message in said[0]


def test_a_model_is_in_evaluation_for_a_while_and_then_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)))
    model.train()
    model[1][0].eval()
    before, ones = [module.training for module in model.modules()], torch.ones(64)
    with pytest.raises(KeyError), in_evaluation(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model[1](ones), ones)
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert not torch.equal(model[1](ones), ones)
