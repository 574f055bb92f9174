"""Key statistics: what methods preserve, collected in one pass over a corpus, by one process or
many.

    keys          what users call: `key_statistics` and `KeyStatistics`
    collect       one collection, round by round; sums, convergence, memory, throughput: its parts
    corpus/       from what a user names to windows of tokens and batches
    files/        our files, the peers', and whether one is sound
    distributed/  ranks, rounds and checkpoints
"""

from knowedit.statistics.keys import KeyStatistics as KeyStatistics
from knowedit.statistics.keys import key_statistics as key_statistics
