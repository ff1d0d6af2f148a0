"""Variants of alignment, and from causal to bidirectional by degrees, over the first STEPS steps. train.py's keys:

    opening   a token sees so many tokens after it: none at first (causal), more and more, at last its whole document
    warming   the noise level is drawn from (0, r), r from 0 to 1: few masks at first
    visible   alignment only at rows whose own token is visible: of a masked one, which the teacher has read, the
              student cannot know much (with the shift; without one these rows are all masked)

    python experiments/annealing.py config/repr_align_smollm2.py --objective=opening --out_dir=out/opening

`--align_weight=0` is masked diffusion without a teacher. Validation and samples are those of mdm.
"""
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint
from kernels import Ranges
from repr_align import ReprAlign

STEPS = 120


def opened(ranges, ahead):
    """The same ranges, but nobody sees further ahead than so many tokens. 0: kernels.causal_ranges."""
    q, k = ranges
    idx = torch.arange(q.shape[1], dtype=torch.int32)[None, :, None]
    return Ranges(torch.stack([q[..., 0], torch.minimum(q[..., 1], idx + 1 + ahead)], -1),
                  torch.stack([torch.maximum(k[..., 0], idx - ahead), k[..., 1]], -1))


class Opening(ReprAlign):
    name = 'opening'

    def prepare(self, batch, seed):
        """As many tokens ahead as grow by the same factor in each step."""
        ahead = round(batch.ids.shape[1] ** min(batch.step / STEPS, 1)) - 1
        return replace(super().prepare(batch, seed), ranges=opened(batch.ranges, ahead))


class Warming(ReprAlign):
    name = 'warming'

    def draw_t(self, batch, seed):
        return self.t_min + (super().draw_t(batch, seed) - self.t_min) * min((batch.step + 1) / STEPS, 1)


class Visible(ReprAlign):
    name = 'visible'

    def prepare(self, batch, seed):
        batch = super().prepare(batch, seed)
        noise = batch.noise
        if 'align' not in noise: return batch
        masked = noise['xt'].flatten()[noise['rows']] == self.mask_id
        return replace(batch, noise=noise | dict(align=noise['align'] * ~masked))


checkpoint.OBJECTIVES |= {kind.name: kind for kind in (Opening, Warming, Visible)}
if __name__ == '__main__':
    sys.argv[0] = str(ROOT / 'train.py')
    runpy.run_path(sys.argv[0], run_name='__main__')
