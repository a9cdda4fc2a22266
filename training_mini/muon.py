"""
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): a matrix is moved by its momentum, after every
singular value of the momentum was set to about 1.

torch.optim.Muon computes this in bfloat16, for one matrix after the other. Here all matrices of one shape are computed
together, on a CPU in float32 unless it is told otherwise, with polynomials that come nearer to 1.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

# Polar Express (Amsel et al. 2025, https://arxiv.org/abs/2505.16932): a, b and c of a x + b x^3 + c x^5 for each
# iteration. The singular values begin in [0.001, 1]. Each polynomial brings the interval in which they lie by then as
# near to 1 as a polynomial of degree 5 can, with the paper's cushion of 0.024. Further iterations repeat the last one.
# A test computes the numbers again.
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # a singular value that rounding moves above 1 would leave the interval and grow


def polynomials(iterations: int) -> list[tuple[float, float, float]]:
    """The coefficients of each iteration. In all but the last, the argument is divided by `SAFETY`."""
    taken = [COEFFICIENTS[min(i, len(COEFFICIENTS) - 1)] for i in range(iterations)]
    return [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in taken[:-1]] + taken[-1:]


def orthogonalize(matrices: torch.Tensor, iterations: int) -> torch.Tensor:
    """
    Approximately U V^T for each matrix U S V^T. After 6 iterations, singular values that were above a thousandth of the
    matrix's norm are within 1 % of 1. Fewer iterations are less exact.

    Args:
        matrices: (count, rows, columns); float32, or bfloat16 for speed on a GPU.

    Returns:
        (count, rows, columns), of the same dtype.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # the product over the longer side is the smaller matrix
    x = x / (SAFETY * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in polynomials(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """
    Muon with Nesterov momentum and decoupled weight decay.

    The step is scaled by sqrt(max(1, rows / columns)). A step then changes the output of a layer equally at any width,
    so one learning rate is right for narrow and wide models (Yang et al. 2023, https://arxiv.org/abs/2310.17813).

    Matrices that are sharded (FSDP2) are gathered, because singular values belong to the whole matrix. Every process
    computes the same step and keeps its own part. The state, `momentum_buffer`, stays sharded.

    Args:
        params: matrices, or groups of them.
        lr: the spectral norm of a step, for a matrix with no more rows than columns.
        momentum: the share of the old momentum that each step keeps.
        weight_decay: the share of the weights that a step with learning rate 1 would remove.
        iterations: the number of polynomials in `orthogonalize`.
        dtype: of the products in `orthogonalize`; `None` is float32 on a CPU and bfloat16 on a GPU.

    Raises:
        ValueError: for a parameter that is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        super().__init__(params, defaults)
        self.dtype = dtype
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(parameter.shape)}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """As in every optimizer of torch: the loss of `closure`, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                updates = self._updates(parameters, group["momentum"])
                self._apply(parameters, orthogonalized(updates, group["iterations"], self.dtype), group)
        return loss

    def _updates(self, parameters: list[torch.Tensor], momentum: float) -> list[torch.Tensor]:
        """The gradients with momentum, as whole matrices."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [local(parameter.grad) for parameter in parameters]
        buffers = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        return [gathered(update, parameter) for update, parameter in zip(updates, parameters, strict=True)]

    def _apply(self, parameters: list[torch.Tensor], updates: list[torch.Tensor], group: dict[str, Any]) -> None:
        shares = [local(shared_out(update, like)) for update, like in zip(updates, parameters, strict=True)]
        weights = [local(parameter) for parameter in parameters]
        torch._foreach_mul_(shares, [-group["lr"] * scale(parameter.shape) for parameter in parameters])
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, shares)


def orthogonalized(
    matrices: list[torch.Tensor], iterations: int, dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """`orthogonalize` for matrices of any shapes, to float32. Those of one shape, or its transpose, go together."""
    if dtype is None:
        # A GPU multiplies bfloat16 several times as fast as float32, and a direction does not need more digits.
        dtype = torch.bfloat16 if matrices[0].device.type == "cuda" else torch.float32
    results: list[torch.Tensor] = [torch.empty(0)] * len(matrices)
    of_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        of_shape[tuple(sorted(matrix.shape))].append(number)
    for numbers in of_shape.values():
        wide = [m.mT if (m := matrices[number]).shape[0] > m.shape[1] else m for number in numbers]
        stacked = orthogonalize(torch.stack(wide).to(dtype), iterations).float()
        for number, matrix in zip(numbers, stacked, strict=True):
            results[number] = matrix if matrix.shape == matrices[number].shape else matrix.mT
    return results


def scale(shape: torch.Size) -> float:
    """The factor on the step of a matrix (rows, columns); see `Muon`."""
    return max(1.0, shape[0] / shape[1]) ** 0.5


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that is on this process, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole tensor, of which each process has a part; it is sharded like `like`."""
    if not isinstance(like, DTensor):
        return part
    layout = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, **layout).full_tensor()


def shared_out(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`whole`, which every process has, sharded like `like`."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.contiguous(), like.device_mesh, like.placements, src_data_rank=None)
