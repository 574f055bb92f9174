"""Streaming second moments: C += K^T K over any number of tokens, to better than float32 accuracy.

`SecondMoment` holds the state (buffer, float64 sum, audit); `second_moment_` is the same in place
on a [d, d] float64 tensor. `GroupedSecondMoment` holds one for each expert of a mixture. The
mathematics, the error budget and what was measured: README.md here.
"""

from __future__ import annotations

from knowedit_kernels import _ops as _ops
from knowedit_kernels._dispatch import register
from knowedit_kernels.moments import cpu, cuda, gpu, grouped_gpu, together
from knowedit_kernels.moments.audit import AuditResult as AuditResult
from knowedit_kernels.moments.call import (
    GroupedCall,
    MomentCall,
    PackCall,
    RowAuditCall,
    UpdateCall,
)
from knowedit_kernels.moments.functional import PRECISIONS as PRECISIONS
from knowedit_kernels.moments.functional import second_moment_ as second_moment_
from knowedit_kernels.moments.grouped import GroupedSecondMoment as GroupedSecondMoment
from knowedit_kernels.moments.state import SecondMoment as SecondMoment
from knowedit_kernels.moments.together import update_together as update_together
from knowedit_kernels.moments.waiting import sort_rows as sort_rows

register("second_moment_", MomentCall, cuda.CUDA, gpu.TRITON, *cpu.COMPILED, cpu.TORCH)
register("moment_update_", UpdateCall, together.UPDATE)
register("moment_pack_", PackCall, gpu.TRITON_PACK, cpu.COMPILED_PACK, cpu.TORCH_PACK)
register(
    "grouped_moment_", GroupedCall, grouped_gpu.TRITON, *cpu.COMPILED_GROUPED, cpu.GROUPED_TORCH
)
register(
    "row_audit_",
    RowAuditCall,
    grouped_gpu.TRITON_ROW_AUDIT,
    cpu.COMPILED_ROW_AUDIT,
    cpu.TORCH_ROW_AUDIT,
)
