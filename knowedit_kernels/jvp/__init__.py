"""Jacobian-vector products in many directions at once: RMSNorm, SwiGLU, attention, and the editing
solver (see README.md).
"""

from knowedit_kernels._dispatch import register
from knowedit_kernels.jvp import batched, gpu
from knowedit_kernels.jvp.call import AttentionCall, RmsNormCall, SwigluCall
from knowedit_kernels.jvp.layers import WithTangents as WithTangents
from knowedit_kernels.jvp.layers import attention as attention
from knowedit_kernels.jvp.layers import attention_jvp as attention_jvp
from knowedit_kernels.jvp.layers import rms_norm as rms_norm
from knowedit_kernels.jvp.layers import rms_norm_jvp as rms_norm_jvp
from knowedit_kernels.jvp.layers import swiglu as swiglu
from knowedit_kernels.jvp.layers import swiglu_jvp as swiglu_jvp
from knowedit_kernels.jvp.solver import EditCotangents as EditCotangents
from knowedit_kernels.jvp.solver import Factors as Factors
from knowedit_kernels.jvp.solver import edit_jvp as edit_jvp
from knowedit_kernels.jvp.solver import edit_vjp as edit_vjp
from knowedit_kernels.jvp.spread import SpreadTangents as SpreadTangents
from knowedit_kernels.jvp.spread import compound_gain as compound_gain
from knowedit_kernels.jvp.spread import effective_gain as effective_gain
from knowedit_kernels.jvp.spread import spread_jvp as spread_jvp
from knowedit_kernels.jvp.spread import spread_shares as spread_shares
from knowedit_kernels.jvp.spread import spread_vjp as spread_vjp

register("rms_norm_jvp", RmsNormCall, gpu.RMS_NORM, batched.RMS_NORM)
register("swiglu_jvp", SwigluCall, gpu.SWIGLU, batched.SWIGLU)
register("attention_jvp", AttentionCall, gpu.ATTENTION, batched.ATTENTION)
