"""Closed-form start of a connector: ridge regression from features to the language model's token embeddings.

Shapes: n examples, S encoder positions, D features, H language model width, N tokens, m targets.
"""

import torch
from torch import Tensor

from unimoe.errors import UserError

from .connector import Connector, MLPConnector


def ridge_map(x_nD: Tensor, y_nH: Tensor, ridge: float = 2000.0) -> tuple[Tensor, Tensor]:
    """The affine map ``y = W x + b`` fitted by ridge regression on standardised features: ``(weight_HD,
    bias_H)``.

    Minimises ``|Z A - (Y - mean Y)|^2 + ridge |A|^2`` with ``Z = (X - mean X) / std X``, and folds the
    standardisation into weight and bias. Features that do not vary get weight 0. Solved in float64 in the
    smaller of the two forms (D x D, or n x n when there are fewer examples than features).

    Raises:
        UserError: the rows do not pair up.
    """
    if x_nD.ndim != 2 or y_nH.ndim != 2 or len(x_nD) != len(y_nH) or not len(x_nD):
        raise UserError(
            f"ridge: found {list(x_nD.shape)} and {list(y_nH.shape)}, expected paired rows [n, D], [n, H]"
        )
    x_nD, y_nH = x_nD.double(), y_nH.double()
    x_mean_D, y_mean_H = x_nD.mean(0), y_nH.mean(0)
    std_D = x_nD.std(0, correction=0)
    scale_D = torch.where(std_D > 1e-8 * std_D.max().clamp_min(1e-30), 1 / std_D, 0)
    z_nD, target_nH = (x_nD - x_mean_D) * scale_D, y_nH - y_mean_H
    count, width = z_nD.shape
    eye = torch.eye(min(count, width), dtype=z_nD.dtype, device=z_nD.device)
    if width <= count:
        solution_DH = torch.linalg.solve(z_nD.T @ z_nD + ridge * eye, z_nD.T @ target_nH)
    else:
        solution_DH = z_nD.T @ torch.linalg.solve(z_nD @ z_nD.T + ridge * eye, target_nH)
    weight_HD = (scale_D[:, None] * solution_DH).T
    return weight_HD, y_mean_H - weight_HD @ x_mean_D


@torch.no_grad()
def ridge_init(
    connector: Connector,
    features_nSD: Tensor,
    targets_nH: Tensor,
    lengths_n: Tensor | None = None,
    ridge: float = 2000.0,
    parts: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Set the last linear layer of a linear, mlp or pooled_mlp connector by ridge regression, in place.

    The target of an example (for instance the mean embedding of its name) is what the mean of its tokens
    should be; earlier layers keep their random values and serve as features. The penalty shrinks what tells
    examples apart (by about 0.6 on the embedded default's images), so the outputs' deviations from their
    mean are then scaled to the mean size of the targets'.

    Args:
        connector: the connector to set.
        features_nSD: the encoder's features of each example.
        targets_nH: one for each example, or ``[m, H]`` with ``parts``.
        lengths_n: real positions of each example; None for all.
        ridge: the penalty, on standardised features.
        parts: for targets of parts of examples: ``owners_m``, the example that each target belongs to, and
            ``weights_mN``, its tokens' weights in the mean that the target is for (each row sums to 1).

    Raises:
        UserError: the connector is a Q-Former, or the rows do not pair up.
    """
    if not isinstance(connector, MLPConnector):
        raise UserError(
            f"ridge: {type(connector).__name__} has no closed form; use linear, mlp or pooled_mlp"
        )
    rows_nNK = connector.layers[:-1](
        connector.gather(features_nSD, lengths_n).to(connector.last.weight.dtype)
    )
    if parts is None:
        counts_n = connector.counts(features_nSD, lengths_n)
        inside_nN = torch.arange(rows_nNK.shape[1], device=rows_nNK.device) < counts_n[:, None]
        rows_nNK = rows_nNK.double() * inside_nN[..., None]
        mean_nK = rows_nNK.sum(1) / counts_n[:, None]
    else:
        owners_m, weights_mN = (part.to(rows_nNK.device) for part in parts)
        mean_nK = (rows_nNK[owners_m].double() * weights_mN.double()[..., None]).sum(1)
    weight_HK, bias_H = ridge_map(mean_nK, targets_nH, ridge)
    centre_H = targets_nH.double().mean(0)
    wanted = (targets_nH.double() - centre_H).norm(dim=-1).mean()
    found = (mean_nK @ weight_HK.T + bias_H - centre_H).norm(dim=-1).mean()
    scale = wanted / found.clamp_min(1e-12) if wanted > 0 else 1.0
    connector.last.weight.copy_(weight_HK * scale)
    connector.last.bias.copy_(centre_H + (bias_H - centre_H) * scale)
