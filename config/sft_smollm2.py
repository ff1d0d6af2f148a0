# Instruction tuning: the assistant's words are masked and scored, everything else is given and never masked. Goes on from
# the diffusion model of config/repr_align_smollm2.py (any checkpoint or Hugging Face model: --init_from), with the chat
# template of its tokenizer. --key=messages reads [{role, content}, ...], --key=prompt,response two columns of text.
# Needs the hub for this data set; your own is --dataset=chats.jsonl (or .json .csv .parquet).
# One GPU: 20 GiB (less with a lower --micro_batch_size, same result); estimated: 10 minutes on an H100.
#   python sample.py --out_dir=out/sft_smollm2 --chat=true --prompt='Write a function that adds two numbers.'
out_dir = 'out/sft_smollm2'
objective = 'mdm'
init_from = 'out/repr_align_smollm2'
dataset = 'HuggingFaceTB/smoltalk'
subset = 'smol-magpie-ultra'
key = 'messages'
max_docs = 50_000
weighting = 'flat'
seq_len = 1024
global_batch_size = 64
micro_batch_size = 32
max_iters = 1500
lr = 1e-4
warmup_iters = 50
weight_decay = 0.01
eval_interval = 250
eval_rows = 64
eval_draws = 2
final_eval_rows = 512
save_interval = 0
log_interval = 20
sample_tokens = 0           # a bare prompt is no conversation: see sample.py --chat
