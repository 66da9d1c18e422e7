"""Classifiers p(y|x,c): networks, fitting, calibration, files."""

from ctrl_ray.collector import collect_seldom_in_workers

collect_seldom_in_workers()  # before torch is imported
