"""Key statistics: what editors preserve, collected in one pass over a corpus, by one process or
many.

    windows -> batching -> collect (sums, memory, convergence, ranks, resume, meter) -> store; npz
    and verify for the peers'

`keys` has what users call.
"""

from knowedit.statistics.keys import SINK_RATIO as SINK_RATIO
from knowedit.statistics.keys import KeyStatistics as KeyStatistics
from knowedit.statistics.keys import key_statistics as key_statistics
