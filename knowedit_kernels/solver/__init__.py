"""The editing normal equation: metrics factored once, edits solved many times, exact derivatives
(see README.md).
"""

from knowedit_kernels.solver.block_metric import BlockMetric as BlockMetric
from knowedit_kernels.solver.block_metric import shrunk_by_count as shrunk_by_count
from knowedit_kernels.solver.blocks import BlockSolver as BlockSolver
from knowedit_kernels.solver.cache import cached_covariance as cached_covariance
from knowedit_kernels.solver.cache import forget_factors as forget_factors
from knowedit_kernels.solver.cholesky import EquilibratedCholesky as EquilibratedCholesky
from knowedit_kernels.solver.cholesky import NotPositiveDefiniteError as NotPositiveDefiniteError
from knowedit_kernels.solver.edit_solver import EditSolver as EditSolver
from knowedit_kernels.solver.edit_solver import read_in as read_in
from knowedit_kernels.solver.metrics import Covariance as Covariance
from knowedit_kernels.solver.metrics import Identity as Identity
from knowedit_kernels.solver.metrics import Metric as Metric
from knowedit_kernels.solver.metrics import ScaledMetric as ScaledMetric
from knowedit_kernels.solver.metrics import ShrunkCovariance as ShrunkCovariance
from knowedit_kernels.solver.metrics import combined as combined
from knowedit_kernels.solver.metrics import weight_for_gain as weight_for_gain
from knowedit_kernels.solver.null_space import LeakyNullSpace as LeakyNullSpace
from knowedit_kernels.solver.null_space import NullSpace as NullSpace
from knowedit_kernels.solver.routed_keys import RoutedKeys as RoutedKeys
