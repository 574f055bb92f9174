"""W += alpha U V^T in place, in one pass over W, with a choice of rounding and a report of what
survived it.

See README.md for the mathematics and the error budget. `WeightLedger` undoes any edit exactly, in
any order.
"""

from knowedit_kernels._dispatch import register
from knowedit_kernels.lowrank import blocked, cpu, gpu
from knowedit_kernels.lowrank.call import UpdateCall
from knowedit_kernels.lowrank.edited_weight import Change as Change
from knowedit_kernels.lowrank.edited_weight import LedgerError as LedgerError
from knowedit_kernels.lowrank.ledger import WeightLedger as WeightLedger
from knowedit_kernels.lowrank.report import UpdateReport as UpdateReport
from knowedit_kernels.lowrank.update import ROUNDINGS as ROUNDINGS
from knowedit_kernels.lowrank.update import low_rank_update_ as low_rank_update_
from knowedit_kernels.lowrank.update import low_rank_update_many_ as low_rank_update_many_

register("low_rank_update_", UpdateCall, gpu.TRITON, *cpu.COMPILED, blocked.TORCH)
