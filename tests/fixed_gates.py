"""Routers whose gates are given and do not depend on the input."""

from __future__ import annotations

import torch

from moelora_plugin.routers import Router


class ThreeQuarters(Router):
    """Every token gets the gates 3/4 and 1/4."""

    gates = (0.75, 0.25)

    def probabilities(self, logits, rows):
        return self.fixed_weights().to(logits).expand(logits.shape)

    def select(self, probs, preference, rows):
        return probs, None

    def fixed_weights(self):
        return torch.tensor(self.gates, dtype=torch.float64)


class Three(ThreeQuarters):
    """Every token gets the gates 0.6, 0.3 and 0.1."""

    gates = (0.6, 0.3, 0.1)
