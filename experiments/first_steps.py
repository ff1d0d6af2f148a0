"""The first steps of a latent diffusion model: does every part move, how much memory does that take? train.py's keys:

    python experiments/first_steps.py config/ldlm_qwen3_6_35b_a3b.py --dataset=packages --max_docs=0 \\
        --encoder_device=cuda:1 --max_iters=20 --warmup_iters=2 --sample_tokens=0 --result=results/ldlm_first_steps.json

The result is train.py's, with `moved` (per part: by how much of its norm its parameters changed; how many tensors did
not) and `gib` (peak of each GPU; predicted: 16 bytes per parameter, weights, gradients and AdamW's two averages).
"""
import json
import runpy
import shlex
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoint import write_json
from ldlm import LDLM

PARTS = dict(denoiser='dit', encoder='encoder', decoder='decoder', token_decoder='token_decoder', head='head')


def moved(before, after):
    """{part: relative change of its parameters, number of tensors, of those that did not change}"""
    out = {}
    for part, prefix in PARTS.items():
        names = [n for n in before if n.startswith(prefix)]
        change = sum((after[n] - before[n]).square().sum().item() for n in names)
        norm = sum(before[n].square().sum().item() for n in names)
        out[part] = dict(change=(change / norm) ** 0.5, tensors=len(names),
                         still=sum(torch.equal(before[n], after[n]) for n in names))
    assert sum(x['tensors'] for x in out.values()) == len(before)
    return out


if __name__ == '__main__':
    snapshot = lambda obj: {n: p.detach().float().cpu().clone() for n, p in obj.model.named_parameters()}
    start = LDLM.start

    def start_and_remember(self, batches):
        start(self, batches)
        LDLM.before = snapshot(self)
    LDLM.start = start_and_remember
    sys.argv[0] = str(ROOT / 'train.py')
    run = runpy.run_path(sys.argv[0], run_name='__main__')
    if not hasattr(LDLM, 'before'): raise SystemExit("nothing to compare with: choose a fresh --out_dir and an LDLM")
    file = Path(run['result'] or run['result_file'])
    facts = json.loads(file.read_text()) | dict(moved=moved(LDLM.before, snapshot(run['obj'])), gib=dict(
        peak={str(i): torch.cuda.max_memory_allocated(i) / 2 ** 30 for i in range(torch.cuda.device_count())},
        predicted=16 * run['model'].n_params() / 2 ** 30), command=shlex.join(
            ['python', 'experiments/first_steps.py', *sys.argv[1:]]))
    write_json(file, facts)
    for part, x in facts['moved'].items():
        print(f"{part:14} {x['change']:.2%} changed, {x['still']} of {x['tensors']} tensors not")
    print(f"GiB: {facts['gib']}")
