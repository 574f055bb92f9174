"""Facts of the tests of the command line."""

FACTS = [
    {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon", "true": "Paris"},
    {"prompt": "They say {} speaks", "subject": "Brazil", "target": "Norse", "true": "Portuguese"},
]
