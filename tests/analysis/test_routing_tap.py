"""What the tap refuses: passes that did not happen, happened twice, or had other tokens; and models it cannot hear."""

import pytest
import torch

from hf_moe_cpt.analysis.routing_tap import RoutingTap
from tests.helpers.tiny_moes import moe_model, padded_batch


def test_only_one_whole_pass_is_taken():
    model, batch = moe_model("mixtral").eval(), padded_batch()
    tap = RoutingTap(model)
    with torch.no_grad(), tap.listening():
        with pytest.raises(ValueError, match=r"layer model.layers.0.mlp.experts ran not at all in one pass"):
            tap.take(18)
        model(**batch)
        model(**batch)
        with pytest.raises(ValueError, match="ran more than once in one pass: its routing cannot be traced"):
            tap.take(18)
        model(**batch)
        with pytest.raises(ValueError, match="saw 18 tokens of a batch of 5: its routing cannot be told apart"):
            tap.take(5)
        model(**batch)
        assert [routing.experts.shape for routing in tap.take(18)] == [(18, 2), (18, 2)]
    model(**batch)
    with pytest.raises(ValueError, match="ran not at all"):
        tap.take(18)


def test_experts_that_run_without_their_router():
    model = moe_model("mixtral").eval()
    experts = model.model.layers[0].mlp.experts
    for with_probabilities, text in (
        (True, "The router model.layers.0.mlp.gate did not run"),
        (False, "layers.1.mlp"),
    ):
        tap = RoutingTap(model, with_probabilities)
        with torch.no_grad(), tap.listening():
            experts(torch.zeros(3, 16), torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5))
            with pytest.raises(ValueError, match=text):
                tap.take(3)
