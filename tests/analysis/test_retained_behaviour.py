"""Divergence summaries: means of texts and of tokens, against torch's KL and numpy on the joined tokens."""

import numpy as np
import pytest
import torch

from hf_moe_cpt.analysis.bootstrap import ratio_of_sums
from hf_moe_cpt.analysis.retained_behaviour import agreement_totals, kl_per_token, kl_totals, top1_agreement


def test_texts_and_tokens_of_real_distributions():
    generator = torch.Generator().manual_seed(0)
    kl, agrees = [], []
    for length in (1, 4, 7):
        before, now = (torch.randn(length, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        before, now = before.log_softmax(-1), now.log_softmax(-1)
        kl.append(torch.nn.functional.kl_div(now, before, log_target=True, reduction="none").sum(-1))
        agrees.append(before.argmax(-1) == now.argmax(-1))
    np.testing.assert_allclose(kl_per_token(kl), [float(row.mean()) for row in kl], rtol=1e-12)
    np.testing.assert_allclose(top1_agreement(agrees), [float(row.double().mean()) for row in agrees], rtol=1e-12)
    assert ratio_of_sums(kl_totals(kl)) == pytest.approx(float(torch.cat(kl).mean()), rel=1e-12)
    assert ratio_of_sums(agreement_totals(agrees)) == pytest.approx(float(torch.cat(agrees).double().mean()))
    assert kl_totals(kl)[:, 1].tolist() == [1, 4, 7]


def test_rounding_below_zero_passes_and_more_does_not():
    np.testing.assert_allclose(kl_per_token([[-1e-7, 1e-7]]), [0], atol=1e-12)
    with pytest.raises(ValueError, match="kl holds -0.5: a KL divergence is at least 0"):
        kl_per_token([[0.1], [0.2, -0.5]])
    with pytest.raises(ValueError, match=r"agrees\[0\] holds 0.5"):
        top1_agreement([[0.5]])
