"""Measuring what an edit did: facts with intervals, facts of one subject in a user's words, drift
elsewhere, and whole methods.
"""

from knowedit.evaluation.evaluation import Evaluation as Evaluation
from knowedit.evaluation.evaluation import evaluate as evaluate
from knowedit.evaluation.evaluation import evaluate_each as evaluate_each
from knowedit.evaluation.intervals import Estimate as Estimate
from knowedit.evaluation.interview import Said as Said
from knowedit.evaluation.interview import interview as interview
from knowedit.evaluation.measures.base import Answer as Answer
from knowedit.evaluation.measures.drift import Drift as Drift
from knowedit.evaluation.measures.drift import drift as drift
from knowedit.evaluation.subjects.same_subject import SameSubjectEvaluation as SameSubjectEvaluation
from knowedit.evaluation.subjects.same_subject import evaluate_same_subject as evaluate_same_subject
