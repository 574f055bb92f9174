"""Whole studies: a question, its prompts, every method, and an answer."""

from .arithmetic import Study as Study
from .prompts import Sum as Sum
from .runs import run as run
