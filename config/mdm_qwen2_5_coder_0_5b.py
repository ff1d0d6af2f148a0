# Open-dCoder 0.5B: Qwen2.5-Coder-0.5B trained on as a masked diffusion model, without alignment. Needs the hub.
# Settings of Open-dLLM (370,000 steps were published), with three differences: rows of 4,096 tokens are full (there 512
# documents a step), master weights and Adam's moments are fp32 (there bf16), and the gradient is right.
# 8 GPUs with 80 GB; --micro_batch_size changes only memory and speed. Estimated: 40 GiB per GPU, 2.7 s a step on H100s:
# 11 days for all steps, so lower --max_iters for a budget (the learning rate follows it).
#   torchrun --standalone --nproc_per_node=8 train.py config/mdm_qwen2_5_coder_0_5b.py
out_dir = 'out/mdm_qwen2_5_coder_0_5b'
objective = 'mdm'
init_from = 'Qwen/Qwen2.5-Coder-0.5B'
weighting = 'planner'
dataset = 'fredzzp/fine_code'
seq_len = 4096
global_batch_size = 512
micro_batch_size = 8
max_iters = 370_000
lr = 3e-4
min_lr_ratio = 0.01         # to 3e-6
warmup_iters = 370
weight_decay = 0.01
eval_interval = 1000
eval_rows = 128
final_eval_rows = 1024
save_interval = 2000
sample_prompt = 'def quick_sort(arr):'
sample_tokens = 128
sample_steps = 128
