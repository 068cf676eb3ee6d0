"""A change of a weight as two factors of low rank: the nearest that there is, by its singular values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reeltune.adapters.adapter import LowRank
from reeltune.core.rng import seed_of

EXACT = 512  # the smaller side up to which all singular values are computed: a second or two on a CPU
OVER, ITERATIONS = 16, 4  # as Halko et al. advise for a few percent of error at most: arXiv 0909.4061, section 1.3


@dataclass(frozen=True)
class Factors:
    """The largest singular values, and what of the change they hold."""

    U_OR: Tensor
    S_R: Tensor
    V_IR: Tensor
    square: float  # of the whole change's norm

    def low_rank(self, rank: int) -> LowRank:
        """The pair of that rank, or of all that are here: B A is the nearest to the change of such a rank (Eckart and
        Young)."""
        root_R = self.S_R[:rank].sqrt()
        return LowRank(root_R[:, None] * self.V_IR[:, :rank].T, self.U_OR[:, :rank] * root_R, float(len(root_R)))

    def square_at(self, rank: int) -> float:
        """What of `square` the change of that rank holds."""
        return float(self.S_R[:rank].double().square().sum())


def factors(change_OI: Tensor, most_rank: int, name: str, *, iterations: int = ITERATIONS) -> Factors:
    """An fp32 change's largest singular values, at most `most_rank`. A large change's are found from random directions,
    which `name`, the weight's, seeds, and which come nearer with each of `iterations`."""
    square, least = float(change_OI.double().square().sum()), min(change_OI.shape)
    count = min(most_rank, least)
    if least <= EXACT or count + OVER >= least:
        U_OR, S_R, Vt_RI = torch.linalg.svd(change_OI, full_matrices=False)
        V_IR = Vt_RI.T
    else:
        generator = torch.Generator().manual_seed(seed_of(0, "factors", name))
        random_IR = torch.randn(change_OI.shape[1], count + OVER, generator=generator).to(change_OI.device)
        Q_OR = torch.linalg.qr(change_OI @ random_IR).Q  # Halko et al., algorithm 4.4
        for _ in range(iterations):
            Q_OR = torch.linalg.qr(change_OI @ torch.linalg.qr(change_OI.T @ Q_OR).Q).Q
        U_RR, S_R, Vt_RI = torch.linalg.svd(Q_OR.T @ change_OI, full_matrices=False)
        U_OR, V_IR = Q_OR @ U_RR, Vt_RI.T
    return Factors(U_OR[:, :count].contiguous(), S_R[:count], V_IR[:, :count].contiguous(), square)
