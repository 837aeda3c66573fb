"""The optimizer of the hidden matrices, and AdamW beside it. Knows nothing of what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from overtone.progressive import library


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), for hidden matrices and kernels.

    A kernel is a matrix with one row an output channel; those of one shape are handled together. The
    update's root mean square is 0.2, about AdamW's, so both take alike learning rates (Liu et al. 2025,
    section 2.2).
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((len(p), p[0].numel()), []).append(p)
            for shape, ps in shapes.items():
                for p in ps:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in ps]
                grads = [p.grad for p in ps if p.grad is not None]
                library.lerp_all(momenta, grads, 1 - group["momentum"])
                nesterov = [
                    g.lerp(m, group["momentum"]).flatten(1) for g, m in zip(grads, momenta, strict=True)
                ]
                update = orthogonal(torch.stack(nesterov)) * (0.2 * math.sqrt(max(shape)))
                for p, change in zip(ps, update.unbind(), strict=True):
                    p.add_(change.view(p.shape), alpha=-group["lr"])


def orthogonal(matrices: Tensor, steps: int = 4) -> Tensor:
    """Nearly the nearest orthogonal matrices, [N, a, b], by a quintic Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def build_optimizers(
    module: nn.Module, is_hidden: Callable[[str, Tensor], bool], hidden_lr: float, other_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for everything else."""
    named = list(module.named_parameters())
    return [
        Muon([p for name, p in named if is_hidden(name, p)], lr=hidden_lr),
        torch.optim.AdamW(
            [p for name, p in named if not is_hidden(name, p)], lr=other_lr, betas=(0.9, 0.98), weight_decay=0
        ),
    ]


def is_hidden_kernel(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 4 and "conv_in" not in name and "conv_out" not in name


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    inside = "blocks." in name or ".block." in name
    return parameter.ndim == 2 and inside and not any(part in name for part in ("norm", "embed", "bias"))
