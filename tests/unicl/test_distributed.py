"""What one rank does for all: its result stays there, its failure reaches every rank."""

import pytest
import torch.distributed as dist

from tests.unicl.ranks import on_ranks
from unicl.distributed import ALONE, Ranks
from unicl.errors import UniclError


def first_does_it(folder):
    ranks = Ranks(dist.group.WORLD)
    path = folder / f"of rank {ranks.rank}"
    returned = ranks.on_first(lambda: path.write_text("done"))
    assert returned == (4 if ranks.first else None)
    assert [each.name for each in folder.iterdir()] == ["of rank 0"]


def first_fails():
    ranks = Ranks(dist.group.WORLD)

    def work():
        raise UniclError("cannot write results.json: disk full")

    with pytest.raises(UniclError, match=r"cannot write results\.json: disk full$") as caught:
        ranks.on_first(work)
    assert str(caught.value).startswith("rank 0 of 2: ") != ranks.first


def test_only_the_first_rank_does_it_and_the_others_wait(tmp_path):
    on_ranks(2, first_does_it, tmp_path)


def test_what_stops_the_first_rank_stops_all():
    on_ranks(2, first_fails)


def test_a_process_alone_is_the_first():
    assert ALONE.on_first(lambda: 3) == 3
