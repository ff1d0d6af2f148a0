# Qwen2.5-Coder-3B-Instruct becomes a diffusion model: Open-dLLM's multi-GPU example of alignment (micro-batch 3, global
# batch 240, weight 10). Needs the hub. DDP keeps a whole model per GPU: 49 GB for fp32 weights, gradients and moments,
# 6 GB for the bf16 teacher, 6 GB for bf16 copies. 8 GPUs with 80 GB; estimated 70 GiB each (40 with --freeze_layers=mlp)
# and 11 s a step on H100s: 30 hours. Host: 25 GB per process while both models load in fp32; 90 GB of disk.
# 10, 5 or 2 nodes of 8: the same command on each, with --rdzv_endpoint (see train.py).
#   torchrun --standalone --nproc_per_node=8 train.py config/repr_align_qwen2_5_coder_3b.py
out_dir = 'out/repr_align_qwen2_5_coder_3b'
objective = 'repr_align'
init_from = 'Qwen/Qwen2.5-Coder-3B-Instruct'
align_weight = 10.0
weighting = 'planner'
dataset = 'fredzzp/fine_code'
seq_len = 4096
global_batch_size = 240
micro_batch_size = 3
activation_checkpointing = True
max_iters = 10_000
lr = 3e-4
min_lr_ratio = 0.01
warmup_iters = 100
weight_decay = 0.01
eval_interval = 500
eval_rows = 48
final_eval_rows = 480
save_interval = 1000
sample_prompt = 'def quick_sort(arr):'
sample_tokens = 128
sample_steps = 128
