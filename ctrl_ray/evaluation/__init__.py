"""Metrics, judging, figures, report and tracking of a run."""
