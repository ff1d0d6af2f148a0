# A latent diffusion model of Python code on the features of a small autoregressive model of our own, on two CPU cores.
#   python train.py config/quickstart.py --objective=ar --out_dir=out/quickstart_ar      # the encoder: three minutes
#   python train.py config/ldlm_quickstart.py                                           # four to seven more
# Sizes and noise are our suggestion [S]: at sigma_dec = 1 a latent of 128, one per token, holds up to 64 bits.
objective = 'ldlm'
out_dir = 'out/ldlm_quickstart'
encoder = 'out/quickstart_ar'
encoder_layer = -1          # the AR model has only two blocks: its final states
dataset = 'stdlib'
data_dir = 'data/stdlib-bpe-4096'
seq_len = 65                # separator, 16 tokens of prefix, a chunk of 48
prefix_len = 16
n_embd = 128
n_head = 4
n_ff = 336
n_layer = 4
perceiver_layers = 2
decoder_layers = 1
sigma_dec = 1.0
encoder_warmup = 100
global_batch_size = 32
max_iters = 500
ema_decay = 0.99
optimizer = 'muon'
lr = 1e-2
warmup_iters = 20
eval_interval = 250
eval_rows = 128
final_eval_rows = 512
save_interval = 250
log_interval = 20
sample_tokens = 48
sample_steps = 32
