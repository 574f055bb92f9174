"""Whole studies: a question, its prompts, every method, and an answer."""

from knowedit.studies.arithmetic.prompts import Sum as Sum
from knowedit.studies.arithmetic.runs import run as run
from knowedit.studies.arithmetic.study import Study as Study
