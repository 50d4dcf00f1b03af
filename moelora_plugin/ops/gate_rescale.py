"""The exponent on the gates' backward: what it is, and how any differentiable mixture gets it.

`rank_gated` has it built in, at no cost. This file serves the expert kinds that are no such
product.

Shape suffixes: T tokens, O out, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..types import ExpertInput, GateRescale, Gates

# (inputs, the experts' tensors, gates) -> update (T, O).
Mixture = Callable[[ExpertInput, Mapping[str, Tensor], list[Tensor]], Tensor]


def surrogate_gates(weights_TE: Tensor, gate_rescale: GateRescale) -> Tensor:
    """g^p, with 0^0 read as 0: an expert that was not selected learns nothing from the token."""
    if gate_rescale == "none":
        return weights_TE
    if gate_rescale == "sqrt":
        return weights_TE.sqrt()
    return (weights_TE != 0).to(weights_TE.dtype)


def rescaled_mixture(
    mixture: Mixture,
    inputs: ExpertInput,
    tensors: Mapping[str, Tensor],
    gates: Gates,
    further_gates: Sequence[Tensor] = (),
) -> Tensor:
    """A mixture whose tensors see g^p in place of g in the backward.

    Value, the gates' gradient and (scope "weights") that of the inputs are the mixture's own. The
    tensors receive the gradient of the mixture that has c = g^p for gates, and under scope "output"
    so do the inputs:

        mixture(inputs, stop(tensors), g) + [live - stop(live)]
        live = mixture(stop(inputs), tensors, c)           (scope "output": inputs for stop(inputs))

    For a sum g_i E_i this is eq. 13 of arXiv 2502.15828 (scope "weights") and its Algorithm 1
    (scope "output"). Where gates meet each other (g_i g_j for a pair of factors), the exponent is
    on the product. Where a gated sum goes through a non-linear function, the gradient is that of
    the mixture gated by c, at its own activations.

    Costs a second evaluation of the mixture, with what it keeps for the backward; none where p is 1
    or no gradient is asked for.

    Args:
        mixture: a differentiable function of its arguments, called with the gates' list.
        inputs: what the experts work on.
        tensors: the experts', routers of the kind's own left out.
        gates: the layer's gates.
        further_gates: the kind's own gates, which get the same exponent.
    """
    weights = [gates.weights, *further_gates]
    if gates.rescale == "none" or not torch.is_grad_enabled():
        return mixture(inputs, tensors, weights)
    stopped = {name: tensor.detach() for name, tensor in tensors.items()}
    surrogates = [surrogate_gates(weight.detach(), gates.rescale) for weight in weights]
    if gates.scope == "output":
        value = mixture(_stop(inputs), stopped, weights)
        live = mixture(inputs, tensors, surrogates)
    else:
        value = mixture(inputs, stopped, weights)
        live = mixture(_stop(inputs), tensors, surrogates)
    return value + (live - live.detach())


def _stop(inputs: ExpertInput) -> ExpertInput:
    return replace(inputs, x=inputs.x.detach(), base_output=inputs.base_output.detach())
