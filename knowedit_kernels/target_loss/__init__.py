"""Cross-entropy and KL on target positions only, for large vocabularies, forward and backward (see
README.md).
"""

from knowedit_kernels._dispatch import register
from knowedit_kernels.target_loss import chunked, gpu
from knowedit_kernels.target_loss.call import LossCall
from knowedit_kernels.target_loss.loss import TargetLoss as TargetLoss
from knowedit_kernels.target_loss.loss import target_loss as target_loss

register("target_losses", LossCall, gpu.TRITON, chunked.TORCH)
