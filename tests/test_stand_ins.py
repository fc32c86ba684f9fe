"""What stands in for functions of torch while a model runs once more gives what they give."""

import pytest
import torch
from torch.nn import functional as F

from alpha_optim.slopes.derivative import _load_forward_rules
from alpha_optim.slopes.stand_ins import STAND_INS

WEIGHT = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TABLE = torch.tensor([[1, 3, 3], [0, 0, 8], [2, 2, 2]])
FLAT, OFFSETS = TABLE.flatten(), torch.tensor([0, 4, 4, 7])  # the third bag is empty


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0, -6])
@pytest.mark.parametrize("how", ["table", "offsets", "offsets and the last", "weights"])
def test_bags_are_those_of_torch(how, padding, mode):
    if how == "weights" and mode != "sum":
        mode = "sum"  # torch has no others
    args, kwargs = (TABLE, WEIGHT), {"mode": mode, "padding_idx": padding}
    if how == "weights":
        kwargs["per_sample_weights"] = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    if "offsets" in how:
        last = how.endswith("last")
        args = (FLAT, WEIGHT, torch.cat([OFFSETS, torch.tensor([9])]) if last else OFFSETS)
        kwargs["include_last_offset"] = last
    found, expected = STAND_INS[F.embedding_bag](*args, **kwargs), F.embedding_bag(*args, **kwargs)
    assert torch.allclose(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("padding", [None, 2, -7])
def test_a_row_of_padding_rests_and_the_others_do_not(padding):
    embedding = STAND_INS[F.embedding]
    assert torch.equal(embedding(TABLE, WEIGHT, padding), F.embedding(TABLE, WEIGHT, padding))
    _load_forward_rules()  # torch warns of something of its own there
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(WEIGHT, torch.ones_like(WEIGHT))
        tangent = torch.autograd.forward_ad.unpack_dual(embedding(TABLE, dual, padding)).tangent
    moves = torch.ones(3, 3) if padding is None else (TABLE != 2).double()
    assert torch.equal(tangent, moves.double().unsqueeze(-1).expand(3, 3, 4))
