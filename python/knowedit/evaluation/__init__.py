"""Measuring what an edit did: CounterFact's measures with intervals, facts of one subject in a user's words, and drift."""

from .drift import Drift as Drift
from .drift import drift as drift
from .metrics import Answer as Answer
from .metrics import Estimate as Estimate
from .metrics import Evaluation as Evaluation
from .metrics import evaluate as evaluate
from .metrics import evaluate_each as evaluate_each
from .same_subject import SameSubjectEvaluation as SameSubjectEvaluation
from .same_subject import evaluate_same_subject as evaluate_same_subject
