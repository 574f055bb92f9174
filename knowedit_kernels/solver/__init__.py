"""The editing normal equation: metrics factored once, edits solved many times, exact derivatives
(see README.md).
"""

from .blocks import BlockMetric as BlockMetric
from .blocks import BlockSolver as BlockSolver
from .blocks import RoutedKeys as RoutedKeys
from .blocks import shrunk_by_count as shrunk_by_count
from .cache import cached_covariance as cached_covariance
from .cache import forget_factors as forget_factors
from .cholesky import EquilibratedCholesky as EquilibratedCholesky
from .cholesky import NotPositiveDefiniteError as NotPositiveDefiniteError
from .edit_solver import EditSolver as EditSolver
from .edit_solver import read_in as read_in
from .metrics import Covariance as Covariance
from .metrics import Identity as Identity
from .metrics import Metric as Metric
from .metrics import ShrunkCovariance as ShrunkCovariance
from .metrics import combined as combined
from .metrics import weight_for_gain as weight_for_gain
from .null_space import NullSpace as NullSpace
