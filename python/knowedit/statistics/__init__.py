"""Key statistics: what editors preserve, collected in one pass over a corpus, by one process or many.

    windows -> batching -> collect (sums, memory, convergence, ranks, resume, meter) -> store; npz and verify for the peers'

`keys` has what users call.
"""

from .keys import SINK_RATIO as SINK_RATIO
from .keys import KeyStatistics as KeyStatistics
from .keys import key_statistics as key_statistics
