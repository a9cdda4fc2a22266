"""Statistics of the activations in a model, norms of its gradients, and how far a step moves its weights."""

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

# A unit is dead if its magnitude never exceeded this share of the rms of its site, for any recorded token. A test for
# exact zeros would find dead units of ReLU only, because SiLU is never exactly zero.
DEAD_SHARE = 0.01

# The modules whose activations are recorded. Wrappers such as peft and DDP put other names in front of these.
SITE = re.compile(r"(?:^|\.)(embed_tokens|norm|layers\.\d+(?:\.self_attn|\.mlp(?:\.down_proj)?)?)$")
GROUP = re.compile(r"embed_tokens|lm_head|layers\.\d+\.(self_attn|mlp)")


@dataclass(frozen=True)
class ActivationStatistics:
    """
    The activations of one site (one place in the model), over all recorded tokens and units.

    Attributes:
        mean, rms: the mean, and the root mean square.
        kurtosis: the fourth central moment divided by the squared variance. It is 3 for a normal distribution, and
            larger the more of the signal is in a few large values.
        largest: the largest magnitude.
        dead: the share of units that never exceeded `DEAD_SHARE` of the rms.
    """

    mean: float
    rms: float
    kurtosis: float
    largest: float
    dead: float


@dataclass(frozen=True)
class UpdateStatistics:
    """
    One group of parameters around one optimizer step.

    Attributes:
        gradient_norm, weight_norm, update_norm: Euclidean norms; the weights are those before the step.
        ratio: update_norm / weight_norm. About 1e-3 is usual while a model learns. If it is much larger, the model
            forgets what it has learned; if it is much smaller, the model hardly learns.
    """

    gradient_norm: float
    weight_norm: float
    update_norm: float
    ratio: float


class ActivationRecorder:
    """What `record_activations` yields: it collects moments while its hooks are in place."""

    def __init__(self) -> None:
        self._moments: dict[str, list[torch.Tensor]] = {}
        self._unit_largest: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, site: str, activations: torch.Tensor) -> None:
        """Adds `activations` (..., units) of one call. It does not wait for the device."""
        values = activations.detach().float().flatten(end_dim=-2)
        mean = values.mean()
        centred = values - mean
        squares = centred.square()
        moments = torch.stack(
            [mean, squares.mean(), (squares * centred).mean(), squares.square().mean(), values.abs().max()]
        )
        self._moments.setdefault(site, []).append(torch.cat([moments, moments.new_tensor([values.numel()])]))
        unit_largest = values.abs().amax(dim=0)
        if site in self._unit_largest:
            unit_largest = torch.maximum(unit_largest, self._unit_largest[site])
        self._unit_largest[site] = unit_largest

    def statistics(self) -> dict[str, ActivationStatistics]:
        """
        The statistics of everything recorded so far, by site, in the order of the forward pass.

        Raises:
            ValueError: if nothing was recorded.
        """
        if not self._moments:
            raise ValueError("No activations were recorded: call the model within `with record_activations(model):`.")
        result = {}
        # The moments of each call are about its own mean; the binomial theorem converts them to the common mean.
        for site, calls in self._moments.items():
            means, second, third, fourth, largest, counts = torch.stack(calls).cpu().double().numpy().T
            share = counts / counts.sum()
            mean = float((share * means).sum())
            offset = means - mean
            variance = float((share * (second + offset**2)).sum())
            fourth_moment = float((share * (fourth + 4 * offset * third + 6 * offset**2 * second + offset**4)).sum())
            rms = math.sqrt(variance + mean**2)
            dead = self._unit_largest[site] <= DEAD_SHARE * rms
            result[site] = ActivationStatistics(
                mean=mean,
                rms=rms,
                kurtosis=fourth_moment / variance**2 if variance else math.nan,
                largest=float(np.max(largest)),
                dead=dead.float().mean().item(),
            )
        return result


@contextlib.contextmanager
def record_activations(model: nn.Module) -> Iterator[ActivationRecorder]:
    """
    Records every forward pass within the context. It uses hooks, which are removed at the end of the context.

    The sites of a Llama-shaped model are `embed_tokens`; for each layer N `layers.N.self_attn` and `layers.N.mlp` (what
    they add to the residual stream), `layers.N.mlp.hidden` (the units inside SwiGLU) and `layers.N` (the residual
    stream after the layer); and `norm` (the input of the head).

    Padded positions count like all others. Gradient checkpointing repeats forward passes, which are then recorded
    twice; this changes no statistic. Record the model itself and not a compiled one, which would compile again for the
    hooks.

    Raises:
        ValueError: if the model has no such modules.
    """
    sites = {name: match[1] for name, _ in model.named_modules() if (match := SITE.search(name))}
    if not sites:
        raise ValueError(f"{type(model).__name__} has no layers named as Llama's, so there is nothing to record.")
    recorder = ActivationRecorder()
    with contextlib.ExitStack() as hooks:
        for name, site in sites.items():
            module = model.get_submodule(name)
            if site.endswith(".down_proj"):
                hook = functools.partial(record_input, recorder, site.replace("down_proj", "hidden"))
                handle = module.register_forward_pre_hook(hook)
            else:
                handle = module.register_forward_hook(functools.partial(record_output, recorder, site))
            hooks.callback(handle.remove)
        yield recorder


def record_output(
    recorder: ActivationRecorder, site: str, module: nn.Module, arguments: tuple, output: torch.Tensor | tuple
) -> None:
    recorder.add(site, output[0] if isinstance(output, tuple) else output)


def record_input(recorder: ActivationRecorder, site: str, module: nn.Module, arguments: tuple) -> None:
    recorder.add(site, arguments[0])


def grouped_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """
    The parameters that have a gradient, by group: `embed_tokens`, `layers.N.self_attn`, `layers.N.mlp`, `norms` of all
    layers, `lm_head` where it is not tied, and `other`. Wrappers (peft, DDP, compile) do not change the groups.

    Raises:
        ValueError: if no parameter has a gradient.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        match = GROUP.search(name)
        group = "norms" if "norm" in name else match[0] if match else "other"
        groups.setdefault(group, []).append(parameter)
    if not groups:
        raise ValueError("No parameter has a gradient: call loss.backward() before, and optimizer.zero_grad() after.")
    return groups


@torch.no_grad()
def gradient_norms(model: nn.Module) -> dict[str, float]:
    """
    The Euclidean norm of the gradient of each group of `grouped_parameters`.

    Raises:
        ValueError: if no parameter has a gradient.
    """
    return {group: norm([p.grad for p in members]) for group, members in grouped_parameters(model).items()}


def norm(tensors: list[torch.Tensor]) -> float:
    """The Euclidean norm of all numbers of the tensors together, in float32."""
    return nn.utils.get_total_norm([tensor.float() for tensor in tensors]).item()


class UpdateRecorder:
    """What `record_update` yields: `statistics` is filled at the end of the context."""

    def __init__(self) -> None:
        self.statistics: dict[str, UpdateStatistics] = {}


@contextlib.contextmanager
def record_update(model: nn.Module) -> Iterator[UpdateRecorder]:
    """
    Measures one optimizer step: `with record_update(model) as update: optimizer.step()`. Within the context it keeps a
    copy of the weights. Gradients are measured at the beginning of the context, so clip them before.

    Raises:
        ValueError: if no parameter has a gradient.
    """
    groups = grouped_parameters(model)
    recorder = UpdateRecorder()
    before = {group: [p.detach().clone() for p in members] for group, members in groups.items()}
    gradients = gradient_norms(model)
    yield recorder
    for group, members in groups.items():
        weight_norm = norm(before[group])
        update_norm = norm([p.detach() - old for p, old in zip(members, before[group], strict=True)])
        ratio = update_norm / weight_norm if weight_norm else math.inf
        recorder.statistics[group] = UpdateStatistics(gradients[group], weight_norm, update_norm, ratio)


def as_metrics(
    prefix: str, statistics: Mapping[str, ActivationStatistics | UpdateStatistics | float]
) -> dict[str, float]:
    """Statistics as flat metrics for a log: `{"activations/layers.0.mlp/rms": 0.5, ...}`."""
    metrics = {}
    for name, values in statistics.items():
        if isinstance(values, float):
            metrics[f"{prefix}/{name}"] = values
        else:
            metrics.update({f"{prefix}/{name}/{field}": value for field, value in asdict(values).items()})
    return metrics
