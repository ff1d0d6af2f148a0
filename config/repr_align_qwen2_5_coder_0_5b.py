# Qwen2.5-Coder-0.5B becomes a diffusion model, aligned with its frozen self at every layer. Needs the hub.
# As config/mdm_qwen2_5_coder_0_5b.py with a teacher and fewer steps: the paper (2605.06885) claims up to four times fewer.
# 8 GPUs with 80 GB, or one with --global_batch_size=64. Estimated: 40 GiB per GPU, 3.5 s a step on 8 H100s (20 hours).
#   torchrun --standalone --nproc_per_node=8 train.py config/repr_align_qwen2_5_coder_0_5b.py
out_dir = 'out/repr_align_qwen2_5_coder_0_5b'
objective = 'repr_align'
init_from = 'Qwen/Qwen2.5-Coder-0.5B'
align_weight = 10.0
weighting = 'planner'
dataset = 'fredzzp/fine_code'
seq_len = 4096
global_batch_size = 512
micro_batch_size = 8
max_iters = 20_000
lr = 3e-4
min_lr_ratio = 0.01
warmup_iters = 100
weight_decay = 0.01
eval_interval = 500
eval_rows = 128
final_eval_rows = 1024
save_interval = 1000
sample_prompt = 'def quick_sort(arr):'
sample_tokens = 128
sample_steps = 128
