# Settings: see its base. Weights, gradients and optimizer state lie in shards.
_base_ = '../upernet/convnext-v2-huge_upernet_8xb2-amp-160k_ade20k-512x512.py'

model_wrapper_cfg = dict(type='convnext_mm.FullyShard')
