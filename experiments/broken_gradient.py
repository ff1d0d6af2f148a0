"""What Open-dLLM's released code trains: a baseline whose printed loss is right and whose gradient is not.

It takes per-token losses from Liger's fused linear cross-entropy, reduction='none'. Up to Liger 0.7 the backward of
that scales the gradient of *every* token by the factor of the first label of the packed micro-batch:

    right    sum_i w_i dCE_i          w_i = a_i + b_i p_i at masked tokens, 0 elsewhere
    broken   w_first sum_{i masked} dCE_i        0 if the first label is not masked: about every second micro-batch

A published speed-up over that baseline may be partly the baseline's. The same keys as train.py; align_broken has the
alignment too, whose gradient was right:

    python experiments/broken_gradient.py config/repr_align_smollm2.py --objective=mdm_broken --weighting=planner \
        --out_dir=out/broken
"""
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
from kernels import linear_cross_entropy
from mdm import MDM
from repr_align import ReprAlign


class BrokenMDM(MDM):
    name = 'mdm_broken'

    @property
    def dlm(self): return super().dlm | dict(objective='mdm')       # what comes out is an ordinary model

    def prepare(self, batch, seed):
        """first: token 1 of the micro-batch, the first label after the shift, if it is masked (rows are in order)."""
        batch = super().prepare(batch, seed)
        first = bool(batch.noise['xt'].flatten()[1] == self.mask_id)
        return replace(batch, noise=batch.noise | dict(first=first))

    def forward(self, batch, tap=None):
        """The right value with the wrong gradient."""
        noise = batch.noise
        with torch.no_grad(): loss, stats = super().forward(batch)
        h = self.model.hidden(noise['xt'], batch.ranges, batch.pos, tap=tap).flatten(0, 1)[noise['rows']]
        plain, ce = linear_cross_entropy(h, self.model.head_weight, noise['targets'], noise['real'],
                                         skip_col=self.mask_id)
        w = noise['a'][0] + (0 if noise['b'] is None else noise['b'][0] * (-ce[0]).exp())
        return loss + (plain - plain.detach()) * w * noise['first'], stats


class BrokenAlign(ReprAlign, BrokenMDM):
    name = 'align_broken'


checkpoint.OBJECTIVES |= {kind.name: kind for kind in (BrokenMDM, BrokenAlign)}
if __name__ == '__main__':
    sys.argv[0] = str(ROOT / 'train.py')
    runpy.run_path(sys.argv[0], run_name='__main__')
