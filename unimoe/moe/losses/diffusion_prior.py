"""Which experts a timestep is to visit, so that nearby ones share experts and some are always visited.

Shapes: B samples, L layers, E experts of one, F = L E columns of all, K of one layer per sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.parts import LOSSES
from unimoe.moe.records import LayerRecord

from .auxiliary import Across, alone


@LOSSES.register(
    "diffusion_prior",
    source="Switch-DiT, arXiv 2403.09176; form: the authors' code",
    axis="router regularisation",
)
def diffusion_prior(
    records: Sequence[LayerRecord], layers: Mapping[int, Any], across: Across = alone, alpha: float = 4.0
) -> Tensor:
    """The probabilities of all layers' experts are to follow a prior of their timestep: 0-d.

    The prior of time t has L K of the F columns, those from round(t^alpha (F - L K)) on. Its columns are
    matched to experts (Hungarian method) by how often choice and prior differ; the loss is the mean over
    samples of the Jensen-Shannon divergence (nats) between the probabilities over L and the matched prior
    over L K. The authors match over all timesteps, here it is those of the batch; ties are broken by order
    instead of at random.

    Args:
        records: of the layers, all with the same routers and samples.
        layers: not read.
        across: mean over processes.
        alpha: above 1, low times share most of their experts.

    Raises:
        UserError: the model gives no times, or a router decides by token.
    """
    time_B, of = records[0].ctx.time_B, records[0].ctx.sample_T
    if time_B is None or of is None:
        raise UserError("moe.losses.diffusion_prior needs a model that gives each sample a time")
    first_B = torch.searchsorted(of, torch.arange(len(time_B), device=of.device))  # a token of each sample
    chosen_BF = torch.cat([one.routing.chosen()[first_B] for one in records], dim=1)
    probs_BF = torch.cat([one.routing.probs_TE[first_B] for one in records], dim=1)
    visits = int(chosen_BF[0].sum())
    prior_BF = step_prior(time_B, visits, chosen_BF.shape[1], alpha).to(probs_BF.dtype)
    cost_FF = (chosen_BF.to(prior_BF.dtype)[:, :, None] - prior_BF[:, None, :]).abs().mean(dim=0)
    _, column_F = linear_sum_assignment(across(cost_FF).cpu().numpy())
    matched_BF = prior_BF[:, torch.from_numpy(column_F).to(prior_BF.device)]
    return across(jensen_shannon(probs_BF / len(records), matched_BF / visits).mean())


def step_prior(time_B: Tensor, visits: int, columns: int, alpha: float) -> Tensor:
    """[B, F] bool: ``visits`` adjacent columns, which move from the first to the last as time goes from 0 to
    1; if 2 visits > F, the 2 visits - F columns in the middle are always among them."""
    start_B1 = (time_B.double() ** alpha * (columns - visits)).round()[:, None]
    place_F = torch.arange(columns, device=time_B.device)
    return (place_F >= start_B1) & (place_F < start_B1 + visits)


def jensen_shannon(p_BF: Tensor, q_BF: Tensor, eps: float = 1e-6) -> Tensor:
    """[B] in nats: 0 for equal distributions, log 2 for disjoint ones."""
    middle_BF = (p_BF + q_BF) / 2
    terms = [(one * ((one + eps) / (middle_BF + eps)).log()).sum(dim=1) for one in (p_BF, q_BF)]
    return (terms[0] + terms[1]) / 2
