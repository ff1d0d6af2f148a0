"""Muon: momentum whose matrix updates are orthogonalised: every direction of a weight moves equally far.

    m <- beta m + g;   u = NewtonSchulz(g + beta m) ~ U V^T of its SVD
    w <- w - lr 0.2 sqrt(max(rows, cols)) u

The factor (Moonlight, 2502.16982, Eq. 4) gives the update AdamW's usual size: one learning rate serves both.
torch.optim.Muon is the same rule, always in bf16; on CPUs, where that is slow or absent, this runs in fp32.
It takes the fused qkv and gate-up matrices apart, because U V^T of a stack is not the stack of the U V^T.
"""
import torch


def newton_schulz(g: torch.Tensor, n_iter: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrix to g (..., R, C), roughly: singular values land in [0.7, 1.2],
    lower where those of g are tiny. Quintic iteration with Keller Jordan's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g.float()
    flip = x.shape[-2] > x.shape[-1]
    if flip: x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(n_iter):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if flip else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """params: groups of 2-D weights; a group may carry `rows`, a list of row counts into which its (fused)
    weights are split before orthogonalisation."""
    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, rows=None))

    @torch.no_grad()
    def step(self):
        same_shape = {}                                 # one batched iteration for all matrices of a shape
        for group in self.param_groups:
            params, beta = [p for p in group['params'] if p.grad is not None], group['momentum']
            if not params: continue
            for p in params:
                if not self.state[p]: self.state[p]['momentum'] = torch.zeros_like(p)
            grads, momenta = [p.grad for p in params], [self.state[p]['momentum'] for p in params]
            torch._foreach_mul_(momenta, beta)
            torch._foreach_add_(momenta, grads)
            torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
            for p, update in zip(params, torch._foreach_add(grads, momenta, alpha=beta)):
                rows = group['rows'] or len(p)
                for w, u in zip(p.split(rows), update.split(rows)):
                    same_shape.setdefault((u.shape, group['lr']), []).append((w, u))
        for (shape, lr), pairs in same_shape.items():
            weights, updates = zip(*pairs)
            orthogonal = newton_schulz(torch.stack(updates))
            torch._foreach_add_(weights, orthogonal.unbind(), alpha=-0.2 * lr * max(shape) ** 0.5)
