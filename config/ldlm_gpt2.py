# The sizes of the LDLM paper (2605.07933), on GPT-2 small.
# [P, R]: encoder, layer -3, sigma_dec 3, tangent schedule d = 3, self-conditioning, 6 + 6 + 3 + 12 layers of width 768.
# [L], its authors' earlier work: AdamW 2e-4, betas .9 / .98, weight decay 1e-5, batch 1024, 500k steps, EMA .9999.
# [S]: rows of 128 tokens, the dataset's sample, the prefix (0: the paper writes from nothing), warm-up of 50k steps [C].
objective = 'ldlm'
out_dir = 'out/ldlm_gpt2'
encoder = 'openai-community/gpt2'
encoder_layer = -3
dataset = 'HuggingFaceFW/fineweb'
subset = 'sample-10BT'
max_docs = 1000000
seq_len = 129
n_embd = 768
n_head = 12
n_ff = 2048
n_layer = 12
perceiver_layers = 6
decoder_layers = 3
perceiver_block = 'joint'
perceiver_skip = False
dit_adaln = True
sigma_dec = 3.0
tangent_d = 3.0
encoder_warmup = 50000
global_batch_size = 1024
micro_batch_size = 128
max_iters = 500000
ema_decay = 0.9999
lr = 2e-4
beta2 = 0.98
weight_decay = 1e-5
warmup_iters = 1000
eval_interval = 5000
eval_rows = 1024
final_eval_rows = 8192
save_interval = 5000
sample_tokens = 128
sample_steps = 64
