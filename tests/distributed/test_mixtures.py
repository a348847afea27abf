"""A mixture of many sources that was read by one process goes on on any number of ranks with the same blocks."""

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.forked_ranks import on_ranks
from tests.trainers.cpt.test_changing_runs import Block, Drawn, train


pytestmark = pytest.mark.slow
BATCH, MICRO = 8, 2


def leg(drawn: Drawn, folder: Path, micro: int, stop: int | None) -> list[Block]:
    return train(drawn.trainer(folder, micro, dist.get_world_size()), stop)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_mixture_goes_on_on_other_ranks_with_the_same_blocks(tmp_path, ranks):
    """A batch is dealt out micro-batch by micro-batch; together ranks are given what one process is. Streams too."""
    for seed in range(6):
        drawn = Drawn.of(1000 + seed)
        drawn.batch, drawn.streaming = BATCH, seed % 3 == 0
        whole = on_ranks(1, tmp_path / f"{seed}-one", leg, drawn, tmp_path / f"{seed}-whole", MICRO, None)[0]
        folder = tmp_path / f"{seed}-run"
        before = on_ranks(1, tmp_path / f"{seed}-first", leg, drawn, folder, 4, drawn.stop)[0]
        assert before == whole[: drawn.stop * BATCH]
        shares = on_ranks(ranks, tmp_path / f"{seed}-ranks", leg, drawn, folder, MICRO, None)
        dealt = [iter(share) for share in shares]
        got = [next(dealt[(place // MICRO) % ranks]) for place in range(sum(map(len, shares)))]
        assert before + got == whole, drawn
