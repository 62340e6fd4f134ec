"""The embedded default: a task world whose true score is known, and its small base model M0."""
