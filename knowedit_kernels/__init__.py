"""Fused kernels for the hot paths of knowledge editing, behind plain functions on tensors."""

from knowedit_kernels import target_loss as target_loss  # its op is known to KNOWEDIT_IMPL, too
from knowedit_kernels._dispatch import DispatchError as DispatchError
from knowedit_kernels._dispatch import explain as explain
from knowedit_kernels.jvp import attention_jvp as attention_jvp
from knowedit_kernels.jvp import edit_jvp as edit_jvp
from knowedit_kernels.jvp import edit_vjp as edit_vjp
from knowedit_kernels.jvp import effective_gain as effective_gain
from knowedit_kernels.jvp import rms_norm_jvp as rms_norm_jvp
from knowedit_kernels.jvp import swiglu_jvp as swiglu_jvp
from knowedit_kernels.lowrank import UpdateReport as UpdateReport
from knowedit_kernels.lowrank import WeightLedger as WeightLedger
from knowedit_kernels.lowrank import low_rank_update_ as low_rank_update_
from knowedit_kernels.lowrank import low_rank_update_many_ as low_rank_update_many_
from knowedit_kernels.moments import GroupedSecondMoment as GroupedSecondMoment
from knowedit_kernels.moments import SecondMoment as SecondMoment
from knowedit_kernels.moments import second_moment_ as second_moment_
from knowedit_kernels.moments import update_together as update_together
from knowedit_kernels.solver import BlockMetric as BlockMetric
from knowedit_kernels.solver import BlockSolver as BlockSolver
from knowedit_kernels.solver import Covariance as Covariance
from knowedit_kernels.solver import EditSolver as EditSolver
from knowedit_kernels.solver import Identity as Identity
from knowedit_kernels.solver import NullSpace as NullSpace
from knowedit_kernels.solver import RoutedKeys as RoutedKeys
from knowedit_kernels.solver import ShrunkCovariance as ShrunkCovariance
from knowedit_kernels.solver import cached_covariance as cached_covariance
from knowedit_kernels.solver import weight_for_gain as weight_for_gain

__version__ = "0.1.0"
