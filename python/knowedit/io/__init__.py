"""Files, progress and memory: what every other package may use, and what knows none of them."""
