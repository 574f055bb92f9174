"""Measuring what an edit did: CounterFact's measures with intervals, and drift on unrelated text."""

from .drift import Drift as Drift
from .drift import drift as drift
from .metrics import Answer as Answer
from .metrics import Estimate as Estimate
from .metrics import Evaluation as Evaluation
from .metrics import evaluate as evaluate
from .metrics import evaluate_each as evaluate_each
