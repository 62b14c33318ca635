# The published recipe; weights, gradients and optimizer state lie in shards.
_base_ = '../upernet/convnext-xlarge-in22k-pre_upernet_8xb2-160k_ade20k-640x640.py'

model_wrapper_cfg = dict(type='convnext_mm.FullyShard')
