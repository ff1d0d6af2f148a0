# The sizes of Open-dLLM's README for Qwen3.6-27B: 6.752B trainable parameters, 64 latents for 64 tokens.
# [R]: width 5120, 4 + 4 Perceiver layers ('split'), 2 layers of token decoder, sigma_dec 3, tangent d = 3, layer -3.
# Its count needs 4 plain DiT layers, without adaLN; its 8 heads would be 640 wide: we take heads of 128 [S].
# The encoder itself is not there yet: random features of its width stand in. Then: encoder = 'Qwen/Qwen3.6-27B'
# Two GPUs: --encoder_device=cuda:1; one GPU and a large host memory: --encoder_device=cpu
# In fp32 with AdamW the trainables take 16 bytes each, 108 GB: a GPU of 141 GB or more.
objective = 'ldlm'
out_dir = 'out/ldlm_qwen3_6_27b'
encoder = 'random:5120:248320'
encoder_layer = -3
encoder_device = ''
dataset = 'HuggingFaceFW/fineweb'
subset = 'sample-10BT'
max_docs = 100000
seq_len = 65
n_latents = 64
n_embd = 5120
n_head = 40
n_ff = 13656
n_layer = 4
perceiver_layers = 4
decoder_layers = 2
perceiver_block = 'split'
perceiver_skip = False
dit_adaln = False
sigma_dec = 3.0
vary_sigma = False
tangent_d = 3.0
encoder_warmup = 50000
encoder_grad = 1.0
global_batch_size = 64
micro_batch_size = 16
max_iters = 100000
ema_decay = 0.0
lr = 3e-4
beta2 = 0.98
weight_decay = 1e-5
warmup_iters = 1000
activation_checkpointing = True
eval_interval = 1000
eval_rows = 256
final_eval_rows = 1024
save_interval = 1000
sample_tokens = 64
sample_steps = 10
