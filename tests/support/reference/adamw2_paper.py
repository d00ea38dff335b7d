"""AdamW2 as the paper states it: float64, one weight at a time, exact singular values.

Written from "Taming Transformer Without Using Learning Rate Warmup" (Qi et al., ICLR 2025), Rule
1, Eq. 6 and Algorithm 1; the epsilon stands outside the root, as in torch's AdamW.
"""

from __future__ import annotations

import torch


def sigma1(weight: torch.Tensor) -> float:
    """Largest singular value; a vector is a one-column matrix, a kernel is flattened."""
    matrix = weight.reshape(weight.shape[0], -1) if weight.ndim else weight.reshape(1, 1)
    return torch.linalg.svdvals(matrix.double())[0].item()


class PaperAdamW2:
    """Steps a list of float64 weights; `rates` holds what line 8 made of the rate of each block."""

    def __init__(self, weights, *, lr, betas, eps, weight_decay, tau, blocks=1, block_dim=0):
        self.weights = [weight.detach().double().clone() for weight in weights]
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.tau, self.blocks, self.block_dim = tau, blocks, block_dim
        self.m = [torch.zeros_like(weight) for weight in self.weights]
        self.v = [torch.zeros_like(weight) for weight in self.weights]
        # The paper leaves weights that start at zero open: here each such block is never clipped.
        self.free = [[not block.any() for block in self._split(w)] for w in self.weights]
        self.t = 0
        self.rates, self.updates = [], []

    def _split(self, weight):
        return weight.chunk(self.blocks, self.block_dim) if self.blocks > 1 else [weight]

    def step(self, grads):
        self.t += 1
        beta1, beta2 = self.betas
        self.rates, self.updates = [], []
        for i, grad in enumerate(grads):
            grad = grad.double()
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * grad
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * grad**2
            m_hat = self.m[i] / (1 - beta1**self.t)
            v_hat = self.v[i] / (1 - beta2**self.t)
            update = m_hat / (v_hat.sqrt() + self.eps)
            rates = []
            pairs = zip(self._split(self.weights[i]), self._split(update), strict=True)
            for (block, step), free in zip(pairs, self.free[i], strict=True):
                rate, size = self.lr, sigma1(step)
                if not free and rate * size > self.tau * sigma1(block):
                    rate = self.tau * sigma1(block) / size
                block -= rate * step + rate * self.decay * block
                rates.append(rate)
            self.rates.append(rates)
            self.updates.append(update)
