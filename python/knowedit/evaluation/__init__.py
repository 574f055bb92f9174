"""Measuring what an edit did: CounterFact's measures with intervals, facts of one subject in a
user's words, and drift.
"""

from knowedit.evaluation.drift import Drift as Drift
from knowedit.evaluation.drift import drift as drift
from knowedit.evaluation.measures.counterfact import Answer as Answer
from knowedit.evaluation.measures.counterfact import Estimate as Estimate
from knowedit.evaluation.measures.counterfact import Evaluation as Evaluation
from knowedit.evaluation.measures.counterfact import evaluate as evaluate
from knowedit.evaluation.measures.counterfact import evaluate_each as evaluate_each
from knowedit.evaluation.subjects.same_subject import SameSubjectEvaluation as SameSubjectEvaluation
from knowedit.evaluation.subjects.same_subject import evaluate_same_subject as evaluate_same_subject
