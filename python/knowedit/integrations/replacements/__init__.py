"""The replacements, one file a task of the hosts."""

from __future__ import annotations

from knowedit.integrations.replacements.base import Replacement as Replacement
from knowedit.integrations.replacements.covariance import COMPUTE_KS, GET_COV, GET_INV_COV
from knowedit.integrations.replacements.evaluation import ACCURACY, PAIRS
from knowedit.integrations.replacements.generation import GENERATE
from knowedit.integrations.replacements.requests import ENTRY
from knowedit.integrations.replacements.states import STATES
from knowedit.integrations.replacements.statistics import LAYER_STATS, TALLY
from knowedit.integrations.replacements.values import COMPUTE_V, COMPUTE_Z

REPLACEMENTS = (
    ENTRY,
    STATES,
    COMPUTE_Z,
    COMPUTE_V,
    COMPUTE_KS,
    LAYER_STATS,
    TALLY,
    GET_COV,
    GET_INV_COV,
    PAIRS,
    ACCURACY,
    GENERATE,
)
